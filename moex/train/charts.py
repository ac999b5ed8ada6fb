"""The names of TensorBoard's series, and the charts of its page Custom Scalars.

TensorBoard sorts groups of series by name and opens the first two. So `basics` has the
losses and the learning rate, and `moe` the balance of the MoE layers; the other groups
come after them. Counts, and numbers that come once in a run, have no series; they are
in metrics.jsonl.
"""

from moex.adapters import figures as gates
from moex.model.layers import routers
from moex.moe import metrics
from moex.tasks.base import Task

HELD_OUT = "_held_out"  # ends the series of held-out data
EVALUATED = "max_violation"  # the figure of MoE layers that evaluations have
MEAN, WORST = "_mean", "_worst"  # over the MoE layers

CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "training": {
        "loss with the weighted losses of routers": ("train/loss_in_all$",),
        "weighted losses": ("train/weighted_loss/.*",),
        "gradient norm": ("train/grad_norm$",),
        "gradient norm by group of parameters": ("train/grad_norm/.*",),
        "skipped updates": ("train/skipped$",),
    },
    "speed": {
        "tokens per second": ("perf/(tokens|targets)_per_s$",),
        "model FLOPs utilisation": ("perf/mfu(_without_padding)?$",),
        "padding, share of the tokens": ("train/padding_frac$",),
        "seconds of a step": ("perf/(step|data|dispatch|wait|other)_s$",),
        "memory, GiB": ("perf/memory_gib$",),
    },
}


def series(task: Task, kind: str, name: str) -> str | None:
    """The series of a figure of a line of metrics.jsonl; None if it has none."""
    if kind not in ("train", "eval") or name in task.COUNTS:
        return None
    held_out = HELD_OUT if kind == "eval" else ""
    start, _, rest = name.partition("/")
    if start == "moe":
        if rest.endswith("_worst_layer"):  # a label
            return None
        figure = rest.removesuffix(WORST)
        return of_layers(figure) + (MEAN if figure == rest else WORST)
    if start == "adapters":
        figure = rest.removesuffix(WORST)
        return f"{name}{MEAN if figure == rest else ''}{held_out}"
    if held_out and name == EVALUATED:
        return of_layers(name) + MEAN + held_out
    if name == task.score:
        return f"basics/loss{held_out}"
    if start in {figure.name for figure in task.FIGURES}:
        return f"scores/{start}{held_out}" + (f"/{rest}" if rest else "")
    if start == "perf":
        return name
    named = {"lr": "basics/lr", "loss": "train/loss_in_all"}
    named |= {f"loss/{rest}": f"train/weighted_loss/{rest}"}
    return named.get(name, f"train/{name}")


def of_layers(name: str) -> str:
    """The start of the series of a figure of MoE layers: its group, and its name."""
    pages = {figure.name: figure.chart for figure in metrics.FIGURES}
    page = pages.get(name, metrics.ROUTERS) or "other"  # routers have losses of theirs
    group = "moe" if page == metrics.BALANCE else f"moe_{page.replace(' ', '_')}"
    return f"{group}/{name}"


def layout(cfg, num_domains: int) -> dict:
    """Make the custom layout of a run: the charts that have figures, losses first."""
    score = cfg.task.FIGURES[0]
    pages = {
        "loss and learning rate": {
            f"training {score.axis}": _chart("basics/loss$"),
            f"held-out {score.axis}": _chart(f"basics/loss{HELD_OUT}$"),
            "learning rate": _chart("basics/lr$"),
        }
    }
    if any(routers(cfg.model)):
        pages |= _moe_pages(cfg)
    if cfg.model.adapter is not None and cfg.model.adapter.MIXES:
        pages["adapters"] = _gate_charts()
    if more := _more_scores(cfg.task, num_domains):
        pages["other scores"] = more
    for page, charts in CHARTS.items():
        pages[page] = {title: _chart(*tags) for title, tags in charts.items()}
    return pages


def _more_scores(task: Task, num_domains: int) -> dict[str, list]:
    """The charts of a task's further figures, and of its loss by domain."""
    score, *others = task.FIGURES
    charts = {}
    for which, end in (("training", ""), ("held-out", HELD_OUT)):
        for f in others:
            charts[f"{which} {f.axis}"] = _chart(f"scores/{f.name}{end}$")
        if num_domains > 1:
            title = f"{which} loss by domain, {score.unit}"
            charts[title] = _chart(f"scores/{score.name}{end}/.*")
    return charts


def _gate_charts() -> dict[str, list]:
    """The charts of the gates inside of adapters."""
    charts = {}
    for f in gates.FIGURES:
        for which, end in (("training", ""), ("held-out", HELD_OUT)):
            tag = f"adapters/{f.name}"
            title = f"{which} {f.title.lower()}"
            charts[f"{title}, mean ({f.unit})"] = _chart(f"{tag}{MEAN}{end}$")
            if f.worst is not None:
                charts[f"{title}, worst ({f.unit})"] = _chart(f"{tag}{WORST}{end}$")
    return charts


def _moe_pages(cfg) -> dict[str, dict[str, list]]:
    """The charts of figures of MoE layers: the mean over layers, the worst layer."""
    pages: dict[str, dict[str, list]] = {}
    names = {name for r in routers(cfg.model) for name in r.router.losses()}
    for figure in (*metrics.FIGURES, *metrics.own_figures(names)):
        if figure.chart is None or (figure.of is None and cfg.mesh.expert == 1):
            continue
        page = pages.setdefault(f"MoE: {figure.chart}", {})
        title, unit, tag = figure.title, figure.unit, of_layers(figure.name)
        page[f"{title}, mean of layers ({unit})"] = _chart(f"{tag}{MEAN}$")
        if figure.worst is not None:
            page[f"{title}, worst layer ({unit})"] = _chart(f"{tag}{WORST}$")
        if cfg.log.detail == "detailed":
            every = f"{layer_series(figure.name, '')}.*"
            page[f"{title}, every layer ({unit})"] = _chart(every)
    held_out = _chart(f"{of_layers(EVALUATED)}{MEAN}{HELD_OUT}$")
    pages[f"MoE: {metrics.BALANCE}"]["Max violation on held-out data"] = held_out
    shares = _chart(f"{SLOT_SHARES}/.*")
    pages[f"MoE: {metrics.EXPERTS}"]["tokens by number of experts, share"] = shares
    return pages


SLOT_SHARES = f"moe_{metrics.EXPERTS.replace(' ', '_')}/slots_share"


def layer_series(name: str, label: str) -> str:
    """The series of a figure of one MoE layer; only in detailed logs."""
    return f"moe_layers/{name}/layer_{label}"


def _chart(*tags: str) -> list:
    """A chart of all series whose tag one of the patterns matches from its start."""
    return ["Multiline", list(tags)]
