"""Parts of a checkpoint: a few experts are read, and the others stay on the disk.

Orbax writes arrays with TensorStore, in pieces that are compressed; a piece is read as
a whole. `Checkpointer` makes every expert a piece of its own, if it has `PIECE_BYTES`
or more. In older checkpoints, and for smaller experts, an array is
one piece: then all of it is read, and a part of it is kept.

A checksum covers a whole array, so what is read here is not checked by one; the digest
of the checkpoint is.
"""

import contextlib
import functools

import jax
import numpy as np
import tensorstore as ts

from moex.config.base import ConfigError
from moex.runs.checkpoint import CheckpointError
from moex.runs.directory import RunDir
from moex.runs.record import read_about, read_record

CACHE_BYTES = 1 << 24
open_array = ts.open  # it opens an array, and no text
READ = "/tensorstore/kvstore/file/bytes_read"


class Rows:
    """Reads parts of the arrays of a checkpoint.

    Attributes:
      step: that of the newest checkpoint of the run.
      meta: the metadata of the checkpoint.
    """

    def __init__(self, run: RunDir):
        steps = run.saved_steps()
        if not steps:
            raise ConfigError(f"{run}: the run has no checkpoint yet.")
        self.step = steps[-1]
        self._folder = run.checkpoints.absolute() / str(self.step)
        record = read_record(run)
        known = None if record is None else record.get(self.step, "")
        cache = {"cache_pool": {"total_bytes_limit": CACHE_BYTES}}
        self._context = ts.Context(cache)  # tables of contents are read once
        with self._damaged():
            self.meta, _, _ = read_about(self._folder, known)

    def read(self, item: str, path: str, index=(...,)) -> np.ndarray:
        """A part of an array.

        Args:
          item: "params" or "state".
          path: of the array; in the state it begins with "state/".
          index: numbers, slices and arrays of numbers, each for its own dim.

        Raises:
          CheckpointError: if it cannot be read.
        """
        with self._damaged():
            return self._array(item, path).oindex[index].read().result()

    def piece(self, item: str, path: str) -> tuple[int, ...]:
        """The shape of the pieces of an array, which are read as a whole."""
        with self._damaged():
            return tuple(self._array(item, path).chunk_layout.read_chunk.shape)

    def lead(self, item: str, path: str) -> int:
        """The number of first dims, two at most, that no piece has more than one of."""
        with self._damaged():
            chunk = self._array(item, path).chunk_layout.read_chunk.shape
        return next((d for d, n in enumerate(chunk[:2]) if n > 1), min(len(chunk), 2))

    @functools.cache  # noqa: B019, lives as long as this
    def _array(self, item: str, path: str):
        store = {
            "driver": "ocdbt",
            "base": f"file://{self._folder / item}/",
            "path": path.replace("/", ".") + "/",
        }
        spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": False}
        return open_array(spec, open=True, context=self._context).result()

    @contextlib.contextmanager
    def _damaged(self):
        try:
            yield
        except ConfigError:
            raise
        except Exception as e:  # TensorStore and Orbax raise plain ones
            reason = " ".join(str(e).split())[:300]
            raise CheckpointError(f"{self._folder} cannot be read: {reason}") from None


def bytes_read() -> int:
    """The bytes that TensorStore has read from files in this process."""
    found = ts.experimental_collect_matching_metrics(READ)
    return int(sum(v["value"] for metric in found for v in metric["values"]))


def placed(array: np.ndarray, place) -> jax.Array:
    """The array on the devices of a sharding, in the type of `place`."""
    return jax.device_put(array.astype(place.dtype, copy=False), place.sharding)
