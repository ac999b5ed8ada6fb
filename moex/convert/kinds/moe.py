"""Upcycling: dense layers become MoE layers that compute the same function.

The segments of the model and its parameters are in `to_moe.py`, the mathematics of one
layer is in `upcycle.py`.
"""

import dataclasses
import math

from moex.config.arguments import positive
from moex.config.base import ConfigError, require, require_choice
from moex.convert.base import SHARED, Conversion

SCALES = ("gates", "weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle(Conversion):
    """MoE layers in place of dense feed-forwards of width F.

    The new layer has `experts` copies of the dense one, of which a token uses `k`. Each
    copy is cut into `split` slices of width F / split, which are the experts: it has
    experts * split of them, k * split per token. Its FLOPs are those of k dense ones.
    """

    kind = "moe"
    about = "dense layers become MoE layers that compute the same function"
    flags = {
        "experts": dict(type=positive, help="copies of the dense feed-forward; needed"),
        "k": dict(type=positive, help="copies that a token uses; needed"),
        "split": dict(
            type=positive, help="cut every copy into so many experts; default: 1"
        ),
        "noise": dict(
            type=float,
            help="deviation of what is added to weights, over their own; default: 0",
        ),
        "reinit": dict(
            type=float,
            metavar="SHARE",
            help="share of each expert's hidden columns to draw again; default: 0",
        ),
        "scale": dict(
            help="what makes up for the gates of --split: gates or weights; default: "
            "gates"
        ),
        "layers": SHARED["layers"],
        "seed": SHARED["seed"],
    }
    needed = dict.fromkeys(("experts", "k"), "dense layers need it.")

    experts: int  # copies C, >= 1
    k: int  # copies that a token uses, in [1, experts]
    split: int = 1  # slices g of a copy, a divisor of F
    # Standard deviation of the noise on every weight of the experts, over that of its
    # matrix; >= 0.
    noise: float = 0.0
    # Share of the hidden columns of every expert that is drawn again, in [0, 1].
    reinit: float = 0.0
    # Where to put the factor g that makes up for too small gates: on the "gates"
    # (`TopK.scale`; the weights are those of the dense layer), or on the output
    # "weights" (no factor in the router).
    scale: str = "gates"
    # "all", "every:N", "last:N", or numbers, "0,3": see `chosen_layers`.
    layers: str = "all"
    seed: int = 0  # seed of routers, noise and columns, >= 0

    @classmethod
    def from_flags(cls, given):
        if "scale" in given and given.get("split", 1) == 1:
            raise ConfigError("--scale: is for --split of 2 or more; give both.")
        return cls(**given)

    @property
    def exact(self) -> bool:
        """Whether the new model computes what the old one did."""
        return self.noise == 0 and self.reinit == 0

    def check(self):
        for name in ("experts", "k", "split"):
            value = getattr(self, name)
            require(value >= 1, f"--{name}", value, "at least 1")
        most = f"at most --experts = {self.experts}"
        require(self.k <= self.experts, "--k", self.k, most)
        finite = 0 <= self.noise < math.inf
        require(finite, "--noise", self.noise, "finite and >= 0")
        require(0 <= self.reinit <= 1, "--reinit", self.reinit, "in [0, 1]")
        require_choice("--scale", self.scale, SCALES)
        require(self.seed >= 0, "--seed", self.seed, ">= 0")

    def model(self, model):
        from moex.convert.to_moe import moe_model

        return moe_model(model, self)

    def arrays(self, run, job, say):
        from moex.convert.to_moe import upcycle_params, upcycled_layers

        model = run.cfg.model
        params, state = upcycle_params(run.params, run.state, model, self)
        return params, state, {"upcycled": upcycled_layers(model, self.layers)}

    def lines(self, report):
        layers = ", ".join(map(str, report["upcycled"]))
        copy = f"1/{self.split} of a copy" if self.split > 1 else "a copy"
        num_experts, k = self.experts * self.split, self.k * self.split
        return [
            f"dense layers that became MoE layers: {layers}",
            f"{num_experts} experts, each {copy}; {k} per token",
        ]
