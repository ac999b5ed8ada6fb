"""`moex convert`: a trained run with other feed-forwards, as a new run.

The new run starts at step 0 with a fresh optimizer and the same data from the start,
so it can be scored, sampled and trained on like any other. A `Conversion`
(`base.py`) says what changes in the model.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any

from moex.config import base as configs
from moex.config.base import ConfigError, require
from moex.convert.base import Conversion
from moex.convert.kinds.subset import Subset
from moex.convert.planned import Planned
from moex.convert.plans import Plan
from moex.convert.source import Source
from moex.convert.store import Store
from moex.data.chat import keep_layout
from moex.data.files import atomic_write
from moex.json_files import dump_json
from moex.model import spec as states
from moex.model.paths import flat_paths
from moex.nn.lowered import weight_sizes
from moex.runs.base import Base, check_no_adapters, has_base
from moex.runs.claim import new_folder, new_run
from moex.runs.directory import Place, RunDir
from moex.runs.keys import check_run
from moex.runs.open import LoadedRun, saved_spec
from moex.runs.score import score_run
from moex.runs.write import write_run
from moex.train.job import Job


def convert_run(
    source: Place,
    target: Place,
    conversions: Sequence[Conversion],
    *,
    sequences: int = 256,
    say=print,
) -> dict:
    """Write the newest checkpoint of a run with other layers to a new run directory.

    Everything that the conversions do not name stays as it is, the state of routers
    too.

    Args:
      target: the new one; must not exist or be empty.
      conversions: at least one; each is applied to what the one before it made.
      sequences: held-out sequences that score the run before and after; 0: none.

    Returns:
      The content of the new `convert.json`: the options, sizes and losses; "errors" of
      every layer, operator and group, and what else conversions found. The loss before
      is None where the run was not read as a whole ("bytes_read").

    Raises:
      ConfigError: for a user's mistake, before anything is computed.
      CheckpointError: if no checkpoint of `source` is intact.
    """
    run, flag = RunDir.of(source), f"--workdir={RunDir.of(target)}"
    cfg, opened = run.config(), Source(run, say)
    made = RunDir(new_folder(target, flag))
    require(sequences >= 0, "--sequences", sequences, ">= 0")
    conversions = _ready(opened, conversions)
    report: dict[str, Any] = {"to": conversions[-1].kind, "from": str(run)}
    for conversion in conversions:
        report |= conversion.options()
        cfg.model = conversion.model(cfg.model)
    report |= {"sequences": sequences, "errors": []}
    cfg.init_from = ""  # the new run begins with its own parameters
    cfg.optim = dataclasses.replace(cfg.optim, prune=None)  # it may have other matrices
    check_run(cfg, to_train=False)
    with new_run(made, flag, say) as hidden:
        job = opened.job(cfg)
        new, found = _converted(conversions, opened, job, say)
        report |= found
        arrays = {"params": new.params, "state": new.state}
        write_run(hidden, cfg, job, job.tx, job.data, arrays)
        if all(conversion.keeps_family for conversion in conversions):
            base = Base.read(run).folder if has_base(run.config()) else run
            if base.imported.is_dir():
                shutil.copytree(base.imported, hidden.imported, dirs_exist_ok=True)
        keep_layout(run.imported, hidden.imported)
        for conversion in conversions:
            conversion.write(hidden)
    report["step"] = new.step
    specs = {"before": saved_spec(run), "after": job.spec}
    sizes = {"params": "", "expert_params": "experts"}
    report |= {
        name: {when: _size(spec, part) for when, spec in specs.items()}
        for name, part in sizes.items()
    }
    known = {} if "bytes_read" in report else {"before": run}
    report["loss"] = _losses(known | {"after": made}, job, sequences)
    atomic_write(made.conversion, dump_json(report, indent=1) + "\n")
    return report


def plan_run(place: Place, conversions: Sequence[Conversion], *, say=print) -> Plan:
    """The plan by which a conversion would change a run; nothing is converted.

    Raises:
      ConfigError: if the conversion has no plan, or for a user's mistake.
    """
    conversion = conversions[-1]
    if len(conversions) > 1 or not isinstance(conversion, Planned):
        raise ConfigError(f"--write-plan: --to={conversion.kind} has no plan.")
    (conversion,) = _ready(Source(RunDir.of(place), say), conversions)
    assert conversion.plan is not None
    return conversion.plan


def store_run(place: Place, conversions: Sequence[Conversion], *, say=print) -> Store:
    """A store of patterns of a run; nothing is converted.

    Raises:
      ConfigError: if the conversion makes no store, or for a user's mistake.
    """
    conversion = conversions[-1]
    if not isinstance(conversion, Subset) or conversion.plan is not None:
        raise ConfigError("--write-store: is for --to=subset with --keep.")
    return conversion.make_store(Source(RunDir.of(place), say))


def _ready(source: Source, conversions: Sequence[Conversion]) -> list:
    """Check conversions, and let them look at the run."""
    if not all(conversion.of_adapters for conversion in conversions):
        check_no_adapters(source.folder, f"--to={conversions[-1].kind}")
    for conversion in conversions:
        conversion.check()
    return [conversion.ready(source) for conversion in conversions]


def _converted(
    conversions: Sequence[Conversion], source: Source, job: Job, say
) -> tuple[LoadedRun, dict]:
    """The new model, on the devices of the job, and what the conversions report."""
    if len(conversions) == 1 and (read := conversions[0].read(source)) is not None:
        return read
    run = source.loaded
    report: dict = {}
    for conversion in conversions:
        run, found = _applied(conversion, run, job, say)
        report |= found
    return run, report


def _applied(conversion, run: LoadedRun, job: Job, say) -> tuple[LoadedRun, dict]:
    """Apply a conversion: the new model, and what the conversion reports."""
    params, state, found = conversion.arrays(run, job, say)
    cfg = configs.from_dict(configs.to_dict(run.cfg))
    cfg.model = conversion.model(cfg.model)
    spec = states.model_spec(cfg.model)
    new = dataclasses.replace(run, cfg=cfg, spec=spec, params=params, state=state)
    return new, found


def _size(spec, part="") -> int:
    """Parameters of a model, or of all modules named `part`; scales are no numbers."""
    sizes = weight_sizes(flat_paths(spec.params)).items()
    return sum(n for path, n in sizes if not part or part in path.split("/"))


def _losses(runs: dict[str, RunDir], job: Job, sequences: int) -> dict | None:
    """The held-out loss of runs by name; None without held-out data or sequences."""
    if not sequences or not job.holds_out:
        return None
    score, found = job.cfg.task.score, dict.fromkeys(("before", "after"))
    for name, run in runs.items():
        scored = score_run(run, run.config(), sequences=sequences)
        found |= {name: scored[score], "tokens": scored["tokens"]}
    return found


def report_text(report: dict, conversions: Sequence[Conversion]) -> str:
    """The report as text for people: lines of each conversion, sizes and losses."""
    lines = [line for c in conversions for line in c.lines(report)]
    for name, sizes in (("experts", "expert_params"), ("model", "params")):
        before, after = report[sizes]["before"], report[sizes]["after"]
        ratio = f" ({after / before:.3f})" if before else ""
        lines.append(f"parameters of the {name}: {before:,} -> {after:,}{ratio}")
    loss = report["loss"]
    if loss is None:
        lines.append("held-out loss: not scored")
    else:
        before = "" if loss["before"] is None else f"{loss['before']:.4f} -> "
        told = f"{before}{loss['after']:.4f} ({loss['tokens']:,} tokens)"
        lines.append(f"held-out loss, nats per token: {told}")
    return "\n".join(lines)
