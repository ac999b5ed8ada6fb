"""LoRA: the base case of adapters, a change of low rank for each adapted matrix.

I inputs · O outputs · N parts · R rank
"""

import dataclasses

import jax
import jax.numpy as jnp

from moex.config.base import require
from moex.nn.projection import Adapter, AdapterConfig, Matrix


@dataclasses.dataclass(kw_only=True, slots=True)
class LoRA(AdapterConfig):
    """W x + (alpha / rank) B A x; B is 0 at first, so the model begins as it was."""

    rank: int  # R, >= 1
    alpha: float  # the change is multiplied by alpha / rank, > 0
    dropout: float = 0.0  # training: the share of inputs of A that are 0, in [0, 1)
    shared: bool = False  # stacked experts share one change, else each has its own

    def validate(self, path):
        require(self.rank >= 1, f"{path}.rank", self.rank, "at least 1")
        require(self.alpha > 0, f"{path}.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, f"{path}.dropout", self.dropout, "in [0, 1)")

    def make(self, matrix, rngs):
        return LoRAModule(self, matrix, rngs)


class LoRAModule(Adapter):
    """base(x) + (alpha / R) B (A dropout(x)).

    Parameters: a_INR [I, N, R], b_NRO [N, R, *outer], with outer as in `Matrix`; for
    stacked experts they have a leading dim [E] unless they are shared.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; initial values as in PEFT.
    """

    def __init__(self, cfg: LoRA, matrix: Matrix, rngs):
        super().__init__(matrix, shared=cfg.shared)
        self.scale, self.dropout = cfg.alpha / cfg.rank, cfg.dropout
        self.a_INR, self.b_NRO = low_rank(matrix, cfg.rank, rngs, shared=cfg.shared)

    def __call__(self, x, base, product, ctx):
        z = product.inward(dropped(x, self.dropout, ctx), self.a_INR)
        y = base(x)
        y += self.scale * product.outward(z, self.b_NRO).astype(y.dtype)
        return y, None


def factors(path: str) -> tuple[str, str]:
    """The paths of the two arrays of the adapter of a parameter."""
    owner, _, own = path.rpartition("/")
    at = f"{owner}/adapters/{own}".removeprefix("/")
    return f"{at}/a_INR", f"{at}/b_NRO"


def low_rank(matrix: Matrix, rank: int, rngs, *, shared=False, frozen=False):
    """Make the pair (a_INR, b_NRO): a uniform within 1 / sqrt(I), b zeros."""
    a = matrix.array(
        rngs,
        (matrix.inputs, matrix.parts, rank),
        (matrix.input_axis, None, None),
        uniform_of(matrix.inputs),
        matrix=((0,), (2,)),
        shared=shared,
        frozen=frozen,
    )
    b = matrix.array(
        rngs,
        (matrix.parts, rank, *matrix.outer),
        (None, None, *matrix.outer_axes),
        lambda _, shape: jnp.zeros(shape),
        matrix=((1,), tuple(range(2, 2 + len(matrix.outer)))),
        shared=shared,
        frozen=frozen,
    )
    return a, b


def uniform_of(inputs: int):
    """Initial values within 1 / sqrt(inputs): Kaiming's uniform with a = sqrt(5)."""
    limit = inputs**-0.5

    def make(key, shape):
        return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

    return make


def dropped(x, rate: float, ctx):
    """Set a share of `x` to 0 in training, and scale the rest by 1 / (1 - rate)."""
    if not drops(x, rate, ctx):
        return x
    kept = jax.random.bernoulli(ctx.key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def drops(x, rate: float, ctx) -> bool:
    """Whether `dropped` changes x; never outside of training, or in a look-up."""
    whole = jnp.issubdtype(x.dtype, jnp.integer)  # numbers of rows, not values
    return rate > 0 and not whole and ctx.key is not None and ctx.mode == "train"
