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
from moex.config.base import require
from moex.convert.base import Conversion
from moex.data.chat import keep_layout
from moex.data.files import atomic_write
from moex.json_files import dump_json
from moex.model import spec as states
from moex.model.paths import flat_paths
from moex.runs.base import Base, check_no_adapters, has_base
from moex.runs.claim import new_folder, new_run
from moex.runs.directory import Place, RunDir
from moex.runs.keys import check_run
from moex.runs.open import LoadedRun, load_run
from moex.runs.score import score_run
from moex.runs.write import write_run
from moex.sharding import MeshConfig
from moex.train.job import Job, make_job


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
      every layer, operator and group, and what else conversions found.

    Raises:
      ConfigError: for a user's mistake, before anything is computed.
      CheckpointError: if no checkpoint of `source` is intact.
    """
    run, flag = RunDir.of(source), f"--workdir={RunDir.of(target)}"
    cfg = run.config()
    made = RunDir(new_folder(target, flag))
    require(sequences >= 0, "--sequences", sequences, ">= 0")
    folds = all(conversion.of_adapters for conversion in conversions)
    if not folds:
        check_no_adapters(run, f"--to={conversions[-1].kind}")
    report: dict[str, Any] = {"to": conversions[-1].kind, "from": str(run)}
    for conversion in conversions:
        conversion.check()
        report |= dataclasses.asdict(conversion)
        cfg.model = conversion.model(cfg.model)
    report |= {"sequences": sequences, "errors": []}
    cfg.init_from = ""  # the new run begins with its own parameters
    check_run(cfg, to_train=False)
    with new_run(made, flag, say) as hidden:
        old = new = load_run(run, MeshConfig(), warn=say)  # for the job's devices
        job = _job(run, cfg, say)
        for conversion in conversions:
            new, found = _applied(conversion, new, job, say)
            report |= found
        arrays = {"params": new.params, "state": new.state}
        write_run(hidden, cfg, job, job.tx, job.data, arrays)
        if folds:  # it leaves as the family that its base came as
            base = Base.read(run).folder if has_base(run.config()) else run
            if base.imported.is_dir():
                shutil.copytree(base.imported, hidden.imported, dirs_exist_ok=True)
        keep_layout(run.imported, hidden.imported)
    report["step"] = old.step
    sizes = {"params": "", "expert_params": "experts"}
    report |= {
        name: {"before": _size(old.spec, part), "after": _size(job.spec, part)}
        for name, part in sizes.items()
    }
    report["loss"] = _losses(run, made, job, sequences)
    atomic_write(made.conversion, dump_json(report, indent=1) + "\n")
    return report


def _applied(conversion, run: LoadedRun, job: Job, say) -> tuple[LoadedRun, dict]:
    """Apply a conversion: the new model, and what the conversion reports."""
    params, state, found = conversion.arrays(run, job, say)
    cfg = configs.from_dict(configs.to_dict(run.cfg))
    cfg.model = conversion.model(cfg.model)
    spec = states.model_spec(cfg.model)
    new = dataclasses.replace(run, cfg=cfg, spec=spec, params=params, state=state)
    return new, found


def _job(run: RunDir, cfg, say) -> Job:
    """The new run's job here: on the devices that there are, with the old data."""
    cfg = configs.from_dict(configs.to_dict(cfg))
    cfg.mesh = MeshConfig()
    cfg.task.like(cfg, run)
    return make_job(cfg, log=say)


def _size(spec, part="") -> int:
    """Parameters of a model, or of all modules named `part`."""
    leaves = flat_paths(spec.params).items()
    sizes = (leaf.size for path, leaf in leaves if not part or part in path.split("/"))
    return sum(sizes)


def _losses(run: RunDir, new: RunDir, job: Job, sequences: int) -> dict | None:
    """The held-out loss before and after; None without held-out data or sequences."""
    if not sequences or not job.holds_out:
        return None
    before, after = (
        score_run(folder, folder.config(), sequences=sequences) for folder in (run, new)
    )
    score = job.cfg.task.score
    return {"before": before[score], "after": after[score], "tokens": after["tokens"]}


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
        lines.append(
            f"held-out loss, nats per token: {loss['before']:.4f} -> "
            f"{loss['after']:.4f} ({loss['tokens']:,} tokens)"
        )
    return "\n".join(lines)
