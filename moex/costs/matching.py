"""Variants of equal size: hidden widths of one model that give it the cost of another.

Only the widths of feed-forwards are changed (`hidden` of dense layers, gated and latent
experts, shared experts; `rank` of low-rank ones), all by about one factor; places with
equal widths keep equal widths.
"""

import copy
import dataclasses
import itertools
from typing import Any

from moex.config.base import Config, ConfigError, children, require_choice, walk
from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.nn.model import Model

MEASURES = {
    "params": lambda cost: sum(cost.total.values()),
    "active": lambda cost: sum(cost.active.values()),
    "flops": lambda cost: cost.train_flops,
}


@dataclasses.dataclass(frozen=True)
class Match:
    """A model of nearly the cost of another."""

    model: Model  # the config with other hidden widths
    # The new width by path, such as "model.layers[0].pattern[0].hidden".
    hidden: dict[str, int]
    # cost, target: cost of `model` and of the other one, in units of the measure.
    cost: float
    target: float

    @property
    def difference(self) -> float:
        """cost / target - 1."""
        return self.cost / self.target - 1


def match(cfg: Model, like: Model, *, by: str, seq_len: int) -> Match:
    """`cfg` with hidden widths that make it cost what `like` costs.

    The cost is linear in the widths, so it is known everywhere from one evaluation
    per distinct width; the best integers next to the exact solution are taken.

    Args:
      cfg: the model to change (it is copied); vocabulary filled in.
      by: "params" (all), "active" (parameters per token) or "flops" (per trained
        token, with the experts expected before training).
      seq_len: tokens per sequence, for the FLOPs of attention.

    Raises:
      ConfigError: if no widths of at least 1 can do it.
    """
    require_choice("match by", by, MEASURES)

    def cost_of(model: Model) -> float:
        return MEASURES[by](model_cost(model, model_spec(model), seq_len))

    target = cost_of(like)
    widths = sorted(set(hidden_widths(cfg).values()))
    if not widths:
        raise ConfigError("match: no feed-forward of the model has a hidden width.")
    base = cost_of(cfg)
    slopes = {w: (cost_of(_with_widths(cfg, {w: 2 * w})) - base) / w for w in widths}
    fixed = base - sum(slopes[w] * w for w in widths)
    lowest = fixed + sum(slopes.values())
    if target < lowest:
        raise ConfigError(
            f"match by {by}: the other model costs {target:,.0f}, and this one costs "
            f"{lowest:,.0f} with hidden widths of 1."
        )
    scale = (target - fixed) / (base - fixed)
    beside = [(max(int(scale * w), 1), int(scale * w) + 1) for w in widths]
    choices = [
        dict(zip(widths, new, strict=True)) for new in itertools.product(*beside)
    ]

    def miss(new: dict[int, int]) -> float:
        return abs(fixed + sum(slopes[w] * n for w, n in new.items()) - target)

    model = _with_widths(cfg, min(choices, key=miss))
    return Match(model, hidden_widths(model), cost_of(model), target)


def hidden_widths(cfg: Model, path: str = "model") -> dict[str, int]:
    """Every hidden width of a model by its path."""
    return {
        f"{where}.{name}": getattr(node, name)
        for where, node, name in _holders(cfg, path)
    }


def _holders(cfg: Model, path: str = "model") -> list[tuple[str, Any, str]]:
    """(path, config, name of its width); that of low-rank experts is their rank."""
    return [
        (where, node, name)
        for where, node in walk(cfg, path)
        if isinstance(node, Config)
        for name, _ in children(node)
        if name in ("hidden", "rank")
    ]


def _with_widths(cfg: Model, new: dict[int, int]) -> Model:
    """A copy in which every hidden width w is `new[w]`, where it has one."""
    cfg = copy.deepcopy(cfg)
    for _, node, name in _holders(cfg):
        width = getattr(node, name)
        setattr(node, name, new.get(width, width))
    return cfg
