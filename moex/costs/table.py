"""The table of `moex params`: cost and memory of a model, layer by layer.

Everything is abstract: no array is made. Parameters and FLOPs are those of
`model/accounting.py`, bytes kept for the backward pass those of `residual_bytes.py`;
bytes of the optimizer are read off its abstract state.
"""

import dataclasses
from typing import Any

import jax

from moex.costs.matching import match
from moex.costs.residual_bytes import (
    block_activation_bytes,
    model_activation_bytes,
    needs_gradient,
)
from moex.model.accounting import model_cost, num_bytes
from moex.model.layers import Site, sites
from moex.model.optim import make_optimizer
from moex.model.paths import flat_paths
from moex.model.precision import compute_dtype
from moex.model.spec import ModelSpec, model_spec
from moex.numbers import number_ranges, scaled
from moex.runs.keys import check_run
from moex.runs.program import compute_of
from moex.terminal import aligned

FIGURES = (
    *("params", "active", "forward_flops", "backward_flops"),
    *("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes"),
)
HEADS = (
    *("params", "active", "FLOP fwd", "FLOP bwd"),
    *("weights", "gradients", "optimizer", "kept/token"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of layer, or one part of the model that is no layer."""

    name: str  # name of the part; empty for layers
    kind: str  # a description of the feed-forward
    layers: tuple[int, ...]  # absolute numbers of the layers that this row describes
    # Those of ONE such layer, by name of `FIGURES`; FLOPs and activations per token.
    figures: dict[str, float]

    @property
    def copies(self) -> int:
        return max(len(self.layers), 1)

    @property
    def label(self) -> str:
        return self.name or "layers " + number_ranges(self.layers)

    def to_dict(self) -> dict:
        """The row as plain data."""
        names = {"name": self.label, "kind": self.kind, "copies": self.copies}
        return names | {"layers": list(self.layers)} | self.figures


def model_rows(cfg) -> list[Row]:
    """The rows of a run config, layers first; fills in the size of its model.

    Raises:
      ConfigError: for any mistake of the config.
    """
    check_run(cfg)
    cfg.task.fill(cfg)
    spec = model_spec(cfg.model)
    tx, _ = make_optimizer(cfg.optim, cfg.steps, spec.params, spec.info)
    cost = model_cost(cfg.model, spec, cfg.seq_len)
    weights = _bytes_by_path(spec.params, spec)
    gradients = {n: b for n, b in weights.items() if not spec.info[n].frozen}
    optimizer = _bytes_by_path(jax.eval_shape(tx.init, spec.params), spec)
    rows, kept = [], dict[Any, float]()
    for site, block in zip(sites(cfg.model), cost.blocks, strict=True):
        held = [
            _below(site.path, b) / site.repeat for b in (weights, gradients, optimizer)
        ]
        same = _alike(cfg.model, spec, site)
        if same not in kept:
            kept[same] = block_activation_bytes(cfg, spec, site)
        figures = (
            *(sum(block.total().values()), sum(block.active().values())),
            *(block.forward_flops(), block.backward_flops(), *held, kept[same]),
        )
        kind = site.ffn.describe()
        rows.append(Row("", kind, tuple(site.numbers), _named(figures)))
    in_layers = sum(r.copies * r.figures["activation_bytes"] for r in rows)
    rest = (
        *(sum(cost.outer.values()), sum(cost.outer.values())),
        *(cost.outer_flops, cost.outer_backward),
        *(sum(b.values()) - _below("segments", b) for b in (weights, gradients)),
        sum(optimizer.values()) - _below("segments", optimizer),
        model_activation_bytes(cfg, spec) - in_layers,
    )
    return merged(rows) + [
        Row("rest", "embedding, last norm, logits, loss", (), _named(rest))
    ]


def _alike(model, spec: ModelSpec, site: Site):
    """A key that is the same for layers which keep as many bytes.

    It has the configs of a layer and of the one before it, what is trained there, and
    whether gradients pass through.
    """
    segment = model.layers[site.segment]
    places = range(max(site.place - 1, 0), site.place + 1)
    attentions = segment.attentions(model.attention)
    configs = [(segment.pattern[i], attentions[i]) for i in places]
    blocks = f"segments/{site.segment}/blocks/"
    own = sorted(
        (i - site.place, name.removeprefix(f"{blocks}{i}/"), trained)
        for i in places
        for name, trained in spec.trained().items()
        if name.startswith(f"{blocks}{i}/")
    )
    passes = needs_gradient(spec, site.segment)
    return repr((segment.residual, configs)), passes, *own


def _named(figures) -> dict[str, float]:
    return dict(zip(FIGURES, map(_plain, figures), strict=True))


def _plain(value: float) -> float:
    return int(value) if value == int(value) else float(value)


def merged(rows: list[Row]) -> list[Row]:
    """Rows of equal kind and figures as one, in the order of their first layers."""
    by_content: dict[Any, Row] = {}
    for row in rows:
        key = (row.kind, *row.figures.values())
        if key in by_content:
            layers = tuple(sorted(by_content[key].layers + row.layers))
            row = dataclasses.replace(row, layers=layers)
        by_content[key] = row
    return list(by_content.values())


def totals(rows: list[Row]) -> dict[str, float]:
    """The sum of every figure over all layers and the rest."""
    return {
        name: _plain(sum(r.copies * r.figures[name] for r in rows)) for name in FIGURES
    }


def _bytes_by_path(tree, spec: ModelSpec) -> dict[str, int]:
    """Bytes by parameter path; what belongs to no parameter is under "".

    A leaf of the optimizer state belongs to the parameter whose path ends its own.
    """
    known, sums = flat_paths(spec.params), dict[str, int]()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [str(getattr(k, "key", "")) for k in path]
        tails = ("/".join(keys[i:]) for i in range(len(keys)))
        owner = next((tail for tail in tails if tail in known), "")
        sums[owner] = sums.get(owner, 0) + num_bytes(leaf)
    return sums


def _below(path: str, sizes: dict[str, int]) -> int:
    return sum(v for name, v in sizes.items() if name.startswith(f"{path}/"))


def rows_dict(cfg, rows: list[Row]) -> dict:
    """The rows, their sum and what they hold for, as plain data."""
    setting = dataclasses.asdict(compute_of(cfg, train=True)) | {
        "seq_len": cfg.seq_len,
        cfg.model.SIZE: cfg.model.num_outputs,
        "backend": jax.default_backend(),
    }
    return {
        "rows": [row.to_dict() for row in rows],
        "total": totals(rows),
        "setting": setting,
    }


def rows_table(cfg, rows: list[Row]) -> str:
    """The rows as a table for people; figures of one copy, totals of all."""
    lines: list[tuple[str, ...]] = [("", "copies", *HEADS, "")]
    for row in rows:
        copies = f"{row.copies} x" if row.layers else ""
        lines.append((row.label, copies, *_cells(row.figures), row.kind))
    lines.append(("total", "", *_cells(totals(rows)), ""))
    return (
        f"{aligned(lines, (0, len(HEADS) + 2))}\n"
        "Rows are of one copy. FLOP and kept bytes are per token at length "
        f"{cfg.seq_len}; kept: for the backward pass, in {compute_dtype(cfg)}, "
        f"remat = {cfg.remat!r}, kernels = {cfg.kernels!r} on "
        f"{jax.default_backend()}."
    )


def matched(cfg, like, by: str) -> dict:
    """Hidden widths that give the model of `cfg` the cost of the model of `like`.

    Returns:
      Plain data: {"by", "overrides": {path: width}, "cost", "target", "difference"}.

    Raises:
      ConfigError: if there are none, or for a mistake in either config.
    """
    for one in (cfg, like):
        check_run(one)
        one.task.fill(one)
    found = match(cfg.model, like.model, by=by, seq_len=cfg.seq_len)
    return {
        "by": by,
        "overrides": {f"config.{path}": n for path, n in found.hidden.items()},
        "cost": found.cost,
        "target": found.target,
        "difference": found.difference,
    }


def match_lines(result: dict) -> str:
    """The result of `matched` as flags to copy, and one line on how close it is."""
    flags = [f"--{path}={width}" for path, width in result["overrides"].items()]
    what = {
        "params": "parameters",
        "active": "parameters per token",
        "flops": "FLOPs per trained token",
    }[result["by"]]
    flags.append(
        f"{result['cost']:,.0f} {what} beside {result['target']:,.0f}: "
        f"{100 * result['difference']:+.3g} %"
    )
    return "\n".join(flags)


def _cells(figures: dict[str, float]) -> list[str]:
    return [
        scaled(figures[name], 1024, "B") if name.endswith("bytes") else scaled(value)
        for name, value in figures.items()
    ]
