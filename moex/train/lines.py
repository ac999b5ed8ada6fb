"""The values and texts of a log line: of a step, of an evaluation, of the end."""

import math
import pathlib

import jax

from moex import hints
from moex.adapters.figures import gate_summary
from moex.config.schedule import is_always_zero
from moex.model import accounting
from moex.model.figures import layer_rows
from moex.model.layers import shown
from moex.process import memory_bytes
from moex.runs import sweep
from moex.runs.consumed import Consumed
from moex.runs.directory import RunDir
from moex.runs.keys import COEFFICIENTS
from moex.runs.score import domain_losses
from moex.terminal import clock, wrapped
from moex.train.job import Job


def step_values(job: Job, metrics, consumed: Consumed) -> dict:
    """The values of a step for metrics.jsonl, except for routing and speed."""
    cfg, domains = job.cfg, job.data.domains
    values = {
        "loss": float(metrics["loss"]),
        **{name: float(metrics[name]) for name, *_ in cfg.task.FIGURES},
        "grad_norm": float(metrics["grad_norm"]),
        "lr": float(metrics["lr"]),
        "skipped": int(metrics["skipped"]),
        "tokens_seen": consumed.tokens,
        "targets_seen": consumed.targets,
        "padding_frac": int(metrics["padding"]) / (cfg.batch_size * cfg.seq_len),
    }
    for group, norm in metrics["grad_norms"].items():
        values[f"grad_norm/{group}"] = float(norm)
    for name, value in metrics["weighted"].items():
        own = name not in COEFFICIENTS  # of a router, with its own coefficient
        if own or not is_always_zero(getattr(cfg.loss, name)):
            values[f"loss/{name}"] = float(value)
    if len(domains) > 1:
        values |= by_domain(cfg.task, domain_losses(domains, metrics))
    return values


def by_domain(task, losses: dict[str, float]) -> dict[str, float]:
    """The losses of domains by the names that they have in metrics.jsonl."""
    return {f"{task.score}/{name}": loss for name, loss in losses.items()}


def gate_values(matrices: dict) -> dict[str, float]:
    """The values of a line of metrics.jsonl about the gates inside of adapters."""
    return {f"adapters/{k}": value for k, value in gate_summary(matrices).items()}


def speed(
    job: Job, cost: accounting.Cost, metrics, step_seconds: float, targets: float
) -> dict:
    """The speed of training: tokens and learned targets per second, and FLOPs."""
    tokens = job.cfg.batch_size * job.cfg.seq_len
    flops = cost.train_flops_at(metrics["layers"])
    values = {
        "perf/tokens_per_s": tokens / step_seconds,
        "perf/targets_per_s": targets / step_seconds,
        "perf/train_flops_per_token": flops,
        "perf/memory_gib": memory_bytes() / 2**30,
    }
    peak = accounting.device_peak_flops()
    if peak is not None:
        rate = tokens / step_seconds * flops
        values["perf/mfu"] = rate / (peak * jax.device_count())
        share = 1 - int(metrics["padding"]) / tokens
        values["perf/mfu_without_padding"] = share * values["perf/mfu"]
    return values


def eval_values(task, result: dict) -> dict:
    """The values of an evaluation for metrics.jsonl, except for routing."""
    names = (*(figure.name for figure in task.FIGURES), *task.COUNTS)
    return {k: result[k] for k in names} | by_domain(task, result["domains"])


def eval_line(task, result: dict) -> str:
    """The figures of an evaluation as text."""
    said = [
        f"{result[name]:.4f} {unit}"
        for name, _, unit, _ in task.FIGURES
        if math.isfinite(result[name])
    ]
    return f"{', '.join(said) or 'no target'} ({result['tokens']:,} tokens)"


def step_line(
    step: int, total: int, values: dict, brief: str, seconds_left: float, columns=80
) -> str:
    """Format everything about a step; `brief` comes from the task.

    It is one line, and a second one for the fields that do not fit into `columns`.
    """
    parts = [
        f"step {step}/{total}",
        f"loss {values['loss']:.4f}",
        brief,
        f"grad {values['grad_norm']:.3g}",
        f"lr {values['lr']:.2e}",
        f"{values['perf/tokens_per_s']:,.0f} tok/s",
        f"mem {values['perf/memory_gib']:.2f} GiB",
    ]
    if "perf/mfu" in values:
        parts.append(f"mfu {100 * values['perf/mfu']:.1f}%")
    if "moe/max_violation" in values:
        parts.append(f"imbalance {values['moe/max_violation']:.2f}")
    if values.get("moe/experts_per_token_std", 0) > 0:
        parts.append(f"experts {values['moe/experts_per_token']:.2f}")
    if values.get("moe/dropped_frac", 0) > 0:
        parts.append(f"dropped {100 * values['moe/dropped_frac']:.1f}%")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    parts.append(f"eta {clock(seconds_left)}")
    return wrapped(parts, columns)


def load_lines(model, layers: dict) -> str:
    """The expert load of each MoE layer as text: each expert's share of the slots."""
    lines = ["expert load on held-out data (share of slots, per MoE layer):"]
    for label, frac in layer_rows(model, layers, "load_frac_E"):
        shares = " ".join(f"{100 * f:4.1f}" for f in frac[:16])
        more = f" ... ({len(frac)} experts)" if len(frac) > 16 else ""
        lines.append(f"  layer {shown(label):>3} | {shares}{more} %")
    return "\n".join(lines)


def told_figures(figures: dict[str, float]) -> str:
    """The figures of a run that is complete, as the part of a sentence."""
    told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    return told and f" ({told})"


def told_lost(rows: int) -> str:
    """The part of a message about rows that found no room, if there are any."""
    if rows == 0:
        return ""
    return (
        f", {rows} rows found no room on their way to the experts: raise "
        "config.mesh.exchange_buffer"
    )


def last_lines(cfg, run: RunDir, seconds: float) -> str:
    """The end of a training as text: its time, and how to look at the run."""
    look = hints.command("moex", "report", run)
    if cfg.log.tensorboard:
        look = (
            f"{hints.command('tensorboard', '--logdir', board_folder(run))}\n"
            "              Custom Scalars has every chart with its title and unit"
        )
    lines = [
        f"training time {clock(seconds)}; run directory {run}",
        f"look at it:   {look}",
        *cfg.task.use_lines(cfg, run),
    ]
    return "\n".join(lines)


def board_folder(run: RunDir) -> pathlib.Path:
    """The folder to open with TensorBoard, which names runs by the folders in it.

    It is the one that the run lies in, unless that has other things too, which may be
    large.
    """
    around = run.path.absolute().parent
    beside = [p for p in around.iterdir() if p.is_dir() and p.name[0] != "."]
    if all(RunDir(p).is_run() or (p / sweep.FILE).is_file() for p in beside):
        return run.path.parent if run.path.name else around
    return run.tensorboard
