"""The header of a trace: JSON in the metadata of its Parquet file.

K slots per token, the most of the layer · E experts (zero-computation ones included)
"""

import dataclasses
import json
from typing import Any

from moex.config.base import LARGEST, MOST, ConfigError, require, short
from moex.json_files import check_names, field, parse_object

VERSION = 1
MOST_DOMAINS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One router of the model."""

    layer: int  # absolute number of the layer, from 0; dense layers count
    round: int  # round of the chain, from 1; 0 where there is no chain
    # Experts that compute. Ids from here on are zero-computation experts.
    num_experts: int
    num_choices: int  # E, all that the router chooses among
    slots: int  # K, the most experts of a token
    router: str  # name of its config, such as "TopK"
    # False where the choice for a token reads later tokens (`ExpertChoice`).
    causal: bool = True
    capacity_factor: float | None = None  # the layer's factor; None: no slot is dropped

    @property
    def label(self) -> str:
        """The name of the router: "003", or "003.1" for the first round of a chain."""
        return f"{self.layer:03d}" + (f".{self.round}" if self.round else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a trace."""

    run: str  # the run directory, as it was given
    step: int  # step of the checkpoint
    layers: tuple[LayerInfo, ...]  # every router, in the order of the model
    # {"fingerprint", "doc_id"}; doc_id is the token between documents. None where
    # tokens have no ids, as in a regression: all ids are 0, and there is no vocabulary.
    tokenizer: dict[str, Any] | None
    vocabulary: tuple[str, ...]  # the text of each token id; "" for unused ids
    domains: tuple[str, ...]  # names of the data sources
    data: dict[str, Any]  # what was read; plain data, for people
    logits: bool = False  # whether the logits of all experts are there too

    def to_json(self) -> str:
        """The JSON that `from_json` reads."""
        return json.dumps({"version": VERSION} | dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "the header") -> "Header":
        """Read what `to_json` wrote.

        Raises:
          ConfigError: if it is of another version, or damaged; begins with `where`.
        """
        data = parse_object(text, where, nan=True)
        version = data.pop("version", None)
        if version != VERSION:
            raise ConfigError(
                f"{where}: of version {short(version)}; this moex reads {VERSION}."
            )
        layers = field(data, "layers", list[dict], where)
        names = field(data, "domains", list[str], where)
        require(len(layers) > 0, f"{where}: layers", layers, "not empty")
        most = f"at most {MOST_DOMAINS:,} names"
        require(len(names) <= MOST_DOMAINS, f"{where}: domains", len(names), most)
        infos = [
            read_layer(layer, f"{where}: layer {i}") for i, layer in enumerate(layers)
        ]
        labels = [info.label for info in infos]
        ok = len(set(labels)) == len(labels)
        require(ok, f"{where}: layers", labels, "different")
        step = field(data, "step", int, where)
        require(0 <= step <= LARGEST, f"{where}: step", step, "0 or more")
        return cls(
            run=field(data, "run", str, where),
            step=step,
            layers=tuple(infos),
            tokenizer=field(data, "tokenizer", dict[str, Any] | None, where),
            vocabulary=tuple(field(data, "vocabulary", list[str], where)),
            domains=tuple(names),
            data=field(data, "data", dict[str, Any], where),
            logits=field(data, "logits", bool, where, False),
        )


def read_layer(data: dict[str, Any], where: str) -> LayerInfo:
    """A `LayerInfo` from plain data of a file.

    Raises:
      ConfigError: for a missing or unknown field, or one out of range.
    """
    check_names(data, [f.name for f in dataclasses.fields(LayerInfo)], where)
    values = {
        f.name: field(data, f.name, f.type, where, *_default(f))
        for f in dataclasses.fields(LayerInfo)
    }
    info = LayerInfo(**values)
    ranges = {
        "layer": (0, 2**15 - 1),  # the range of its column
        "round": (0, 2**7 - 1),
        "num_experts": (1, MOST["num_experts"]),
        "num_choices": (info.num_experts, 4 * MOST["num_experts"]),
        "slots": (1, info.num_choices),
    }
    for name, (least, most) in ranges.items():
        value = values[name]
        allowed = f"in {least:,} to {most:,}"
        require(least <= value <= most, f"{where}: {name}", value, allowed)
    return info


def _default(f: dataclasses.Field) -> tuple:
    return () if f.default is dataclasses.MISSING else (f.default,)
