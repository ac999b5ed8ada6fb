"""Checkpoints: Orbax writes and reads them; checksums tell whether bytes changed.

Layout: checkpoints/<step>/{params, opt, state, data, meta}, separate items so that
warm starts and exports read `params` alone. Step 0 of a run that was imported or
converted has no `opt`: it is zeros. Orbax commits a step atomically but
verifies nothing on restore, so `meta` carries a checksum of every array, computed on
the devices from the global arrays: the same for any mesh and any number of hosts. A
digest covers those checksums and the rest. The run's own record has the digest too
(`record.py`), so that no checkpoint can pass as an old one that had no digest.
"""

import contextlib
import logging
import math
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from moex.config.base import ConfigError, RunError, require
from moex.model.paths import expert_axis
from moex.progress import phase
from moex.runs.checksums import checksums
from moex.runs.directory import Place, RunDir
from moex.runs.record import (
    ChecksumError,
    digest_of,
    read_about,
    read_record,
    why_unlisted,
    write_record,
)

ARRAY_ITEMS = ("params", "opt", "state")
PIECE_BYTES = 1 << 16  # an expert's part of an array from which it is a piece of a file
HOST_BYTES = 1 << 28  # a small `host_bytes`, for jobs that must save host memory


class CheckpointError(RunError):
    """A checkpoint could not be written or none could be read."""


class _Hold(policies.PreservationPolicy):
    """Keeps all existing checkpoints while `active`."""

    active = False

    def should_preserve(self, checkpoints, *, context):
        return [self.active] * len(checkpoints)


@contextlib.contextmanager
def _unlogged(begin: str):
    """Keep log lines of libraries that begin so from people, in scripts too."""
    logger = logging.getLogger("absl")

    def other(record) -> bool:
        return not record.getMessage().startswith(begin)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


class Checkpointer:
    """The checkpoints of one run directory."""

    def __init__(
        self,
        place: Place,
        *,
        keep=1,
        keep_best=0,
        score="nll",
        read_only=False,
        host_bytes=None,
    ):
        """Opens (and unless `read_only` creates) the checkpoints of a run directory.

        Args:
          keep, keep_best: how many of the newest and of the best checkpoints are kept.
          score: the figure to rank by; the lowest is the best.
          host_bytes: about how many bytes of arrays are on the host at a time (at least
            one array). `save` then reads them until `wait` returns: donate none of them
            earlier. None: all arrays are copied to the host at once.
        """
        self.run = RunDir(RunDir.of(place).path.absolute())
        self.directory = self.run.checkpoints
        self.quarantine = self.run.corrupt
        self.read_only, self._ranks = read_only, keep_best > 0
        self._rank = operator.itemgetter(score)
        self._record = read_record(self.run)
        self._digests = dict(self._record or {})
        self._saving: int | None = None
        if self._record is not None and not read_only:
            self._forget_unfinished(self._record)
        self._skipped: set[int] = set()  # steps saved after an update was skipped
        self._unlisted = {} if read_only else self._set_unlisted_aside()
        self._hold = _Hold()
        keepers = [policies.LatestN(keep), self._hold]
        if keep_best:
            how = {"get_metric_fn": self._rank, "reverse": True, "n": keep_best}
            best = policies.BestN(**how, keep_checkpoints_without_metrics=False)
            keepers.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keepers),
            # Without a function that ranks them, metrics stay in memory.
            best_fn=self._rank if keep_best else None,
            best_mode="min",
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            cleanup_tmp_directories=not read_only,
            lightweight_initialize=read_only,  # only a writer needs the scores
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self.write_record
            ),
        )
        handler, self._save_args = None, ocp.args.StandardSave
        host_gb: Any = host_bytes and host_bytes / 1e9  # Orbax takes fractions too
        if host_gb is not None and read_only:
            handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=host_gb)
        elif host_gb is not None:
            handler = ocp.PyTreeCheckpointHandler(
                save_device_host_concurrent_gb=host_gb
            )
            self._save_args = ocp.args.PyTreeSave
        with _unlogged("Given directory is read only"):  # we asked for it
            self.manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers=handler
                and dict.fromkeys(ARRAY_ITEMS, handler)
                | {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")},
            )

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return sorted(self.manager.all_steps())

    def save(
        self, step, train_state, *, data, meta, metrics=None, skipped_in_row=0
    ) -> None:
        """Start writing `step`; without `host_bytes`, return once the arrays are copied
        off the devices.

        Args:
          train_state: {"params", "opt", "state", "guard"}; without "opt" it is restored
            as zeros.
          data: JSON data, the position in the data.
          meta: JSON data; checksums are added.
          metrics: {score: float} of held-out data, for keep-best, or None.
          skipped_in_row: updates that were skipped right before. If there are any, the
            checkpoint is not ranked and no other checkpoint is deleted for it.

        Raises:
          CheckpointError: if this or an earlier save failed.
        """
        items = _items(train_state)
        self.wait()  # Orbax waits too late: its thread reads fields that we set below
        meta = meta | {"checksums": {k: checksums(v) for k, v in items.items()}}
        meta |= {"skipped_in_row": skipped_in_row}
        if metrics is not None and not math.isfinite(self._rank(metrics)):
            metrics = None  # Orbax would rank NaN as the best
        if skipped_in_row:
            metrics = None
            self._skipped.add(step)
        written = metrics if self._ranks else None
        self._digests[step] = digest_of(step, data, written, meta)
        meta = {"digest": self._digests[step], "covered": meta}
        pieces = {"params": {"save_args": _pieces(items["params"])}}
        args = {k: self._save_args(v, **pieces.get(k, {})) for k, v in items.items()}
        args |= {"data": ocp.args.JsonSave(data), "meta": ocp.args.JsonSave(meta)}
        self._saving, self._hold.active = step, skipped_in_row > 0
        try:
            with phase(f"saving step {step}"):
                self.manager.save(
                    step, args=ocp.args.Composite(**args), metrics=metrics, force=True
                )
        except Exception as e:
            raise self._failed(f"saving step {step}", e) from e

    def write_record(self) -> None:
        """Record the existing checkpoints, and the one that is being written.

        Orbax calls this right before it gives the new one its final name.
        """
        if jax.process_index() == 0:
            steps = self.run.saved_steps()
            if self._saving is not None:
                steps.append(self._saving)
            write_record(self.run, {s: self._digests.get(s) for s in steps})

    def _forget_unfinished(self, record: dict) -> None:
        """Remove steps from the record that a kill kept from getting a final name."""
        names = [p.name for p in self.directory.glob("*.orbax-checkpoint-tmp*")]
        steps = {int(n) for n in (n.split(".")[0] for n in names) if n.isdecimal()}
        for step in steps - {*self.run.saved_steps()}:
            if record.pop(step, None) is not None:
                self.write_record()

    def _set_unlisted_aside(self) -> dict[int, str]:
        """Set aside the steps that Orbax cannot list, as it would then open no step at
        all. Return `{step: reason}`.
        """
        steps = self.run.saved_steps()
        found = {s: why_unlisted(self.directory / str(s)) for s in steps}
        bad = {step: reason for step, reason in found.items() if reason}
        _wait_for_all("moex: checkpoints are listed")
        if jax.process_index() == 0:
            for step in bad:
                self._move(step)
        _wait_for_all("moex: unlisted steps are set aside")
        return bad

    def last_good(self, before: float = math.inf) -> int | None:
        """The newest step below `before` that was saved after an update was taken."""
        good = (s for s in self.run.saved_steps() if s not in self._skipped)
        return max((s for s in good if s < before), default=None)

    def wait(self) -> None:
        """Block until all saves are committed.

        Raises:
          CheckpointError: if one failed.
        """
        try:
            with phase("writing the checkpoint"):
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
        good = self.last_good()
        kept = "none" if good is None else f"step {good}"
        return CheckpointError(
            f"{doing} under {self.directory} failed: {reason}. "
            f"Last good checkpoint: {kept}."
        )

    def close(self) -> None:
        """Release Orbax's threads; call `wait` first."""
        self.manager.close()

    def restore(
        self, abstract, *, items=ARRAY_ITEMS, warn=print, step=None, check=None
    ):
        """Read the newest step whose bytes are intact, or the one that is asked for.

        A damaged step is reported, moved to `corrupt/` (never deleted), and the step
        before it is tried.

        Args:
          abstract: train state of `ShapeDtypeStruct`s with shardings; only the parts
            in `items` are read.
          warn: called with one line per damaged step.
          step: this one and no other; None: the newest.
          check: called as `check(step, meta)` before arrays are read; raises
            `ConfigError` if the checkpoint is of another model.

        Returns:
          (step, arrays, data, meta); None if the run has no checkpoint.

        Raises:
          ConfigError: if there is no checkpoint of `step`, or it is of another model.
          CheckpointError: if there are checkpoints but none is intact.
        """
        steps = self.steps()
        if step is not None:
            there = ", ".join(map(str, steps))
            require(step in steps, "--step", step, f"one of the checkpoints: {there}")
            steps = [step]
        else:
            for bad, reason in self._unlisted.items():
                self._warn_damaged(bad, reason, warn)
            self._warn_of_gone(steps, warn)
            if not self.read_only:
                self._look_over(steps, abstract, warn)
        for step in reversed(steps):
            try:
                with phase(f"reading the checkpoint of step {step}"):
                    found = step, *self._restore_step(step, abstract, items, check)
            except (ConfigError, jax.errors.JaxRuntimeError):
                raise  # neither a wrong config nor too little memory is damage
            except Exception as e:  # Orbax and TensorStore raise plain Exceptions
                self._damaged(step, e, warn)
            else:
                if not self.read_only:
                    self.write_record()
                return found
        if steps:
            damaged = ", ".join(map(str, steps))
            raise CheckpointError(
                f"no intact checkpoint under {self.directory} (damaged: {damaged})"
            )
        return None

    def _look_over(self, steps: list[int], abstract, warn) -> None:
        """Check the metadata of all steps before a run goes on; note steps after skips.

        Removes damaged steps from `steps`, except for the newest, which is read next.
        """
        for step in list(steps):
            try:
                meta, _ = self._about(step)
                skipped = meta.get("skipped_in_row")
                if skipped is None:  # moex before 0.2 had it in the guard alone
                    skipped = self._guard(step, abstract)["skipped_in_row"]
                if skipped:
                    self._skipped.add(step)
            except Exception as e:
                if step != steps[-1]:
                    self._damaged(step, e, warn)
                    steps.remove(step)

    def _warn_of_gone(self, steps: list[int], warn) -> None:
        newest = max(self._record or {}, default=-1)
        moved = any(self.quarantine.glob(f"{newest}*"))
        if steps and newest > steps[-1] and not moved:
            warn(
                f"warning: the checkpoint of step {newest}, which this run saved, is "
                f"gone; the newest is that of step {steps[-1]}"
            )

    def _guard(self, step: int, abstract) -> dict:
        """The update guard in a checkpoint; `state` is the smallest of its items."""
        wanted = ocp.args.StandardRestore(_items(abstract)["state"])
        restored = self.manager.restore(step, args=ocp.args.Composite(state=wanted))
        return restored["state"]["guard"]

    def _damaged(self, step: int, error: Exception, warn) -> None:
        """Report a step that cannot be read and set it aside."""
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, PermissionError) or "PERMISSION_DENIED" in reason:
            raise CheckpointError(f"checkpoint {step} may not be read: {reason}")
        if jax.process_count() > 1 and not isinstance(error, ChecksumError):
            self._give_up(step, reason)
        self._warn_damaged(step, reason, warn)
        self._set_aside(step)

    def _warn_damaged(self, step: int, reason: str, warn) -> None:
        done = "passed over" if self.read_only else "set aside"
        warn(f"warning: checkpoint {step} is damaged and {done}: {reason}")

    def _about(self, step: int) -> tuple[dict, dict]:
        """Read `meta` and `data` of a step; see `record.read_about`."""
        # None: the run is from before moex 0.2, without digests. "": not recorded yet.
        known = None if self._record is None else self._record.get(step, "")
        meta, data, self._digests[step] = read_about(self.directory / str(step), known)
        return meta, data

    def _restore_step(self, step, abstract, items=ARRAY_ITEMS, check=None):
        wanted = {k: v for k, v in _items(abstract).items() if k in items}
        meta, data = self._about(step)
        if check is not None:
            check(step, meta)
        fresh = {}
        if "opt" in wanted and "opt" not in meta["checksums"]:
            fresh["opt"] = _zeros(wanted.pop("opt"))
        for name, tree in wanted.items():
            _check_names(step, name, tree, meta)
        args = {k: ocp.args.StandardRestore(v) for k, v in wanted.items()}
        arrays = dict(self.manager.restore(step, args=ocp.args.Composite(**args)))
        for name, tree in arrays.items():
            expected = meta["checksums"][name]
            found = checksums(tree)
            bad = [k for k in found if found[k] != expected.get(k)]
            if bad or len(found) != len(expected):
                raise ChecksumError(f"checksum of {name}{(bad or ['?'])[0]} differs")
        if "state" in arrays:
            arrays |= arrays["state"]
        arrays |= fresh
        return arrays, data, meta

    def _set_aside(self, step):
        """Move a step to `corrupt/`; all processes of a job must call this together."""
        if self.read_only:
            return
        if jax.process_index() == 0:
            self._move(step)
        _wait_for_all(f"moex: step {step} is set aside")
        self.manager.reload()

    def _give_up(self, step, reason):
        """Raise the error of one process of several that could not read a step.

        The others may have read it and wait for this one inside Orbax, so the job ends;
        the next start takes the step before.
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


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _zeros(abstract):
    """Make zeros of the shapes and shardings of a tree of `ShapeDtypeStruct`s."""

    at = jax.tree.map(lambda a: a.sharding, abstract)
    zeros = partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype), abstract)
    return jax.jit(zeros, out_shardings=at)()


def _items(train_state) -> dict:
    """The Orbax items of a train state; `state` holds the guard too."""
    items = {k: train_state[k] for k in ("params", "opt") if k in train_state}
    if "state" in train_state:
        items["state"] = {k: train_state[k] for k in ("state", "guard")}
    return items


def _pieces(tree):
    """How arrays are cut in the files: `rows.py` reads large experts one by one."""

    def own(path, array):
        names = [str(getattr(key, "key", key)) for key in path]
        axis = expert_axis(names[-1])
        if axis is None or "experts" not in names:
            return ocp.SaveArgs()
        axes = tuple(range(array.ndim + axis + 1))  # copies of the layer too
        size = math.prod(array.shape[len(axes) :]) * array.dtype.itemsize
        return ocp.SaveArgs(shard_axes=axes if size >= PIECE_BYTES else ())

    return jax.tree_util.tree_map_with_path(own, tree)


def _check_names(step: int, name: str, tree, meta: dict) -> None:
    """Check that a checkpoint has the arrays of an item that the config asks for."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    wanted = {jax.tree_util.keystr(path) for path, _ in leaves}
    there = set(meta["checksums"][name])
    if wanted == there or "skipped_in_row" not in meta:
        return
    array = min(wanted ^ there)
    has, lacks = "config", "checkpoint"
    if array in there:
        has, lacks = lacks, has
    raise ConfigError(
        f"config.{'optim' if name == 'opt' else 'model'} does not match the checkpoint "
        f"of step {step}: the {has} has an array {name}{array}, the {lacks} has none."
    )
