"""Latent experts: projections factored through spaces that groups of experts share.

T tokens · N routed rows · D model width · E experts · F expert width · Z latent width ·
G groups of experts · K slots
"""

import dataclasses

import jax.numpy as jnp

from kernels_pallas import ACTIVATIONS, combine, dispatch, grouped_matmul
from moex.config.base import caution, require, require_choice
from moex.moe.contract import Experts, ExpertsConfig, TravelForm
from moex.moe.offload import expert_of_slots
from moex.nn.param import param

OPS = ("gate", "up", "down")


@dataclasses.dataclass(kw_only=True, slots=True)
class Latent(ExpertsConfig):
    """SwiGLU experts whose `ops` are shared projections and small own factors."""

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
        if name.startswith("b_"):
            num_groups = -(-num_experts // self.group)
            return min(slots, num_groups) / num_groups
        return slots / num_experts

    def kept_evenly(self, num_experts):
        return self.group

    def keep_experts(self, keep, num_experts):
        num_groups = -(-num_experts // self.group)
        counts = [0] * num_groups
        for e in keep:
            counts[e // self.group] += 1
        *whole, last = counts
        if len({*whole, max(counts)}) > 1 or last < 1:
            raise ValueError(
                f"its {num_groups} groups of experts that share projections keep "
                f"{counts} of them: each must keep as many."
            )
        return dataclasses.replace(self, group=max(counts))

    def travel_widths(self, num_experts, dim, num_slots, num_devices):
        sizes = (num_experts, dim, self.group, self.latent)
        if not latents_travel(sizes, self.ops, num_slots, num_devices):
            return dim, dim
        return 2 * self.latent, self.latent if "down" in self.ops else dim

    def make(self, dim, num_experts, rngs):
        return LatentExperts(self, dim, num_experts, rngs)


def latent_ratio(num_experts, dim, cfg: Latent) -> float:
    """The ratio of the parameters of latent experts to those of plain ones."""
    E, F, Z = num_experts, cfg.hidden, cfg.latent
    factored = E * F * Z + -(-E // cfg.group) * Z * dim
    plain = E * F * dim
    return (len(cfg.ops) * factored + (3 - len(cfg.ops)) * plain) / (3 * plain)


def latents_travel(sizes, ops, num_slots, num_devices) -> bool:
    """Whether latents travel between devices instead of tokens.

    They do if gate and up are both factored, each device's experts share one space,
    there are no more spaces than slots, and 2 Z < D.

    Args:
      sizes: (experts, model width D, experts per space, width Z of a space).
      ops: the ops of `Latent`.
      num_slots: K.
      num_devices: devices that the experts are split over.
    """
    num_experts, dim, group, latent = sizes
    num_groups = -(-num_experts // group)
    one_space = num_groups == 1 or group % (num_experts // num_devices) == 0
    factored = {"gate", "up"} <= set(ops)
    return factored and one_space and num_slots >= num_groups and 2 * latent < dim


class LatentExperts(Experts):
    """SwiGLU with W^e = A^e B^g for the ops chosen, g = e // group; no bias.

    gate, up: x -> (x B^g) A^e. down: h -> (h A^e) B^g. There is nothing between the
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
        self.ops, self.group = tuple(cfg.ops), cfg.group
        self.sizes = (E, dim, cfg.group, Z)
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
        # Rows sorted by expert are sorted by group too.
        by_expert, by_group = self._matmuls(group_sizes_E, ctx)
        latents = {
            op: by_group(x_ND, f"b_{op}_GDZ") for op in ("gate", "up") if op in self.ops
        }
        out_N = self._to_out(x_ND, latents, by_expert)
        return by_group(out_N, "b_down_GZD") if "down" in self.ops else out_N

    def sums(self, x_TD, gate_TK, plan, ctx, buffer_rows=None):
        by_expert, by_group = self._matmuls(plan.group_sizes_E, ctx)
        G, K = self.num_groups, gate_TK.shape[1]
        token_N = plan.token_N
        x_ND = x_TD.at[token_N].get(mode="clip")
        latents = {}
        for op in ("gate", "up"):
            if op not in self.ops:
                continue
            name = f"b_{op}_GDZ"
            if K < G and ctx.offload is None:
                latents[op] = by_group(x_ND, name)
            else:
                b_GDZ = getattr(self, name)[...].astype(x_TD.dtype)
                z_TGZ = jnp.einsum("td,gdz->tgz", x_TD, b_GDZ)
                group_N = self._group_of_rows(plan, ctx)
                latents[op] = z_TGZ.at[token_N, group_N].get(mode="clip")
        out_N = self._to_out(x_ND, latents, by_expert)
        if "down" not in self.ops:
            return combine(out_N, gate_TK, plan)
        if G == 1:  # the projection is linear: sum first, project once per token
            b_ZD = self.b_down_GZD[...][0].astype(x_TD.dtype)
            return combine(out_N, gate_TK, plan) @ b_ZD
        if ctx.offload is None:
            return combine(by_group(out_N, "b_down_GZD"), gate_TK, plan)
        # Slots are in any order, so that rows are not sorted by group.
        own_NG = self._group_of_rows(plan, ctx)[:, None] == jnp.arange(G)[None]
        out_NGZ = out_N[:, None] * own_NG[..., None].astype(out_N.dtype)
        flat_TC = combine(out_NGZ.reshape(len(out_N), -1), gate_TK, plan)
        b_GZD = self.b_down_GZD[...].astype(x_TD.dtype)
        return flat_TC @ b_GZD.reshape(-1, b_GZD.shape[2])

    def travel_form(self, num_slots, num_devices):
        if latents_travel(self.sizes, self.ops, num_slots, num_devices):
            return LatentForm(self)
        return TravelForm(self)

    def group_of(self, expert):
        """The group of an expert id."""
        return expert // self.group

    def sums_of_latents(self, z_TC, gate_TK, plan, ctx):
        """The gated sums of the experts' own parts, [T, Z]; [T, D] where down is whole.

        Args:
          z_TC: [T, 2Z] latents of gate and up.
          gate_TK, plan, ctx: as for `sums`.
        """
        by_expert, _ = self._matmuls(plan.group_sizes_E, ctx)
        z_gate, z_up = jnp.split(dispatch(z_TC, plan), 2, axis=1)
        out_N = self._to_out(None, {"gate": z_gate, "up": z_up}, by_expert)
        return combine(out_N, gate_TK, plan)

    def _matmuls(self, group_sizes_E, ctx):
        """The grouped matmuls with a parameter of experts, and with one of groups."""
        group_E = self.group_of(self._ids(group_sizes_E, ctx))
        group_sizes_G = jnp.zeros(self.num_groups, group_sizes_E.dtype)
        group_sizes_G = group_sizes_G.at[group_E].add(group_sizes_E)

        def matmul(sizes):
            return lambda rows, name: grouped_matmul(
                rows,
                getattr(self, name)[...].astype(rows.dtype),
                sizes,
                implementation=ctx.compute.kernels,
            )

        return matmul(group_sizes_E), matmul(group_sizes_G)

    def _ids(self, group_sizes_E, ctx):
        """The int32 ids of the experts whose group sizes these are."""
        if ctx.offload is not None:
            return expert_of_slots(ctx, group_sizes_E.shape[0])
        first = 0 if ctx.first_expert is None else ctx.first_expert
        return first + jnp.arange(group_sizes_E.shape[0], dtype=jnp.int32)

    def _group_of_rows(self, plan, ctx):
        """The group of each sorted row, int32[N]; any group past the last row."""
        ids_E = self._ids(plan.group_sizes_E, ctx)
        end_E = jnp.cumsum(plan.group_sizes_E)
        rows_N = jnp.arange(plan.order_N.shape[0])
        place_N = jnp.searchsorted(end_E, rows_N, side="right")
        return self.group_of(ids_E.at[place_N].get(mode="clip"))

    def _to_out(self, x_N, latents, by_expert):
        """Pass rows through gate, up and the expert's own part of down."""
        halves = [
            by_expert(latents[op], f"a_{op}_EZF")
            if op in latents
            else by_expert(x_N, f"w_{op}_EDF")
            for op in ("gate", "up")
        ]
        h_NF = ACTIVATIONS["silu"].value(*halves)
        own = "a_down_EFZ" if "down" in self.ops else "w_down_EFD"
        return by_expert(h_NF, own)


class LatentForm(TravelForm):
    """Tokens travel as the latents of gate and up in the space of their device.

    The sums come back in that space, and go through the shared part of down here.
    """

    experts: LatentExperts

    def leave(self, x_TD, layout, expert_N):
        both = (getattr(self.experts, f"b_{op}_GDZ")[...] for op in ("gate", "up"))
        b_GDC = jnp.concatenate(list(both), axis=2)
        z_TGC = jnp.einsum("td,gdc->tgc", x_TD, b_GDC.astype(x_TD.dtype))
        z_NC = dispatch(z_TGC.reshape(x_TD.shape[0], -1), layout)
        z_NGC = z_NC.reshape(z_NC.shape[0], self.experts.num_groups, -1)
        return jnp.sum(z_NGC * self._own_group(expert_N, z_NGC.dtype), axis=1)

    def sums(self, x_RC, gate_RK, plan, ctx, buffer_rows=None):
        return self.experts.sums_of_latents(x_RC, gate_RK, plan, ctx)

    def arrive(self, y_NC, layout, expert_N):
        if "down" not in self.experts.ops:
            return TravelForm.arrive(self, y_NC, layout, expert_N)
        # The projection is linear: sum rows in the space of their group, project once.
        y_NGC = y_NC[:, None] * self._own_group(expert_N, y_NC.dtype)
        flat_NC = y_NGC.reshape(y_NGC.shape[0], -1)
        y_TC = TravelForm.arrive(self, flat_NC, layout, expert_N)
        b_GZD = self.experts.b_down_GZD[...].astype(y_NC.dtype)
        return y_TC @ b_GZD.reshape(-1, b_GZD.shape[2])

    def _own_group(self, expert_N, dtype):
        """The mask [N, G, 1]: 1 at the group of each row's device, 0 elsewhere."""
        group_N1 = self.experts.group_of(expert_N)[:, None]
        own_NG = group_N1 == jnp.arange(self.experts.num_groups)[None]
        return own_NG.astype(dtype)[:, :, None]
