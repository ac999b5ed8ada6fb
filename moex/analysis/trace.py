"""Routing traces: which experts every token met, in a Parquet file.

One row per token, MoE layer and round of a chain. Rows come in blocks of `BLOCK`
tokens; of a block every (layer, round) is one row group, in the order of
`Header.layers`, so that a reader holds one block and the rows of all layers lie side by
side. `docs/traces.md` describes the columns to a user. Needs no model and no JAX;
`writer.py` writes, `record.py` runs the model.

N tokens · K slots per token, the most of the layer · E experts (zero-computation ones
included)
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moex.config import ConfigError, nearest

KEY = b"moex.trace"  # of the header, in the metadata of the file
VERSION = 1
BLOCK = 16384  # tokens of a row group; the last one has what is left
SHARED = ("example", "position", "document", "token", "domain")
VALUES = ("gate", "logit", "prob")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One router of the model.

    Attributes:
      layer: absolute number of the layer, from 0; dense layers count.
      round: of the chain, from 1; 0 where there is no chain.
      num_experts: experts that compute. Ids from here on are zero-computation experts.
      num_choices: E, all that the router chooses among.
      slots: K, the most experts of a token.
      router: name of its config, such as "TopK".
      causal: False where the choice for a token reads later tokens (`ExpertChoice`).
      capacity_factor: of the layer; None: nothing is dropped.
    """

    layer: int
    round: int
    num_experts: int
    num_choices: int
    slots: int
    router: str
    causal: bool = True
    capacity_factor: float | None = None

    @property
    def label(self) -> str:
        """Such as "003", or "003.1" for the first round of a chain."""
        return f"{self.layer:03d}" + (f".{self.round}" if self.round else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a trace says of itself; JSON in the file's metadata.

    Attributes:
      run: the run directory, as it was given.
      step: of the checkpoint.
      layers: every router, in the order of the model.
      tokenizer: {"fingerprint", "doc_id"}; doc_id is the token between documents.
      vocabulary: what each token id stands for, as text; "" for unused ids.
      domains: names of the data sources.
      data: what was read; plain data, for people.
      logits: whether the logits of all experts are there too.
    """

    run: str
    step: int
    layers: tuple[LayerInfo, ...]
    tokenizer: dict[str, Any]
    vocabulary: tuple[str, ...]
    domains: tuple[str, ...]
    data: dict[str, Any]
    logits: bool = False

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps({"version": VERSION} | dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Header":
        """Read what `to_json` wrote.

        Raises:
          ConfigError: if it is of another version.
        """
        data = json.loads(text)
        version = data.pop("version", None)
        if version != VERSION:
            raise ConfigError(
                f"a trace of version {version}; this moex reads {VERSION}."
            )
        layers = tuple(LayerInfo(**layer) for layer in data.pop("layers"))
        vocabulary, domains = tuple(data.pop("vocabulary")), tuple(data.pop("domains"))
        return cls(layers=layers, vocabulary=vocabulary, domains=domains, **data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a chunk; int32[N] each, no padding.

    Attributes:
      example_N: the sequence, numbered through the trace from 0.
      position_N: inside the document, from 0.
      document_N: a document inside a sequence, numbered through the trace from 0. A
        document that goes on in the next sequence is another one there: attention does
        not look back.
      token_N: token ids.
      domain_N: index into `Header.domains`.
    """

    example_N: np.ndarray
    position_N: np.ndarray
    document_N: np.ndarray
    token_N: np.ndarray
    domain_N: np.ndarray

    def __len__(self) -> int:
        return len(self.token_N)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Where the tokens of a chunk went in one layer (one round of a chain).

    Kept slots may stand anywhere in a written row, and come first in a read one. Their
    order is that of the router: best first, or by expert number where experts choose.
    What is not kept is 0.

    Attributes:
      expert_NK: int32 in [0, E).
      keep_NK: bool, the slot is used.
      gate_NK: float32 weight of the expert's output.
      logit_NK: float32 router logit, before normalisation, selection bias and noise.
      prob_NK: float32 normalised score; over all experts of a token they sum to 1.
      logits_NE: float32 logits of all experts, or None.
    """

    expert_NK: np.ndarray
    keep_NK: np.ndarray
    gate_NK: np.ndarray | None = None
    logit_NK: np.ndarray | None = None
    prob_NK: np.ndarray | None = None
    logits_NE: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some consecutive tokens of a trace, and where they went; arrays are aligned."""

    tokens: Tokens
    layers: dict[str, Slots]


class Trace:
    """A trace to read; open it with `Trace.open`, in a `with` statement or not.

    Attributes:
      path: of the file.
      header: `Header`.
      num_tokens: tokens of the trace, each counted once.
    """

    def __init__(self, path: pathlib.Path, file: pq.ParquetFile, header: Header):
        self.path, self.header, self._file = path, header, file
        rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        step = len(header.layers)
        self._sizes = rows[::step]
        if len(rows) % step or rows != [n for n in self._sizes for _ in range(step)]:
            raise ConfigError(
                f"{path}: the row groups are not those of a trace; another program "
                "wrote the file anew."
            )
        self.num_tokens = sum(self._sizes)

    @classmethod
    def open(cls, path) -> "Trace":
        """Open a trace and read its header; rows are read by `chunks`.

        Raises:
          ConfigError: if there is no such file, or it is no whole trace.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; `moex trace` writes traces.")
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as e:
            reason = str(e).splitlines()[0]
            raise ConfigError(f"{path}: not a Parquet file ({reason}).") from None
        text = (file.schema_arrow.metadata or {}).get(KEY)
        if text is None:
            file.close()
            raise ConfigError(f"{path}: a Parquet file, but not a trace of moex.")
        try:
            return cls(path, file, Header.from_json(text))
        except ConfigError:
            file.close()
            raise

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def layers(self) -> dict[str, LayerInfo]:
        """Every router by its label, in the order of the model."""
        return {info.label: info for info in self.header.layers}

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """What each token id stands for."""
        return self.header.vocabulary

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the data sources; `Tokens.domain_N` indexes them."""
        return self.header.domains

    def chunks(
        self,
        layers: Sequence[str] | None = None,
        *,
        values: Sequence[str] = VALUES,
        logits: bool = False,
    ) -> Iterator[Chunk]:
        """The tokens in order, `BLOCK` at a time: bounded memory.

        Args:
          layers: labels of the layers to read; None: all; empty: the tokens alone.
          values: which of "gate", "logit" and "prob" to read; others are None.
          logits: read the logits of all experts too.

        Raises:
          ConfigError: for a layer or logits that the trace does not have.
        """
        labels = list(self.layers)
        wanted = labels if layers is None else list(layers)
        for label in wanted:
            if label not in labels:
                raise ConfigError(
                    f"{self.path}: no layer {label!r}.{nearest(label, labels)} "
                    f"Layers are {', '.join(labels)}."
                )
        if logits and not self.header.logits:
            raise ConfigError(
                f"{self.path}: without the logits of all experts; "
                "`moex trace --logits` records them."
            )
        names = ["expert", *values, *(["logits"] if logits else [])]
        for block in range(len(self._sizes)):
            first = block * len(labels)
            tokens = self._tokens(first)
            found = {
                label: self._slots(
                    first + labels.index(label), self.layers[label], names
                )
                for label in wanted
            }
            yield Chunk(tokens=tokens, layers=found)

    def _read(self, group: int, names: Sequence[str]) -> dict[str, Any]:
        table = self._file.read_row_group(group, columns=list(names))
        return {name: table.column(name).combine_chunks() for name in names}

    def _tokens(self, group: int) -> Tokens:
        columns = self._read(group, SHARED)
        # A row group has a dictionary of its own.
        domain = columns.pop("domain")
        names = domain.dictionary.to_pylist()
        number = np.array([self.domains.index(name) for name in names], np.int32)
        domain_N = number[domain.indices.to_numpy()]
        arrays = {f"{name}_N": a.to_numpy() for name, a in columns.items()}
        return Tokens(domain_N=domain_N, **arrays)

    def _slots(self, group: int, info: LayerInfo, names: Sequence[str]) -> Slots:
        columns = self._read(group, names)
        arrays: dict[str, np.ndarray] = {}
        if "logits" in columns:
            flat = columns.pop("logits").flatten().to_numpy()
            arrays["logits_NE"] = flat.reshape(-1, info.num_choices)
        offsets = columns["expert"].offsets.to_numpy()
        length_N1 = np.diff(offsets)[:, None]
        keep_NK = np.arange(info.slots) < length_N1
        for name, column in columns.items():
            flat = column.flatten().to_numpy()
            dtype = np.int32 if name == "expert" else np.float32
            padded_NK = np.zeros(keep_NK.shape, dtype)
            padded_NK[keep_NK] = flat
            arrays[f"{name}_NK"] = padded_NK
        return Slots(keep_NK=keep_NK, **arrays)
