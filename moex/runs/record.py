"""`checkpoints.json`: which checkpoints a run has saved, with a digest of each.

It is kept next to their folder, so that it tells when they are gone, or are not those
that the run wrote. A digest covers everything in a checkpoint except the arrays: the
position in the data, the step, the scores and the checksums of the arrays.
"""

import json
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from moex.config.base import ConfigError
from moex.data.files import atomic_write
from moex.json_files import digest, field, parse_object, read_object
from moex.runs.directory import RunDir
from moex.runs.environment import read_environment
from moex.runs.lines import last_step


class ChecksumError(ValueError):
    """The bytes on disk are not those written; all processes find the same damage."""


def digest_of(step: int, data: Any, metrics: Any, meta: Any) -> str:
    """The digest of everything in a checkpoint except the arrays."""
    return digest({"step": step, "data": data, "metrics": metrics, "meta": meta})


def read_record(run: RunDir) -> dict[int, str | None] | None:
    """Read `{step: digest}` of the checkpoints at the last save, ascending.

    A digest is None for a checkpoint of moex before version 0.2, which has none.

    Returns:
      None if there is no record: moex before version 0.2 wrote none.

    Raises:
      ConfigError: if the file is damaged.
    """
    file = run.record
    if not file.exists():
        return None
    steps = field(read_object(file), "steps", dict[str, str | None], str(file))
    if not all(step.isdecimal() for step in steps):
        raise ConfigError(f"{file}: steps = {list(steps)}: must be whole numbers.")
    return {int(step): steps[step] for step in sorted(steps, key=int)}


def write_record(run: RunDir, steps: dict[int, str | None]) -> None:
    """Write the record; see `read_record`."""
    text = json.dumps({"steps": {str(s): steps[s] for s in sorted(steps)}}, indent=1)
    atomic_write(run.record, text + "\n")


def read_about(
    folder: pathlib.Path, known: str | None
) -> tuple[dict, dict, str | None]:
    """Read a checkpoint without its arrays, and check that the run wrote it.

    Args:
      folder: the folder of the checkpoint; its name is the step.
      known: its digest by the record; "" if the record lacks the step; None if the
        checkpoint is or may be from before moex 0.2, which wrote no digest.

    Returns:
      (meta, data, its own digest).

    Raises:
      ChecksumError: if anything was changed.
      OSError: if a file cannot be read.
    """
    step = int(folder.name)
    stored, data = (_json(folder / n / "metadata") for n in ("meta", "data"))
    scores = folder / "metrics" / "metrics"
    metrics = _json(scores) if scores.exists() else None
    meta, own = stored.get("covered", stored), stored.get("digest")
    if not isinstance(meta, dict) or not isinstance(meta.get("checksums"), dict):
        raise ChecksumError("meta has no checksums")
    if meta.get("step", step) != step:
        raise ChecksumError(f"the folder of step {step} holds step {meta['step']}")
    if known is None and own is None and "covered" not in stored:
        has_sum = "opt" in meta["checksums"]
        if not has_sum and (step > 0 or (folder / "opt").exists()):
            raise ChecksumError("meta has no checksum of opt")
    elif own != digest_of(step, data, metrics, meta):
        raise ChecksumError("its position in the data, scores or meta were changed")
    elif known and own != known:
        raise ChecksumError("it is not the checkpoint that this run saved")
    return meta, data, own


def why_unlisted(folder: pathlib.Path) -> str | None:
    """The reason why Orbax cannot list a checkpoint; None if it can."""
    try:
        # Orbax reads both files of every checkpoint when it opens their folder.
        names = ocp.path.step.standard_name_format()
        _ = names.find_step(folder.parent, int(folder.name)).commit_timestamp
        scores = folder / "metrics" / "metrics"
        if scores.exists():
            _json(scores)
    except Exception as e:  # Orbax raises plain Exceptions
        return " ".join(str(e).split())[:300] or type(e).__name__
    return None


def _json(file: pathlib.Path) -> dict:
    """Read a JSON object that Orbax wrote; a `ChecksumError` if it is none."""
    try:
        return parse_object(file.read_bytes(), file.name, nan=True)
    except ConfigError as e:
        raise ChecksumError(f"{file.parent.name}/{e}") from None


def check_may_begin(run: RunDir, every: int) -> None:
    """Check that a run without checkpoints never had any, so that nothing is lost.

    Raises:
      ConfigError: if it had some: training from step 0 would delete its log.
    """
    recorded, trained = read_record(run), last_step(run.metrics)
    if recorded:
        why = f"it saved step {max(recorded)}"
    elif recorded is None and trained > 2 * every > 0:
        why = f"it trained {trained} steps and saved one in {every}"
    elif (step := _resumed_at(run)) > 0:
        why = f"it went on from step {step} once"
    elif not run.environment.exists() and not trained:
        why = "it was imported or converted, and began with one"
    else:
        return
    where = f" (damaged ones are in {run.corrupt})" if run.corrupt.is_dir() else ""
    raise ConfigError(
        f"{run}: all checkpoints of this run are gone, and {why}{where}. Put "
        f"{run.checkpoints} back; to train from the beginning, give another "
        "--workdir or delete this one."
    )


def _resumed_at(run: RunDir) -> int:
    """The last step that a start of the run went on from."""
    try:
        starts = read_environment(run)
    except ConfigError:  # a damaged file is replaced at the next start
        return 0
    return max((start.get("step", 0) for start in starts), default=0)
