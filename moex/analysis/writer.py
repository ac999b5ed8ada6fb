"""Writing a trace, block by block and in bounded memory.

N tokens · K slots per token
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moex.analysis.header import Header
from moex.analysis.trace import BLOCK, GATES, KEY, SHARED, VALUES, Chunk, Slots, Tokens
from moex.config.base import ConfigError, require
from moex.json_files import dump_json


class TraceWriter:
    """Writes a trace block by block; use it in a `with` statement.

    The file has its name only once it is whole: until then it is `FILE.partial`, which
    is removed if the block is left by an exception.

    Attributes:
      gates: records of the gates of adapters by matrix; they may be set in the block.

    Raises:
      ConfigError: if the file exists already, or has no folder to lie in.
    """

    def __init__(self, path, header: Header):
        self.path = check_new(path)
        self.header = header
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._schema = _schema(header)
        self.gates: dict[str, Any] = {}
        self._waiting: list[Chunk] = []
        self._writer: Any = None

    def __enter__(self) -> "TraceWriter":
        values = [f"{name}.list.element" for name in (*VALUES, "logits")]
        present = values if self.header.logits else values[:-1]
        self._writer = pq.ParquetWriter(
            self._partial,
            self._schema,
            compression="zstd",
            compression_level=1,
            # Scores hardly repeat: a dictionary of them costs time and saves nothing.
            use_dictionary=[*SHARED, "layer", "round", "expert.list.element"],
            column_encoding={name: "BYTE_STREAM_SPLIT" for name in present},
            write_page_checksum=True,
        )
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._flush(last=True)
                if self.gates:
                    told = {GATES.decode(): dump_json(self.gates)}
                    self._writer.add_key_value_metadata(told)
            self._writer.close()
            if kind is None:
                self._partial.rename(self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def write(self, tokens: Tokens, layers: dict[str, Slots]) -> None:
        """Add tokens, any number of them.

        Args:
          layers: slots by label of `Header.layers`, with a row for each token.
        """
        self._waiting.append(Chunk(tokens=tokens, layers=layers))
        if sum(len(chunk.tokens) for chunk in self._waiting) >= BLOCK:
            self._flush(last=False)

    def _flush(self, *, last: bool) -> None:
        """Write whole blocks, and at the end what is left."""
        if not self._waiting:
            return
        chunk = _joined(self._waiting)
        size = len(chunk.tokens)
        done = size if last else size - size % BLOCK
        for first in range(0, done, BLOCK):
            self._write_block(_part(chunk, slice(first, min(first + BLOCK, done))))
        self._waiting = [_part(chunk, slice(done, size))] if done < size else []

    def _write_block(self, chunk: Chunk) -> None:
        tokens, size = chunk.tokens, len(chunk.tokens)
        domains = pa.array(self.header.domains, pa.string())
        shared = {name: getattr(tokens, f"{name}_N") for name in SHARED}
        domain = pa.array(shared["domain"], pa.int32())
        shared["domain"] = pa.DictionaryArray.from_arrays(domain, domains)
        for info in self.header.layers:
            slots = chunk.layers[info.label]
            columns = {
                **shared,
                "layer": np.full(size, info.layer, np.int16),
                "round": np.full(size, info.round, np.int8),
                **_lists(slots, self._schema.field("expert").type.value_type),
            }
            if self.header.logits:
                assert slots.logits_NE is not None
                all_NE = np.ones(slots.logits_NE.shape, bool)
                columns["logits"] = _list(slots.logits_NE, all_NE, pa.float32())
            table = pa.table(columns, schema=self._schema)
            self._writer.write_table(table, row_group_size=max(size, 1))


def check_new(path, flag: str = "--out") -> pathlib.Path:
    """The path of a file that may be written.

    Args:
      path: the file.
      flag: names it in errors.

    Raises:
      ConfigError: if it exists, or its folder does not.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise ConfigError(f"{flag} = {str(path)!r}: exists; give another name.")
    require(path.parent.is_dir(), flag, str(path), "in a folder that exists")
    return path


def _schema(header: Header) -> pa.Schema:
    most = max(info.num_choices for info in header.layers)
    number = pa.int16() if most <= 2**15 else pa.int32()
    fields = {name: pa.int32() for name in SHARED}
    fields |= {
        "domain": pa.dictionary(pa.int32(), pa.string()),
        "layer": pa.int16(),
        "round": pa.int8(),
        "expert": pa.list_(number),
    }
    names = (*VALUES, "logits") if header.logits else VALUES
    fields |= {name: pa.list_(pa.float32()) for name in names}
    return pa.schema(
        [pa.field(*item, nullable=False) for item in fields.items()],
        metadata={KEY: header.to_json()},
    )


def _lists(slots: Slots, number: pa.DataType) -> dict[str, pa.Array]:
    values = {name: getattr(slots, f"{name}_NK") for name in VALUES}
    lists = {n: _list(v, slots.keep_NK, pa.float32()) for n, v in values.items()}
    return {"expert": _list(slots.expert_NK, slots.keep_NK, number)} | lists


def _list(value_NK, keep_NK, kind: pa.DataType) -> pa.Array:
    """The kept values of every row as one list each."""
    offsets = np.zeros(len(keep_NK) + 1, np.int32)
    np.cumsum(keep_NK.sum(axis=1), out=offsets[1:])
    flat = np.asarray(value_NK[keep_NK], kind.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind))


def _map(function, *parts):
    """`function` over the arrays of equal dataclasses; None stays None."""
    names = [f.name for f in dataclasses.fields(parts[0])]
    arrays = {name: [getattr(part, name) for part in parts] for name in names}
    made = {n: None if a[0] is None else function(*a) for n, a in arrays.items()}
    return type(parts[0])(**made)


def _map_chunks(function, *chunks: Chunk) -> Chunk:
    """`function` over the arrays of chunks with the same layers."""
    tokens = _map(function, *(chunk.tokens for chunk in chunks))
    layers = {
        label: _map(function, *(chunk.layers[label] for chunk in chunks))
        for label in chunks[0].layers
    }
    return Chunk(tokens=tokens, layers=layers)


def _joined(chunks: list[Chunk]) -> Chunk:
    return _map_chunks(lambda *arrays: np.concatenate(arrays), *chunks)


def _part(chunk: Chunk, rows: slice) -> Chunk:
    return _map_chunks(lambda array: array[rows], chunk)
