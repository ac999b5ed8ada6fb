"""Latent experts: projections factored through spaces that groups of experts share.

T tokens · N routed rows · D model width · E experts · F expert width · Z latent width ·
G groups of experts · K slots
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kernels_pallas import ACTIVATIONS, combine, dispatch, grouped_matmul
from moex.config.base import Config, caution, require, require_choice
from moex.nn.param import param

OPS = ("gate", "up", "down")


@dataclasses.dataclass(kw_only=True, slots=True)
class Latent(Config):
    """SwiGLU experts whose `ops` are small own factors behind shared projections."""

    hidden: int  # hidden width F of each expert, >= 1
    latent: int  # width Z of the shared spaces, 1 <= latent <= model width
    group: int  # experts per shared space, >= 1; the last group may be smaller
    ops: tuple[str, ...] = ("gate", "up")  # which of "gate", "up", "down" are factored

    def validate(self, path):
        for name in ("hidden", "latent", "group"):
            value = getattr(self, name)
            require(value >= 1, f"{path}.{name}", value, "at least 1")
        require(len(self.ops) >= 1, f"{path}.ops", self.ops, "not empty")
        for op in self.ops:
            require_choice(f"{path}.ops", op, OPS)
        require(
            len(set(self.ops)) == len(self.ops),
            f"{path}.ops",
            self.ops,
            "without repeats",
        )

    def validate_sizes(self, num_experts, dim, path):
        """Checks that need the sizes of the layer; a caution where nothing is saved."""
        require(
            self.latent <= dim,
            f"{path}.latent",
            self.latent,
            f"at most the model width, {dim}",
        )
        require(
            self.group <= num_experts,
            f"{path}.group",
            self.group,
            f"at most num_experts = {num_experts}",
        )
        ratio = latent_ratio(num_experts, dim, self)
        if ratio >= 1:
            rule = (
                f"group > {dim} / ({dim} - {self.hidden})"
                if self.latent == self.hidden < dim
                else "a smaller latent or a larger group"
            )
            caution(
                f"{path}: these latent experts have {ratio:.2f} times the parameters "
                f"of plain ones; to save any they need {rule}."
            )

    def expert_frac(self, num_experts, slots, name) -> float:
        """Share of the parameter `name` that a token with `slots` experts uses."""
        if name.startswith("b_"):
            num_groups = -(-num_experts // self.group)
            return min(slots, num_groups) / num_groups
        return slots / num_experts

    def make(self, dim, num_experts, rngs):
        return LatentExperts(self, dim, num_experts, rngs)


def latent_ratio(num_experts, dim, cfg: Latent) -> float:
    """Parameters of latent experts over those of plain ones of the same width."""
    E, F, Z = num_experts, cfg.hidden, cfg.latent
    factored = E * F * Z + -(-E // cfg.group) * Z * dim
    plain = E * F * dim
    return (len(cfg.ops) * factored + (3 - len(cfg.ops)) * plain) / (3 * plain)


class LatentExperts(nnx.Module):
    """SwiGLU with W^e = A^e B^g for the ops chosen, g = e // group; no bias.

    gate, up: x -> (x B^g) A^e. down: h -> (h A^e) B^g. Nothing lies between the
    factors, so that a trained expert can be converted exactly where its rank allows.
    The router sees the whole x. A token's shared projections are computed once per
    group if there are no more groups than slots, else once per routed row.

    Parameters: per op either w_{gate,up}_EDF [E, D, F], w_down_EFD [E, F, D], or its
    factors b_{gate,up}_GDZ [G, D, Z], a_{gate,up}_EZF [E, Z, F]; a_down_EFZ [E, F, Z],
    b_down_GZD [G, Z, D].

    Source: MoLE / MoLAE, arXiv:2503.23100 (its text and code were not available to us:
    see docs/fidelity.md for what is known); initial values ours: variance 1 / fan-in
    of each factor.
    """

    def __init__(self, cfg, dim, num_experts, rngs):
        E, F, Z = num_experts, cfg.hidden, cfg.latent
        self.num_experts = E
        self.group = cfg.group
        self.num_groups = G = -(-E // cfg.group)

        def weight(count, fan_in, fan_out, axes):
            shape = (count, fan_in, fan_out)
            return param(rngs, shape, axes, fan_in=fan_in, matrix=((1,), (2,)))

        shared = None  # few groups: every device holds all shared projections
        for op in ("gate", "up"):
            if op in cfg.ops:
                b = weight(G, dim, Z, (shared, "embed", "latent"))
                a = weight(E, Z, F, ("expert", "latent", "mlp"))
                setattr(self, f"b_{op}_GDZ", b)
                setattr(self, f"a_{op}_EZF", a)
            else:
                w = weight(E, dim, F, ("expert", "embed", "mlp"))
                setattr(self, f"w_{op}_EDF", w)
        if "down" in cfg.ops:
            self.a_down_EFZ = weight(E, F, Z, ("expert", "mlp", "latent"))
            self.b_down_GZD = weight(G, Z, dim, (shared, "latent", "embed"))
        else:
            self.w_down_EFD = weight(E, F, dim, ("expert", "mlp", "embed"))

    def __call__(self, x_ND, group_sizes_E, ctx):
        """The definition: rows sorted by expert, hence by group too."""
        by_expert, by_group = self._matmuls(group_sizes_E, ctx)
        latents = {
            op: by_group(x_ND, f"b_{op}_GDZ")
            for op in ("gate", "up")
            if hasattr(self, f"b_{op}_GDZ")
        }
        out_N = self._to_out(x_ND, latents, by_expert)
        return by_group(out_N, "b_down_GZD") if hasattr(self, "b_down_GZD") else out_N

    def fused(self, x_TD, gate_TK, plan, ctx):
        """Tokens in, gated sums out: shared projections once per token and group."""
        by_expert, by_group = self._matmuls(plan.group_sizes_E, ctx)
        G, K = self.num_groups, gate_TK.shape[1]
        token_N = plan.token_N
        x_ND = x_TD.at[token_N].get(mode="clip")
        latents = {}
        for op in ("gate", "up"):
            name = f"b_{op}_GDZ"
            if not hasattr(self, name):
                continue
            if K < G:
                latents[op] = by_group(x_ND, name)
            else:
                b_GDZ = getattr(self, name)[...].astype(x_TD.dtype)
                z_TGZ = jnp.einsum("td,gdz->tgz", x_TD, b_GDZ)
                group_N = self._group_of_rows(plan, ctx)
                latents[op] = z_TGZ.at[token_N, group_N].get(mode="clip")
        out_N = self._to_out(x_ND, latents, by_expert)
        if not hasattr(self, "b_down_GZD"):
            return combine(out_N, gate_TK, plan)
        if G == 1:  # the projection is linear: sum first, project once per token
            b_ZD = self.b_down_GZD[...][0].astype(x_TD.dtype)
            return combine(out_N, gate_TK, plan) @ b_ZD
        return combine(by_group(out_N, "b_down_GZD"), gate_TK, plan)

    # Between devices tokens travel as latents, where that is less: `moe/parallel.py`.

    def can_travel(self, num_slots, num_devices) -> bool:
        """Whether latents travel instead of tokens.

        They do if gate and up are both factored, each device's experts share one space,
        there are no more spaces than slots, and 2 Z < D.
        """
        b_gate: Any = getattr(self, "b_gate_GDZ", None)
        if b_gate is None or not hasattr(self, "b_up_GDZ"):
            return False
        G, D, Z = b_gate[...].shape
        per_device = self.num_experts // num_devices
        one_space = G == 1 or self.group % per_device == 0
        return one_space and num_slots >= G and 2 * Z < D

    def group_of(self, expert):
        """The group of an expert id."""
        return expert // self.group

    def enter(self, x_TD):
        """[T, G * 2Z]: the latents of gate and up in every space."""
        both = (getattr(self, f"b_{op}_GDZ")[...] for op in ("gate", "up"))
        b = jnp.concatenate(list(both), axis=2)
        z = jnp.einsum("td,gdc->tgc", x_TD, b.astype(x_TD.dtype))
        return z.reshape(x_TD.shape[0], -1)

    def pick(self, z_NC, group_N):
        """[N, 2Z]: of each row the latents of its group."""
        z = z_NC.reshape(z_NC.shape[0], self.num_groups, -1)
        return jnp.sum(z * self._one_hot(group_N, z.dtype)[:, :, None], axis=1)

    def inside(self, z_TC, gate_TK, plan, ctx):
        """Gated sums of the experts' own parts, [T, Z], or [T, D] where down is whole.

        Args:
          z_TC: [T, 2Z] latents of gate and up.
          gate_TK, plan, ctx: as for `fused`.
        """
        by_expert, _ = self._matmuls(plan.group_sizes_E, ctx)
        z_gate, z_up = jnp.split(dispatch(z_TC, plan), 2, axis=1)
        out_N = self._to_out(None, {"gate": z_gate, "up": z_up}, by_expert)
        return combine(out_N, gate_TK, plan)

    def leave(self, y_NC, group_N, layout):
        """[T, D] sums of rows that came back, through the shared part of down."""
        ones_TK = layout.kept_TK.astype(jnp.float32)
        if not hasattr(self, "b_down_GZD"):
            return combine(y_NC, ones_TK, layout)
        # Linear: rows are summed in the space of their group, then projected once.
        y = y_NC[:, None] * self._one_hot(group_N, y_NC.dtype)[:, :, None]
        y_TGZ = combine(y.reshape(y.shape[0], -1), ones_TK, layout)
        b_GZD = self.b_down_GZD[...].astype(y_NC.dtype)
        return y_TGZ @ b_GZD.reshape(-1, b_GZD.shape[2])

    def _one_hot(self, group_N, dtype):
        groups_1G = jnp.arange(self.num_groups)[None]
        return (group_N[:, None] == groups_1G).astype(dtype)

    def _matmuls(self, group_sizes_E, ctx):
        """Grouped matmuls with a parameter of experts, and with one of groups."""
        group_E = self.group_of(self._ids(group_sizes_E, ctx))
        group_sizes_G = jnp.zeros(self.num_groups, group_sizes_E.dtype)
        group_sizes_G = group_sizes_G.at[group_E].add(group_sizes_E)

        def matmul(sizes):
            return lambda rows, name: grouped_matmul(
                rows,
                getattr(self, name)[...].astype(rows.dtype),
                sizes,
                implementation=ctx.kernels,
            )

        return matmul(group_sizes_E), matmul(group_sizes_G)

    def _ids(self, group_sizes_E, ctx):
        """int32: the ids of the experts that these sizes are of."""
        first = 0 if ctx.first_expert is None else ctx.first_expert
        return first + jnp.arange(group_sizes_E.shape[0], dtype=jnp.int32)

    def _group_of_rows(self, plan, ctx):
        """int32[N]: the group of each sorted row; any group past the last row."""
        ids_E = self._ids(plan.group_sizes_E, ctx)
        end_E = jnp.cumsum(plan.group_sizes_E)
        rows_N = jnp.arange(plan.order_N.shape[0])
        place_N = jnp.searchsorted(end_E, rows_N, side="right")
        return self.group_of(ids_E.at[place_N].get(mode="clip"))

    def _to_out(self, x_N, latents, by_expert):
        """Rows through gate, up and the expert's own part of down."""
        halves = [
            by_expert(latents[op], f"a_{op}_EZF")
            if op in latents
            else by_expert(x_N, f"w_{op}_EDF")
            for op in ("gate", "up")
        ]
        h_NF = ACTIVATIONS["silu"].value(*halves)
        own = "a_down_EFZ" if hasattr(self, "a_down_EFZ") else "w_down_EFD"
        return by_expert(h_NF, own)
