"""LoRAMoE: low-rank experts in every adapted matrix, mixed by a soft router.

I inputs · O outputs · N parts · E experts · R rank of one · B batch · L length
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moex.adapters.lora import dropped, drops, uniform_of
from moex.config.base import require, require_choice
from moex.nn.context import fold_key
from moex.nn.projection import Adapter, AdapterConfig, Matrix

FORMS = ("code", "paper")


@dataclasses.dataclass(kw_only=True, slots=True)
class LoRAMoE(AdapterConfig):
    """W x + (alpha / rank) sum_e softmax(R x)_e B_e A_e x; B is 0 at first.

    The localized balancing constraint (`beta`) makes sequences of type 1 use the second
    half of the experts more, and those of type 0 the first half.
    """

    MIXES: ClassVar[bool] = True

    experts: int  # E, even, >= 2
    rank: int  # R of each expert, >= 1
    alpha: float  # the change is multiplied by alpha / rank, > 0
    dropout: float = 0.0  # training: the share of inputs of A that are 0, in [0, 1)
    shared: bool = False  # the experts of an MoE layer share one adapter
    # The type of the sequences of each domain of the data, in its order: 1 for those
    # about knowledge, 0 for all others; (): there are no types.
    types: tuple[int, ...] = ()
    beta: float = 0.0  # coefficient of the constraint, >= 0; 0: there is none
    delta: float = 0.1  # the constraint prefers half of the experts so much, in [0, 1)
    form: str = "code"  # variance / mean^2 of the released code, or "paper": / mean
    count_prompts: bool = False  # positions that are not scored count in the constraint
    count_padding: bool = False  # padding counts too

    def validate(self, path):
        even = self.experts >= 2 and self.experts % 2 == 0
        halves = "an even number >= 2: the constraint knows two halves"
        require(even, f"{path}.experts", self.experts, halves)
        require(self.rank >= 1, f"{path}.rank", self.rank, "at least 1")
        require(self.alpha > 0, f"{path}.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, f"{path}.dropout", self.dropout, "in [0, 1)")
        require(self.beta >= 0, f"{path}.beta", self.beta, "at least 0")
        require(0 <= self.delta < 1, f"{path}.delta", self.delta, "in [0, 1)")
        require_choice(f"{path}.form", self.form, FORMS)
        known = set(self.types) <= {0, 1}
        require(known, f"{path}.types", self.types, "0 or 1 for each domain")
        needs = f"0 without {path}.types, a type for each domain of the data"
        require(self.beta == 0 or bool(self.types), f"{path}.beta", self.beta, needs)

    def validate_domains(self, domains, path):
        allowed = f"a type for each of the {len(domains)} domains of the data"
        fits = len(self.types) in (0, len(domains))
        require(fits, f"{path}.types", self.types, f"{allowed}: {', '.join(domains)}")

    def make(self, matrix, rngs):
        return LoRAMoEModule(self, matrix, rngs)


class LoRAMoEModule(Adapter):
    """base(x) + (alpha / R) sum_e w_e B_e A_e dropout_e(x) with w = softmax(R x).

    All experts are active. The router sees x without dropout, each expert has a mask of
    its own, and the softmax is computed in float32.

    Parameters: r_INE [I, N, E], a_INER [I, N, E, R], b_NERO [N, E, R, *outer] with
    outer as in `Matrix`; for the experts of an MoE layer they have a leading dim,
    unless they are shared.

    Source: Dou et al. 2023, arXiv:2312.09979, section 3, and its code
    (peft/tuners/lora.py); initial values as there.
    """

    num_types = 2

    def __init__(self, cfg: LoRAMoE, matrix: Matrix, rngs):
        super().__init__(matrix, shared=cfg.shared)
        I, N, E, R = matrix.inputs, matrix.parts, cfg.experts, cfg.rank  # noqa: E741
        self.num_gates, self.type_of_domain = E, cfg.types
        self.scale, self.dropout = cfg.alpha / R, cfg.dropout
        self.beta, self.delta, self.form = cfg.beta, cfg.delta, cfg.form
        self.count_prompts, self.count_padding = cfg.count_prompts, cfg.count_padding
        uniform, inner, outer = uniform_of(I), matrix.input_axis, matrix.outer

        def array(*args: Any):
            *most, dims = args
            return matrix.array(rngs, *most, matrix=dims, shared=cfg.shared)

        self.r_INE = array((I, N, E), (inner, None, None), uniform, ((0,), (2,)))
        self.a_INER = array((I, N, E, R), (inner, *[None] * 3), uniform, ((0,), (3,)))
        self.b_NERO = array(
            (N, E, R, *outer),
            (None, None, None, *matrix.outer_axes),
            lambda _, shape: jnp.zeros(shape),
            ((2,), tuple(range(3, 3 + len(outer)))),
        )

    def __call__(self, x, base, product, ctx):
        logits = product.whole(product.inward(x, self.r_INE), self)
        gates = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        y, z = base(x), self._inward(x, product, ctx)
        z *= gates[..., None].astype(z.dtype)
        z = z.reshape(*z.shape[:-2], -1)
        y += self.scale * product.outward(z, self.b_NERO).astype(y.dtype)
        return y, gates.astype(y.dtype)

    def _inward(self, x, product, ctx):
        """A_e dropout_e(x) of all experts, [..., N, E, R]."""
        if not drops(x, self.dropout, ctx):
            return product.inward(x, self.a_INER)
        parts = []
        for e in range(self.num_gates):
            own = dataclasses.replace(ctx, key=fold_key(ctx.key, e))
            x_e = dropped(x, self.dropout, own)
            parts.append(product.inward(x_e, _OfExpert(self.a_INER, e)))
        return jnp.stack(parts, axis=-2)

    def types(self, ctx):
        if not self.type_of_domain or ctx.domain_B is None:
            return None
        return jnp.asarray(self.type_of_domain, jnp.int32)[ctx.domain_B]

    def counted(self, ctx):
        counted_BL = ctx.valid_BL
        if not self.count_prompts and ctx.scored_BL is not None:
            counted_BL &= ctx.scored_BL
        return counted_BL | (self.count_padding & ~ctx.valid_BL)

    def losses(self, gates_BLNE, ctx):
        type_B = self.types(ctx)
        if self.beta == 0:
            return {}
        if type_B is None:
            return {"localized_balance": jnp.zeros(())}
        counted_BL = self.counted(ctx)
        mass_BNE = jnp.einsum(
            "bl,blne->bne",
            counted_BL.astype(jnp.float32),
            gates_BLNE.astype(jnp.float32),
        )
        loss_N = localized_balance(
            mass_BNE, type_B, jnp.any(counted_BL, axis=1), self.delta, self.form
        )
        return {"localized_balance": self.beta * jnp.sum(loss_N)}


@dataclasses.dataclass(frozen=True)
class _OfExpert:
    """The part [I, N, R] of a parameter [I, N, E, R], which `Product` can take."""

    a_INER: Any
    expert: int

    def __getitem__(self, place):
        return self.a_INER[place][..., self.expert, :]


def localized_balance(mass_BNE, type_B, real_B, delta, form="code"):
    """The localized balancing constraint of each part, float32[N].

    It is the squared coefficient of variation ("code") of I * mass over sequences and
    experts, with I = 1 + delta for the first half of the experts in sequences of type
    1 and for the second half in those of type 0, and 1 - delta elsewhere. It is least
    where mass goes as 1 / I: so a sequence uses the half with 1 + delta less.

    Args:
      mass_BNE: float32, gates summed over the counted positions of each sequence.
      type_B: int32, 0 or 1.
      real_B: bool, sequences with any counted position; the others do not count.
      delta: in [0, 1).
      form: "code", or "paper" for variance / mean.

    Source: Dou et al. 2023, arXiv:2312.09979, section 3.3; the authors' code.
    """
    E = mass_BNE.shape[-1]
    first_E = jnp.arange(E) < E // 2
    matched_BE = first_E[None] == (type_B == 1)[:, None]
    weight_BE = jnp.where(matched_BE, 1 + delta, 1 - delta)
    real_BNE = real_B[:, None, None].astype(jnp.float32)
    value_BNE = weight_BE[:, None] * mass_BNE
    count = jnp.maximum(E * jnp.sum(real_B), 2)  # E >= 2: more than one value
    mean_N = jnp.sum(real_BNE * value_BNE, axis=(0, 2)) / count
    apart_BNE = real_BNE * jnp.square(value_BNE - mean_N[None, :, None])
    variance_N = jnp.sum(apart_BNE, axis=(0, 2)) / (count - 1)
    return variance_N / ((mean_N**2 if form == "code" else mean_N) + 1e-10)
