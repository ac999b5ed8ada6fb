"""Checkpoints: Orbax writes and reads, checksums say whether the bytes are ours.

Layout: checkpoints/<step>/{params, opt, state, data, meta}, separate items so that
warm starts and exports read `params` alone. Orbax commits a step atomically but
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
    bits = _bits(x).reshape(-1)
    place = jax.lax.iota(jnp.uint32, bits.size)
    weighted = jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.stack([weighted, jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)])


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

    def __init__(self, workdir, *, keep=1, keep_best=0, read_only=False):
        """Opens (and unless `read_only` creates) `workdir/checkpoints`."""
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
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(self.manager.all_steps())

    def save(self, step, train_state, *, data, meta, metrics=None) -> None:
        """Start writing `step`; returns when the arrays are copied off the devices.

        Args:
          step: optimizer steps done.
          train_state: {"params", "opt", "state", "guard"}.
          data: JSON data, the position in the data.
          meta: JSON data; checksums are added.
          metrics: {"nll": float} of held-out data, for keep-best, or None.

        Raises:
          CheckpointError: if this or an earlier save failed.
        """
        items = _items(train_state)
        meta = meta | {"checksums": {k: checksums(v) for k, v in items.items()}}
        args = {k: ocp.args.StandardSave(v) for k, v in items.items()}
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
    return json.loads(path.read_text())
