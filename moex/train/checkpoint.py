"""Checkpoints: Orbax writes and reads, checksums say whether the bytes are ours.

Layout: checkpoints/<step>/{params, opt, state, data, meta}, separate items so that
warm starts and exports read `params` alone. Step 0 of a run that was imported or
converted has no `opt`: it is zeros. Orbax commits a step atomically but
verifies nothing on restore, so `meta` carries a checksum of every array, computed on
the devices from the global arrays: the same for any mesh and any number of hosts.
"""

import contextlib
import json
import logging
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from moex.config import require

ARRAY_ITEMS = ("params", "opt", "state")
HOST_BYTES = 1 << 28  # of arrays that are on the host where few should be


class ChecksumError(ValueError):
    """Bytes were read that were not written; all processes find the same ones."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or none could be read."""


def _bits(x) -> jax.Array:
    """The bit pattern of an array as uint32, same shape."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _checksum(x) -> jax.Array:
    """uint32[2] of the bits and places of all elements.

    Sums of integers do not depend on order or sharding. The first sum weighs each
    element by an odd number, so that changing any single element always shows; the
    second mixes value and place, so that changes cannot cancel by design.
    """
    bits = _bits(x)
    # Not of a flat copy, which each device would get whole.
    place = jnp.zeros((), jnp.uint32)
    for dim in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[dim + 1 :]) % 2**32)
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        place = place + along * stride
    weighted = bits * (2 * place + 1)
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    # Both sums in one reduction: XLA then keeps none of the above in memory.
    sums = jax.lax.reduce(
        (weighted, mixed ^ (mixed >> 16)),
        (jnp.uint32(0), jnp.uint32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(x.ndim)),
    )
    return jnp.stack(sums)


@jax.jit
def _checksums(tree):
    return jax.tree.map(_checksum, tree)


def checksums(tree) -> dict[str, str]:
    """`{path: 16 hex digits}` of every array of a tree, independent of sharding."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))
    return {
        jax.tree_util.keystr(path): "".join(f"{int(v):08x}" for v in np.asarray(pair))
        for path, pair in leaves
    }


class Checkpointer:
    """The checkpoints of one run directory."""

    def __init__(
        self, workdir, *, keep=1, keep_best=0, read_only=False, host_bytes=None
    ):
        """Opens (and unless `read_only` creates) `workdir/checkpoints`.

        Args:
          workdir: run directory.
          keep, keep_best: checkpoints that are kept: newest, and best.
          read_only: nothing is written or moved.
          host_bytes: about as many bytes of arrays are on the host at a time, or one
            array; `save` then reads them until `wait` returns, so that they may not be
            donated. None: all of them, in a copy.
        """
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self.quarantine = self.directory.parent / "corrupt"
        self.read_only = read_only
        keepers = [policies.LatestN(keep)]
        if keep_best:
            keepers.append(
                policies.BestN(
                    get_metric_fn=_nll,
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keepers),
            best_fn=_nll if keep_best else None,  # without it metrics stay in memory
            best_mode="min",
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        handler, self._save_args = None, ocp.args.StandardSave
        if host_bytes is not None and read_only:
            handler = ocp.StandardCheckpointHandler(
                restore_concurrent_gb=host_bytes / 1e9  # type: ignore[arg-type]
            )
        elif host_bytes is not None:
            handler = ocp.PyTreeCheckpointHandler(
                save_device_host_concurrent_gb=host_bytes / 1e9  # type: ignore[arg-type]
            )
            self._save_args = ocp.args.PyTreeSave
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers=handler
            and dict.fromkeys(ARRAY_ITEMS, handler)
            | {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")},
        )

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(self.manager.all_steps())

    def save(self, step, train_state, *, data, meta, metrics=None) -> None:
        """Start writing `step`; returns when the arrays are copied off the devices
        (without `host_bytes`).

        Args:
          step: optimizer steps done.
          train_state: {"params", "opt", "state", "guard"}; without "opt" it is restored
            as zeros.
          data: JSON data, the position in the data.
          meta: JSON data; checksums are added.
          metrics: {"nll": float} of held-out data, for keep-best, or None.

        Raises:
          CheckpointError: if this or an earlier save failed.
        """
        items = _items(train_state)
        meta = meta | {"checksums": {k: checksums(v) for k, v in items.items()}}
        args = {k: self._save_args(v) for k, v in items.items()}
        args |= {"data": ocp.args.JsonSave(data), "meta": ocp.args.JsonSave(meta)}
        if metrics is not None and not math.isfinite(metrics["nll"]):
            metrics = None  # Orbax would rank NaN as the best
        try:
            self.manager.save(
                step, args=ocp.args.Composite(**args), metrics=metrics, force=True
            )
        except Exception as e:
            raise self._failed(f"saving step {step}", e) from e

    def wait(self) -> None:
        """Block until all saves are committed.

        Raises:
          CheckpointError: if one failed.
        """
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as e:
            raise self._failed("writing a checkpoint", e) from e

    def _failed(self, doing, error) -> CheckpointError:
        # The other arrays of the save fail too, and nobody awaits them: asyncio would
        # print a traceback for each when they are collected, after our own line.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        reason = " ".join(str(error).split())
        if len(reason) > 300:  # the cause, such as a full disk, is at the end
            reason = f"{reason[:100]} ... {reason[-200:]}"
        steps = [p.name for p in self.directory.glob("*") if p.name.isdigit()]
        kept = f"step {max(steps, key=int)}" if steps else "none"
        return CheckpointError(
            f"{doing} under {self.directory} failed: {reason}. "
            f"Last good checkpoint: {kept}."
        )

    def close(self) -> None:
        """Release Orbax's threads; call `wait` first."""
        self.manager.close()

    def read_meta(self, step) -> dict:
        """The `meta` and `data` of a step."""
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                meta=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()
            ),
        )
        return {"meta": restored["meta"], "data": restored["data"]}

    def restore(self, abstract, *, items=ARRAY_ITEMS, warn=print, step=None):
        """The newest step whose bytes are intact, or the one that is asked for.

        A damaged step is reported, moved to `corrupt/` (never deleted), and the step
        before it is tried.

        Args:
          abstract: train state of `ShapeDtypeStruct`s with shardings; only the parts
            in `items` are read.
          items: which of `ARRAY_ITEMS`.
          warn: called with one line per damaged step.
          step: this one and no other; None: the newest.

        Returns:
          (step, arrays, data, meta); None if the run has no checkpoint.

        Raises:
          ConfigError: if there is no checkpoint of `step`.
          CheckpointError: if there are checkpoints but none is intact.
        """
        steps = self.steps()
        if step is not None:
            there = ", ".join(map(str, steps))
            require(step in steps, "--step", step, f"one of the checkpoints: {there}")
            steps = [step]
        for step in reversed(steps):
            try:
                return (step, *self._restore_step(step, abstract, items))
            except jax.errors.JaxRuntimeError:
                raise  # out of memory is no damage
            except Exception as e:  # Orbax and TensorStore raise plain Exceptions
                reason = " ".join(str(e).split())[:300]
                if jax.process_count() > 1 and not isinstance(e, ChecksumError):
                    self._give_up(step, reason)
                warn(f"warning: checkpoint {step} is damaged and set aside: {reason}")
                self._set_aside(step)
        if steps:
            raise CheckpointError(
                f"no intact checkpoint under {self.directory} (damaged: {steps})"
            )
        return None

    def _restore_step(self, step, abstract, items):
        wanted = {k: v for k, v in _items(abstract).items() if k in items}
        about = self.read_meta(step)
        fresh = {}
        if "opt" in wanted and "opt" not in about["meta"]["checksums"]:
            fresh["opt"] = _zeros(wanted.pop("opt"))
        args = {k: ocp.args.StandardRestore(v) for k, v in wanted.items()}
        arrays = dict(self.manager.restore(step, args=ocp.args.Composite(**args)))
        for name, tree in arrays.items():
            expected = about["meta"]["checksums"][name]
            found = checksums(tree)
            bad = [k for k in found if found[k] != expected.get(k)]
            if bad or len(found) != len(expected):
                raise ChecksumError(f"checksum of {name}{(bad or ['?'])[0]} differs")
        if "state" in arrays:
            arrays |= arrays["state"]
        arrays |= fresh
        return arrays, about["data"], about["meta"]

    def _set_aside(self, step):
        """Move a step to `corrupt/`; with several processes all come here at once."""
        if self.read_only:
            return
        if jax.process_index() == 0:
            self._move(step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"moex: step {step} is set aside")
        self.manager.reload()

    def _give_up(self, step, reason):
        """One process of several could not read a step: perhaps it alone.

        The others may wait for it inside Orbax, so the job ends; the next start takes
        the step before.
        """
        done = "look at the disk, or move the step away"
        if not self.read_only:
            self._move(step)
            done = "it is set aside; the same command takes the one before it"
        raise CheckpointError(
            f"checkpoint {step} under {self.directory} cannot be read: {reason}; {done}"
        )

    def _move(self, step):
        self.quarantine.mkdir(exist_ok=True)
        target = self.quarantine / str(step)
        for n in range(1, 1000):
            if not target.exists():
                break
            target = self.quarantine / f"{step}.{n}"
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            (self.directory / str(step)).rename(target)


def _zeros(abstract):
    """Arrays of zeros in the shapes and places of a tree of `ShapeDtypeStruct`s."""

    def make():
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)

    return jax.jit(make, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))()


def _nll(metrics) -> float:
    return metrics["nll"]


def _items(train_state) -> dict:
    """Orbax items of a train state; the guard travels with the model's state."""
    items = {k: train_state[k] for k in ("params", "opt") if k in train_state}
    if "state" in train_state:
        items["state"] = {k: train_state[k] for k in ("state", "guard")}
    return items


def read_json(path: pathlib.Path):
    """A JSON file as Python data."""
    return json.loads(path.read_text(encoding="utf-8"))
