"""Gated experts whose matrices are a low-rank product plus a residual of few rows.

N routed rows · D model width · E experts · F expert width · R rank · I, O stored rows
of the residuals of the matrices in and out
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas import ACTIVATIONS, grouped_glu, grouped_matmul
from moex.config.base import require, require_choice
from moex.moe.contract import Experts, ExpertsConfig
from moex.nn.param import RouterState, param
from moex.nn.projection import per_row


@dataclasses.dataclass(kw_only=True, slots=True)
class LowRankGlu(ExpertsConfig):
    """SwiGLU experts with W = U V + S for gate, up and down.

    Residuals S are whole while `rows` is None: `Optim.prune` sets more and more of
    their rows (output neurons) to 0. `moex convert --to=lowrank --compact` then stores
    the other rows alone.

    Source: MC-SMoE, "Merge, Then Compress", arXiv:2310.01334, section 3.3.
    """

    hidden: int  # hidden width F of each expert, >= 1
    rank: int  # R of each U V, >= 1
    activation: str = "silu"  # "silu" (SwiGLU), "gelu" (GEGLU) or "clamped" (GPT-OSS)
    # (I, O): rows that are stored of each expert's residuals, of gate and up together
    # and of down; None: all.
    rows: tuple[int, int] | None = None

    def validate(self, path):
        require(self.hidden >= 1, f"{path}.hidden", self.hidden, "at least 1")
        require(self.rank >= 1, f"{path}.rank", self.rank, "at least 1")
        require_choice(f"{path}.activation", self.activation, ACTIVATIONS)
        require(
            self.rows is None or (min(self.rows) >= 0 and len(self.rows) == 2),
            f"{path}.rows",
            self.rows,
            "two numbers >= 0, or None",
        )

    def validate_sizes(self, num_experts, dim, path):
        most = min(dim, self.hidden)
        require(
            self.rank <= most,
            f"{path}.rank",
            self.rank,
            f"at most {most}, the smaller of the widths of model and experts",
        )
        if self.rows is not None:
            fits = self.rows[0] <= 2 * self.hidden and self.rows[1] <= dim
            limit = (2 * self.hidden, dim)
            require(fits, f"{path}.rows", self.rows, f"at most {limit}")

    def make(self, dim, num_experts, rngs):
        kind = LowRankGluExperts if self.rows is None else RowSparseGluExperts
        return kind(self, dim, num_experts, rngs)


class Factored(Experts):
    """The low-rank products of both kinds below.

    Parameters: a_in_ED2R [E, D, 2, R] and b_in_E2RF [E, 2, R, F] for gate and up,
    a_out_EFR [E, F, R] and b_out_ERD [E, R, D] for down.
    """

    def __init__(self, cfg, dim, num_experts, rngs, mlp="mlp"):
        E, F, R = num_experts, cfg.hidden, cfg.rank
        self.activation = cfg.activation
        made = functools.partial(param, rngs)
        self.a_in_ED2R = made(
            (E, dim, 2, R),
            ("expert", "embed", None, "latent"),
            fan_in=dim,
            matrix=((1,), (3,)),
        )
        self.b_in_E2RF = made(
            (E, 2, R, F),
            ("expert", None, "latent", mlp),
            fan_in=R,
            matrix=((2,), (3,)),
        )
        self.a_out_EFR = made(
            (E, F, R), ("expert", mlp, "latent"), fan_in=F, matrix=((1,), (2,))
        )
        self.b_out_ERD = made(
            (E, R, dim), ("expert", "latent", "embed"), fan_in=R, matrix=((1,), (2,))
        )


class LowRankGluExperts(Factored):
    """Experts with whole residuals, residual_in_ED2F and residual_out_EFD, 0 at first.

    W = U V + S is made whole before it is used, so steps cost what those of `Glu` cost
    and the products U V.
    """

    def __init__(self, cfg, dim, num_experts, rngs):
        super().__init__(cfg, dim, num_experts, rngs)
        E, F = num_experts, cfg.hidden
        self.residual_in_ED2F = param(
            rngs,
            (E, dim, 2, F),
            ("expert", "embed", None, "mlp"),
            value=0.0,
            matrix=((1,), (3,)),
        )
        self.residual_out_EFD = param(
            rngs,
            (E, F, dim),
            ("expert", "mlp", "embed"),
            value=0.0,
            matrix=((1,), (2,)),
        )

    def _weights(self, dtype):
        """W_in [E, D, 2, F] and W_out [E, F, D], summed up in float32."""

        def whole(equation, a, b, rest):
            a, b = a[...].astype(dtype), b[...].astype(dtype)
            product = jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
            return (product + rest[...].astype(jnp.float32)).astype(dtype)

        return (
            whole(
                "edcr,ecrf->edcf", self.a_in_ED2R, self.b_in_E2RF, self.residual_in_ED2F
            ),
            whole(
                "efr,erd->efd", self.a_out_EFR, self.b_out_ERD, self.residual_out_EFD
            ),
        )

    def __call__(self, x_ND, group_sizes_E, ctx):
        w_in_ED2F, w_out_EFD = self._weights(x_ND.dtype)
        E, D, _, F = w_in_ED2F.shape
        matmul = functools.partial(grouped_matmul, implementation=ctx.compute.kernels)
        a_NC = matmul(x_ND, w_in_ED2F.reshape(E, D, 2 * F), group_sizes_E)
        h_NF = _activated(a_NC, self.activation, x_ND.dtype)
        return matmul(h_NF, w_out_EFD, group_sizes_E)

    def sums(self, x_TD, gate_TK, plan, ctx, buffer_rows=None):
        w_in_ED2F, w_out_EFD = self._weights(x_TD.dtype)
        return grouped_glu(
            x_TD,
            w_in_ED2F,
            w_out_EFD,
            gate_TK,
            plan,
            activation=self.activation,
            implementation=ctx.compute.kernels,
        )


class RowSparseGluExperts(Factored):
    """Experts that store and compute the rows of their residuals that are not 0.

    Parameters: rows_in_EDI [E, D, I], rows_out_EFO [E, F, O]; which rows these are
    say index_in_EI, of the 2 F outputs of gate and up, and index_out_EO, of D. An
    expert with fewer rows has zeros in the last ones. The width is not split over the
    tensor axis of a mesh.
    """

    def __init__(self, cfg, dim, num_experts, rngs):
        super().__init__(cfg, dim, num_experts, rngs, mlp=None)
        E, F = num_experts, cfg.hidden
        num_in, num_out = cfg.rows
        self.rows_in_EDI = param(
            rngs, (E, dim, num_in), ("expert", "embed", None), value=0.0
        )
        self.rows_out_EFO = param(
            rngs, (E, F, num_out), ("expert", None, None), value=0.0
        )
        self.index_in_EI = _first_rows(E, num_in)
        self.index_out_EO = _first_rows(E, num_out)

    def __call__(self, x_ND, group_sizes_E, ctx):
        dtype = x_ND.dtype
        matmul = functools.partial(grouped_matmul, implementation=ctx.compute.kernels)

        def times(x_NI, weight):
            return matmul(x_NI, weight.astype(dtype), group_sizes_E)

        def with_rows(y_NO, x_NI, rows_EIR, index):
            if rows_EIR.shape[-1] == 0:
                return y_NO
            index_ER = index[...]
            if ctx.first_expert is not None:  # the state is whole on every device
                index_ER = jax.lax.dynamic_slice_in_dim(
                    index_ER, ctx.first_expert, len(rows_EIR)
                )
            index_NR = per_row(index_ER, group_sizes_E, len(y_NO))
            row_N1 = jnp.arange(len(y_NO))[:, None]
            return y_NO.at[row_N1, index_NR].add(times(x_NI, rows_EIR[...]))

        E, D, _, R = self.a_in_ED2R.shape
        low_NC = times(x_ND, self.a_in_ED2R[...].reshape(E, D, 2 * R))
        b_in_E2RF = self.b_in_E2RF[...]
        parts = [
            times(low_NC[:, i * R : (i + 1) * R], b_in_E2RF[:, i]) for i in range(2)
        ]
        a_NC = jnp.concatenate(parts, axis=1)
        a_NC = with_rows(a_NC, x_ND, self.rows_in_EDI, self.index_in_EI)
        h_NF = _activated(a_NC, self.activation, dtype)
        y_ND = times(times(h_NF, self.a_out_EFR[...]), self.b_out_ERD[...])
        return with_rows(y_ND, h_NF, self.rows_out_EFO, self.index_out_EO)


def _activated(a_NC, activation, dtype):
    """act(gate, up) of the columns of gate and then those of up, in float32."""
    F = a_NC.shape[1] // 2
    a32_NC = a_NC.astype(jnp.float32)
    return ACTIVATIONS[activation].value(a32_NC[:, :F], a32_NC[:, F:]).astype(dtype)


def _first_rows(num_experts: int, num_rows: int) -> RouterState:
    """The state that says which rows each expert stores: the first ones, at first."""
    first_ER = jnp.broadcast_to(jnp.arange(num_rows), (num_experts, num_rows))
    return RouterState(jnp.asarray(first_ER, jnp.int32), axes=(None, None), rule=None)
