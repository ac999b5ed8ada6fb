"""Low-rank experts: each one a linear map of small rank, as adapters are.

N routed rows · D model width · E experts · R rank
"""

import dataclasses
import functools

from kernels_pallas import grouped_matmul
from moex.config.base import require
from moex.moe.contract import Experts, ExpertsConfig
from moex.nn.param import param


@dataclasses.dataclass(kw_only=True, slots=True)
class LowRank(ExpertsConfig):
    """Linear experts of rank R; R = 1 makes each a key and a value."""

    rank: int  # R, 1 <= rank <= model width
    alpha: float | None = None  # outputs are scaled by alpha / rank; None: by 1
    zero_init: bool = False  # the second factor B starts at 0, as in LoRA

    def validate(self, path):
        require(self.rank >= 1, f"{path}.rank", self.rank, "at least 1")
        require(
            self.alpha is None or self.alpha > 0,
            f"{path}.alpha",
            self.alpha,
            "above 0, or None for no scale",
        )

    def validate_sizes(self, num_experts, dim, path):
        require(
            self.rank <= dim,
            f"{path}.rank",
            self.rank,
            f"at most the model width, {dim}",
        )

    def make(self, dim, num_experts, rngs):
        return LowRankExperts(self, dim, num_experts, rngs)


class LowRankExperts(Experts):
    """E experts x -> (alpha / R) (x A) B, without an activation.

    Parameters: a_EDR [E, D, R], b_ERD [E, R, D].

    Source: the experts of LoRAMoE, arXiv:2312.09979; with rank 1, those of MoRAM,
    arXiv:2506.21035.
    """

    def __init__(self, cfg, dim, num_experts, rngs):
        E, R = num_experts, cfg.rank
        self.scale = 1.0 if cfg.alpha is None else cfg.alpha / cfg.rank
        self.a_EDR = param(
            rngs,
            (E, dim, R),
            ("expert", "embed", "latent"),
            fan_in=dim,
            matrix=((1,), (2,)),
        )
        how = {"value": 0.0} if cfg.zero_init else {"fan_in": R}
        self.b_ERD = param(
            rngs,
            (E, R, dim),
            ("expert", "latent", "embed"),
            matrix=((1,), (2,)),
            **how,
        )

    def __call__(self, x_ND, group_sizes_E, ctx):
        dtype = x_ND.dtype
        matmul = functools.partial(grouped_matmul, implementation=ctx.compute.kernels)
        h_NR = matmul(x_ND, self.a_EDR[...].astype(dtype), group_sizes_E)
        b_ERD = (self.scale * self.b_ERD[...]).astype(dtype)
        return matmul(h_NR, b_ERD, group_sizes_E)
