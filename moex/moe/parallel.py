"""Experts on a mesh: the one `shard_map` of moex. It is dropless and exact.

Inside it every device holds its tokens (split over `TOKEN_AXES`) and its experts (split
over `expert`, their hidden width over `tensor`). Parameters split over `fsdp` are
gathered there in the compute dtype, and their gradients scattered back.

Rows reach the experts in one of two ways (`config.mesh.exchange`):

- "all_to_all" (`moe/all_to_all.py`): each token goes once to every device that holds
  any of its experts; the gated sum comes back. Routing that is limited to groups of
  experts, one per device, means fewer rows.
- "gather": every device of the expert axis sees all tokens of the axis and computes its
  own experts' part; the parts are summed where the tokens live.

T tokens · D model width · E experts · K slots per token · in one device of an expert
axis of n: t tokens, e experts, N rows that leave, R rows that arrive
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch, make_plan
from kernels_pallas.device import on_a_mesh
from kernels_pallas.permute import take
from moex.moe.all_to_all import moves_all_to_all, plan_travel
from moex.nn.contract import StackReader
from moex.nn.lowered import BlockWeight
from moex.nn.param import split_params
from moex.numbers import exact
from moex.sharding import TOKEN_AXES, partition_spec


@dataclasses.dataclass(frozen=True)
class Rows:
    """The limits on the rows that the experts of a layer compute."""

    # Kept slots per token that buffers are made for; if there are more, they are
    # computed too, but take more memory for a while. None: all slots.
    buffer_slots: float | None = None
    # Most slots that any expert was given. None: as many as tokens.
    per_expert: int | None = None
    in_all: int | None = None  # most slots of all experts together; None: not known

    def limits(self, num_tokens, num_seen, num_experts) -> dict:
        """The arguments of `local_sums` that say how many rows a device must hold."""
        limits: dict[str, int] = {}
        if self.buffer_slots is not None:
            limits["buffer_rows"] = math.ceil(exact(self.buffer_slots) * num_tokens)
        if self.per_expert is not None:
            limits["max_rows"] = num_experts * min(self.per_expert, num_seen)
        if self.in_all is not None:
            limits["max_rows"] = min(self.in_all, num_experts * num_seen)
        return limits


def run_experts(experts, x_TD, routing, num_experts, ctx, *, rows):
    """Compute gated sums over the kept slots of each token, on the mesh in use.

    Args:
      experts: module of an expert kind.
      x_TD: tokens.
      routing: `Routing`; slots of other ids than the E experts count nothing.
      num_experts: E.
      ctx: `Context`.
      rows: limits on the rows to compute.

    Returns:
      (`Experts.sums` in x's dtype, float32 scalar: rows that found no room in a
      buffer).
    """
    slots = (routing.expert_TK, routing.gate_TK, routing.keep_TK)
    if not on_a_mesh():
        T = x_TD.shape[0]
        limits = rows.limits(T, T, num_experts)
        if ctx.whole_stack and isinstance(experts, StackReader):
            slots = _in_stack(slots, num_experts, ctx.layer)
            num_experts *= experts.num_copies()
        y_TD = local_sums(experts.sums, x_TD, slots, num_experts, ctx, **limits)
        return y_TD, jnp.zeros(())
    mesh = jax.sharding.get_abstract_mesh()
    tokens = P(TOKEN_AXES)
    parts = math.prod(mesh.shape[a] for a in TOKEN_AXES)
    if x_TD.shape[0] % parts:
        if ctx.mode != "decode":
            raise ValueError(
                f"the tokens of a batch must divide over the {parts} devices of the "
                f"axes {', '.join(TOKEN_AXES)}; got {x_TD.shape[0]} tokens."
            )
        tokens = P()  # the few tokens of a decoding step: every device has them all
    graphdef, params, rest = split_params(experts)
    axes = {path: v.get_metadata()["axes"] for path, v in nnx.to_flat_state(params)}
    specs = {path: partition_spec(own) for path, own in axes.items()}
    kept = {path for path in axes if path[-1] in BlockWeight.PARTS}
    weights = {path: v[...] for path, v in nnx.to_flat_state(params)}
    splits_width = mesh.shape["tensor"] > 1 and any("mlp" in a for a in axes.values())
    own_ctx = _for_experts(ctx, 1 / mesh.shape["tensor"] if splits_width else 1.0)

    def body(weights, rest, key, x_tD, *slots):
        if key is not None:  # each device has rows of its own
            key = jax.random.fold_in(key, lax.axis_index(TOKEN_AXES))
        weights = {
            k: _whole(w, specs[k], w.dtype if k in kept else x_tD.dtype)
            for k, w in weights.items()
        }
        own = nnx.merge(graphdef, _nested(weights), rest)
        axis = _ExpertAxis(mesh.shape["expert"], num_experts, tokens == P(), rows)
        y_tD, lost = axis.sums(own, x_tD, slots, dataclasses.replace(own_ctx, key=key))
        if splits_width:
            y_tD = _sum_over(y_tD, "tensor")
        return y_tD, lax.psum(lost, TOKEN_AXES)

    if mesh.shape["fsdp"] > 1 and ctx.mode == "train":
        body = jax.checkpoint(
            body, policy=_all_but_gathered, prevent_cse=not ctx.compute.scan_layers
        )
    run = jax.shard_map(
        body,
        in_specs=(specs, P(), P(), tokens, *(tokens for _ in slots)),
        out_specs=(tokens, P()),
        # Kernels and their loops cannot say what varies over which axis. Without this
        # check a wrong sum would pass here: `tests/test_sharded.py` guards against it.
        check_vma=False,
    )
    return run(weights, nnx.to_pure_dict(rest), ctx.key, x_TD, *slots)


def _in_stack(slots, num_experts, layer):
    """Give slots the ids that the experts have among those of all copies."""
    expert_TK, gate_TK, keep_TK = slots
    keep_TK &= expert_TK < num_experts  # zero-computation experts come after these
    return expert_TK + layer * num_experts, gate_TK, keep_TK


def local_sums(sums, x_TD, slots, num_experts, ctx, *, buffer_rows=None, max_rows=None):
    """Compute gated sums by experts that are all on this device, [T, D].

    Args:
      sums: `Experts.sums`, or that of a `TravelForm`.
      x_TD: tokens, or the form of them that reaches the experts.
      slots: (expert_TK, gate_TK, keep_TK) as in `Routing`; ids outside of
        [0, num_experts) count nothing.
      num_experts: experts of this device.
      ctx: `Context`.
      buffer_rows: rows that buffers are made for; if there are more, they are computed.
      max_rows: the most rows that are computed.
    """
    expert_TK, gate_TK, keep_TK = slots
    with jax.named_scope("dispatch"):
        plan = make_plan(expert_TK, keep_TK, num_experts)
        T, K = expert_TK.shape
        rows = T * min(K, num_experts)
        plan = plan.truncated(rows if max_rows is None else min(rows, max_rows))
    with jax.named_scope("experts"):
        if buffer_rows is not None:
            return sums(x_TD, gate_TK, plan, ctx, buffer_rows)
        return sums(x_TD, gate_TK, plan, ctx)


def _for_experts(ctx, share):
    """The context for the shard_map: how to compute, without any data of the batch."""
    names = (
        *("segment_BL", "position_BL", "token_BL", "step", "key", "forced"),
        *("steer", "offload", "layer", "depth", "domain_B", "scored_BL", "told"),
        *("visual_BMC", "has_visual_B", "extra_keys"),
    )
    return dataclasses.replace(ctx, **dict.fromkeys(names), tensor_share=share)


def _nested(leaves: dict) -> dict:
    """Turn {path: leaf} into nested dicts."""
    tree: dict = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def _whole(weight, spec, dtype):
    """Gather a parameter over `fsdp`, in the compute dtype."""
    weight = weight.astype(dtype)
    for dim, axis in enumerate(spec):
        if axis == "fsdp" and lax.axis_size("fsdp") > 1:
            weight = lax.all_gather(weight, "fsdp", axis=dim, tiled=True)
    return weight


def _all_but_gathered(primitive, *_, **params) -> bool:
    """Checkpoint policy that gathers weights again in the backward pass.

    If they were kept, a device would hold those of all layers, which `fsdp` avoids.
    """
    gathers = primitive.name == "all_gather" and "fsdp" in params["axis_name"]
    return not (gathers or primitive.name in RESHAPES)


# Operations on a gathered weight before a kernel takes it; they are cheap to repeat.
RESHAPES = ("reshape", "convert_element_type", "mul")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_over(x, axis):
    """The sum over a mesh axis; every device gets all of it.

    Each device gets an equal share of the result's gradient; the gradient of each part
    is all of it. The transpose of psum would add the shares up over the network.
    """
    return lax.psum(x, axis)


_sum_over.defvjp(
    lambda x, axis: (lax.psum(x, axis), None),
    lambda axis, _, dy: (dy * lax.axis_size(axis),),
)


@dataclasses.dataclass(frozen=True)
class _ExpertAxis:
    """The expert axis as one of its devices sees it, inside of the shard_map."""

    num_devices: int
    num_experts: int
    has_all_tokens: bool
    rows: Rows

    @property
    def num_local(self) -> int:
        return self.num_experts // self.num_devices

    def sums(self, experts, x_tD, slots, ctx):
        """The pair (gated sums of this device's tokens, rows that found no room)."""
        t, K = slots[0].shape
        if self.num_devices == 1:
            limits = self.rows.limits(t, t, self.num_experts)
            y_tD = local_sums(
                experts.sums, x_tD, slots, self.num_experts, ctx, **limits
            )
            return y_tD, jnp.zeros(())
        first = lax.axis_index("expert") * self.num_local
        ctx = dataclasses.replace(ctx, first_expert=first)
        if self.has_all_tokens:
            packed = _packed(*slots)
            y_tD, lost = self._own_part(experts.sums, x_tD, packed, (t, K), ctx)
            return _sum_over(y_tD, "expert"), lost
        if self._travels_all_to_all(ctx, t, K):
            return self._all_to_all(experts, x_tD, slots, ctx)
        x_RD = lax.all_gather(x_tD, "expert", tiled=True)
        packed = lax.all_gather(_packed(*slots), "expert", tiled=True)
        y_RD, lost = self._own_part(experts.sums, x_RD, packed, (t, K), ctx)
        y_tD = lax.psum_scatter(y_RD, "expert", scatter_dimension=0, tiled=True)
        return y_tD, lost

    def _own_part(self, sums, x_RD, packed, shape_tK, ctx):
        """The pair (sums by this device's experts for all of R tokens, slots lost)."""
        (t, K), e = shape_tK, self.num_local
        slots = _unpacked(packed, ctx.first_expert, e)
        if self.rows.per_expert is not None and self.num_experts == K:
            # Slot i belongs to expert i: the other columns are for other devices.
            own = functools.partial(lax.dynamic_slice_in_dim, axis=1, slice_size=e)
            slots = tuple(own(a, ctx.first_expert) for a in slots)
        limits = self.rows.limits(t, x_RD.shape[0], e)
        lost = jnp.zeros(())
        if (buffer := ctx.compute.exchange_buffer) is not None:
            room = math.ceil(exact(buffer) * t * K)
            limits["max_rows"] = min(room, limits.get("max_rows", room))
            lost = jnp.maximum(jnp.sum(slots[2], dtype=jnp.float32) - room, 0)
        return local_sums(sums, x_RD, slots, e, ctx, **limits), lost

    def _travels_all_to_all(self, ctx, t, K) -> bool:
        if ctx.mode == "decode":  # few tokens: the number of messages matters
            return False
        how = ctx.compute
        if how.exchange != "auto":
            return how.exchange == "all_to_all"
        return moves_all_to_all(self.num_devices, t, K, how.exchange_buffer)

    def _all_to_all(self, experts, x_tD, slots, ctx):
        expert_tK, gate_tK, keep_tK = slots
        t, K = expert_tK.shape
        n, e = self.num_devices, self.num_local
        keep_tK = keep_tK & (expert_tK < self.num_experts)
        form = experts.travel_form(K, n)
        with jax.named_scope("dispatch"):
            buffer = ctx.compute.exchange_buffer
            travel = plan_travel(expert_tK // e, keep_tK, n, buffer)
            layout = travel.layout
            expert_N = travel.device_N * e
            rows_NC = form.leave(x_tD, layout, expert_N)
            keep_NK = take(keep_tK, layout.token_N) & layout.real_N[:, None]
            packed = _packed(
                take(expert_tK, layout.token_N), dispatch(gate_tK, layout), keep_NK
            )
            x_RC, packed = travel.there(rows_NC), travel.there(packed)
        y_RC, lost = self._own_part(form.sums, x_RC, packed, (t, K), ctx)
        with jax.named_scope("combine"):
            y_tD = form.arrive(travel.back(y_RC), layout, expert_N)
        return y_tD, lost + jnp.asarray(travel.lost, jnp.float32)


def _packed(expert_tK, gate_tK, keep_tK):
    """Pack ids, counted from 1 with 0 where not kept, and gates: float32[t, 2K].

    So the zeros in a buffer where no row arrived belong to no expert. Ids are exact
    below 2**24.
    """
    id_tK = jnp.where(keep_tK, expert_tK + 1, 0).astype(jnp.float32)
    return jnp.concatenate([id_tK, gate_tK], axis=1)


def _unpacked(packed, first_expert, num_local):
    """Unpack (ids from the first local expert on, gates, whether they are local)."""
    id_RK, gate_RK = jnp.split(packed, 2, axis=1)
    own_RK = id_RK.astype(jnp.int32) - 1 - first_expert
    return own_RK, gate_RK, (own_RK >= 0) & (own_RK < num_local)
