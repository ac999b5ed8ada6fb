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
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moex.analysis.gates import gates_of
from moex.analysis.header import Header, LayerInfo
from moex.config.base import ConfigError, nearest, short
from moex.json_files import parse_object
from moex.progress import counted

KEY = b"moex.trace"  # key of the header in the metadata of the file
GATES = b"moex.trace.adapters"  # key of the records of the gates of adapters
BLOCK = 16384  # tokens of a row group; the last one has what is left
SHARED = ("example", "position", "document", "token", "domain")
VALUES = ("gate", "logit", "prob")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a chunk; int32[N] each, no padding."""

    example_N: np.ndarray  # the sequence, numbered through the trace from 0
    position_N: np.ndarray  # inside the document, from 0
    # A document inside a sequence, numbered through the trace from 0. A document that
    # goes on in the next sequence is another one there: attention does not look back.
    document_N: np.ndarray
    token_N: np.ndarray  # token ids
    domain_N: np.ndarray  # index into `Header.domains`

    def __len__(self) -> int:
        return len(self.token_N)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Where the tokens of a chunk went in one layer (one round of a chain).

    Kept slots may stand anywhere in a written row, and come first in a read one. Their
    order is that of the router: best first, or by expert number where experts choose.
    Slots that are not kept are 0.
    """

    expert_NK: np.ndarray  # int32 in [0, E)
    keep_NK: np.ndarray  # bool, the slot is used
    gate_NK: np.ndarray | None = None  # float32 weight of the expert's output
    # float32 router logit, before normalisation, selection bias and noise.
    logit_NK: np.ndarray | None = None
    # float32 normalised score; over all experts of a token they sum to 1.
    prob_NK: np.ndarray | None = None
    logits_NE: np.ndarray | None = None  # float32 logits of all experts, or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some consecutive tokens of a trace, and where they went; arrays are aligned."""

    tokens: Tokens
    layers: dict[str, Slots]


class Trace:
    """A trace to read; open it with `Trace.open`, in a `with` statement or not.

    Attributes:
      path: path of the file.
      header: `Header`.
      num_tokens: tokens of the trace, each counted once.
      gates: the gates of the traced model's adapters by matrix.
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
        told, where = file.metadata.metadata.get(GATES, b"{}"), f"{path}, gates"
        self.gates = gates_of(parse_object(told, where), where)
        self._check_columns()

    def _check_columns(self) -> None:
        """Check that every column is there, with the type that the writer gives it."""
        kinds = dict.fromkeys(SHARED, "int32") | {"layer": "int16", "round": "int8"}
        kinds["domain"] = "dictionary<values=string, indices=int32, ordered=0>"
        values = (*VALUES, "logits") if self.header.logits else VALUES
        kinds |= {"expert": "list of int"} | dict.fromkeys(values, "list of float")
        schema = self._file.schema_arrow
        for name, kind in kinds.items():
            found = schema.field(name).type if name in schema.names else "missing"
            told = str(found)
            if isinstance(found, pa.ListType):
                told = f"list of {found.value_type}"
                told = re.sub("int(16|32)$", "int", told)
            if told != kind:
                raise ConfigError(
                    f"{self.path}: column {name!r} is {found}; a trace has {kind}."
                )

    @classmethod
    def open(cls, path) -> "Trace":
        """Open a trace and read its header; rows are read by `chunks`.

        Raises:
          ConfigError: if there is no such file, or it is no whole trace.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            told = "is a folder" if path.is_dir() else "no such file"
            raise ConfigError(f"{path}: {told}; `moex trace` writes traces.")
        try:
            # Traces of moex before 0.2 have no checksums; they are read too.
            file = pq.ParquetFile(path, page_checksum_verification=True)
        except (pa.ArrowInvalid, OSError) as e:
            reason = str(e).splitlines()[0]
            raise ConfigError(f"{path}: not a Parquet file ({reason}).") from None
        text = (file.schema_arrow.metadata or {}).get(KEY)
        if text is None:
            file.close()
            raise ConfigError(f"{path}: a Parquet file, but not a trace of moex.")
        try:
            return cls(path, file, Header.from_json(text, f"{path}, header"))
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
        """The text of each token id; empty where tokens have no ids."""
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
        num_blocks, doing = len(self._sizes), f"reading {self.path}"
        for block in counted(range(num_blocks), doing, num_blocks, "blocks"):
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
        try:
            table = self._file.read_row_group(group, columns=list(names))
            found = {name: table.column(name).combine_chunks() for name in names}
            for name, column in found.items():
                column.validate(full=True)
                flat = column.flatten() if isinstance(column, pa.ListArray) else column
                if column.null_count + flat.null_count:
                    raise self._damaged(group, f"column {name!r} has nulls")
        except (pa.ArrowException, OSError) as e:
            raise self._damaged(group, str(e).splitlines()[0][:200]) from None
        return found

    def _damaged(self, group: int, reason: str) -> ConfigError:
        return ConfigError(f"{self.path}: row group {group} is damaged: {reason}.")

    def _check_range(self, group: int, name: str, values, below: int) -> None:
        if len(values) and not 0 <= values.min() <= values.max() < below:
            number = values.min() if values.min() < 0 else values.max()
            reason = f"{name} {number} is not in [0, {below})"
            raise self._damaged(group, reason)

    def _tokens(self, group: int) -> Tokens:
        columns = self._read(group, SHARED)
        # Every row group has its own dictionary of domains.
        domain = columns.pop("domain")
        place = {name: i for i, name in enumerate(self.domains)}
        names = domain.dictionary.to_pylist()
        for name in names:
            if name not in place:
                raise self._damaged(group, f"no domain is called {short(name)}")
        number = np.array([place[name] for name in names], np.int32)
        domain_N = number[domain.indices.to_numpy()]
        arrays = {name: a.to_numpy() for name, a in columns.items()}
        for name, array in arrays.items():
            below = max(len(self.vocabulary), 1) if name == "token" else 2**31
            self._check_range(group, name, array, below)
        return Tokens(domain_N=domain_N, **{f"{n}_N": a for n, a in arrays.items()})

    def _slots(self, group: int, info: LayerInfo, names: Sequence[str]) -> Slots:
        # Gates are read to check that their lists are as long as those of experts.
        own = dict.fromkeys(("layer", "round", "gate", *names))
        columns = self._read(group, list(own))
        for name in ("layer", "round"):
            if (columns.pop(name).to_numpy() != getattr(info, name)).any():
                raise self._damaged(group, f"its {name} is not that of {info.label}")
        arrays: dict[str, np.ndarray] = {}
        num_rows = len(columns["expert"])
        if "logits" in columns:
            flat = columns.pop("logits").flatten().to_numpy()
            if len(flat) != num_rows * info.num_choices:
                raise self._damaged(group, f"logits are not {info.num_choices} a token")
            arrays["logits_NE"] = flat.reshape(-1, info.num_choices)
        length_N = np.diff(columns["expert"].offsets.to_numpy())
        self._check_range(group, "number of slots", length_N, info.slots + 1)
        keep_NK = np.arange(info.slots) < length_N[:, None]
        for name, column in columns.items():
            if (np.diff(column.offsets.to_numpy()) != length_N).any():
                raise self._damaged(group, f"column {name!r} has other lengths")
            if name not in names:
                continue
            flat = column.flatten().to_numpy()
            if name == "expert":
                self._check_range(group, name, flat, info.num_choices)
            dtype = np.int32 if name == "expert" else np.float32
            padded_NK = np.zeros(keep_NK.shape, dtype)
            padded_NK[keep_NK] = flat
            arrays[f"{name}_NK"] = padded_NK
        # Slots that are not kept get numbers of their own, below those of experts.
        numbers_NK = np.where(keep_NK, arrays["expert_NK"], -1 - np.arange(info.slots))
        numbers_NK.sort(axis=1)
        if (numbers_NK[:, 1:] == numbers_NK[:, :-1]).any():
            raise self._damaged(group, "a token has an expert twice")
        return Slots(keep_NK=keep_NK, **arrays)
