"""The contracts of an MoE layer's two choices: what a router and an expert kind define.

A kind is a config class and the module that its `make` returns. Subclass the config
here, define what is abstract, and override the other hooks where their answer differs.

T tokens · N routed rows · D model width · E experts (zero-computation ones too, where a
router chooses) · K slots per token
"""

import abc
import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas import combine, dispatch
from moex.config.base import ConfigError, require
from moex.config.schedule import Schedule
from moex.moe.routing import Decision, router_logits
from moex.nn.contract import PartConfig
from moex.nn.projection import Projector, adapted


@dataclasses.dataclass(kw_only=True, slots=True)
class RouterConfig(PartConfig):
    """A router: how tokens choose experts, or experts tokens."""

    role: ClassVar[str] = "a router config such as TopK"
    experts_choose: ClassVar[bool] = False  # as in `Decision`
    # Whether the module heeds the bans and the forced experts of `Context.steer`.
    takes_bans: ClassVar[bool] = False
    takes_forces: ClassVar[bool] = False
    # True: experts can change places. The router chooses alike if the dims E of its
    # arrays (such as w_DE) are permuted.
    reorders: ClassVar[bool] = False

    @abc.abstractmethod
    def make(self, dim: int, num_experts: int, rngs: nnx.Rngs) -> "Router":
        """The module that chooses among `num_experts` for tokens of width `dim`."""

    @abc.abstractmethod
    def expected_slots(self, num_experts: int) -> float:
        """The mean number of slots that a token uses before anything is trained."""

    def slots(self, num_experts: int) -> int:
        """The most slots K of a token; where experts choose, all may take a token."""
        return num_experts

    def losses(self) -> dict[str, float | Schedule]:
        """The coefficients of the losses in `Routing.losses`, by name."""
        return {}

    def validate_experts(self, num_experts: int, path: str) -> None:
        """Raise `ConfigError` for errors that only the number of experts shows."""

    def validate_repeat(self, repeat: int, path: str) -> None:
        """Raise `ConfigError` for errors that only the segment's repeat shows."""

    def keep_copies(self, copies: slice) -> None:
        """Keep only `copies` in the fields with a value per copy of the segment."""

    def groups_kept(self) -> tuple[int, int] | None:
        """The pair (groups of experts, groups that a token may use); None: no limit."""
        return None

    def split(self, parts: int) -> Self:
        """The router for experts that are each cut into `parts`, all of them chosen.

        Raises:
          ValueError: if there is none.
        """
        raise ValueError(f"{type(self).__name__} cannot choose parts of experts.")

    def keep_experts(self, keep: list[int], num_experts: int) -> Self:
        """The router among the experts `keep`, rising, of `num_experts`.

        A token gets as many experts as before, or all where there are fewer.

        Raises:
          ValueError: if there is none.
        """
        raise ValueError(
            f"{type(self).__name__} cannot choose among fewer experts than it was "
            "trained with."
        )


class Router(Projector):
    """The module of a router.

    One that computes its logits with `logits` and a parameter w_DE [D, E] names it in
    `PROJECTED`, so that adapters can change it.
    """

    w_DE: nnx.Param

    def logits(self, x_TD, ctx) -> jax.Array:
        """The router logits x W [T, E], float32."""
        w_DE = self.w_DE[...]
        return adapted(self, "w_DE", lambda x: router_logits(x, w_DE), x_TD, ctx)

    @abc.abstractmethod
    def __call__(self, x_TD, ctx) -> Decision:
        """The `Routing` or `ExpertRouting` of all tokens, padding included.

        Args:
          x_TD: the input of the layer.
          ctx: `Context`; `routing.replayed` gives a recorded decision instead, and
            `moe/steering.py` bans and forces experts.
        """


def check_decision(router, decision, x_TD, num_experts: int, weights) -> None:
    """Check that the module of a router returned what its contract says.

    Args:
      router: `Router`.
      decision: its result.
      x_TD: its input.
      num_experts: E.
      weights: pairs (name, coefficient) of the losses that its config names.

    Raises:
      ConfigError: naming the module and the field.
    """
    told = f"{type(router).__name__} returned"
    if not isinstance(router, Router):
        raise ConfigError(f"{type(router).__name__}: must be a subclass of Router.")
    if not isinstance(decision, Decision):
        kind = type(decision).__name__
        raise ConfigError(f"{told} a {kind}: must be a Routing or an ExpertRouting.")
    named = sorted(name for name, _ in weights)
    if named != sorted(decision.losses):
        raise ConfigError(
            f"{told} the losses {sorted(decision.losses)}; `losses()` of its config "
            f"names {named}."
        )
    ids = "token_EC" if decision.experts_choose else "expert_TK"
    fields, slots, T, E = vars(decision), ids[-2:], len(x_TD), num_experts
    rest = jnp.shape(fields[ids])[1:2] or (slots[1],)
    expected = [
        (ids, fields[ids], (T if slots == "TK" else E, *rest), "int32"),
        *((f"losses[{k!r}]", v, (T,), "float32") for k, v in decision.losses.items()),
    ]
    for name, kind in (("gate", "float32"), ("keep", "bool")):
        name = f"{name}_{slots}"
        expected.append((name, fields[name], jnp.shape(fields[ids]), kind))
    for name in ("logits_TE", "probs_TE"):
        expected.append((name, fields[name], (T, E), "float32"))
    for name, array, shape, kind in expected:
        given = f"{jnp.result_type(array)}{list(jnp.shape(array))}"
        wanted = f"{kind}[{', '.join(map(str, shape))}]"
        if given != wanted:
            raise ConfigError(f"{told} {name} = {given}: must be {wanted}.")


@dataclasses.dataclass(kw_only=True, slots=True)
class FixedK(RouterConfig):
    """Base of the routers that give every token the same number of experts."""

    k: int  # slots per token, 1 <= k <= num_experts

    def validate(self, path):
        require(self.k >= 1, f"{path}.k", self.k, "at least 1")

    def validate_experts(self, num_experts, path):
        require(
            self.k <= num_experts,
            f"{path}.k",
            self.k,
            f"at most num_experts = {num_experts}; lower k or add experts",
        )

    def slots(self, num_experts) -> int:
        return self.k

    def expected_slots(self, num_experts) -> float:
        return self.k

    def split(self, parts):
        return dataclasses.replace(self, k=self.k * parts)


@dataclasses.dataclass(kw_only=True, slots=True)
class ExpertsConfig(PartConfig):
    """An expert kind: what the experts of a layer compute."""

    role: ClassVar[str] = "an experts config such as Glu"
    # True: experts can change places, as in routers' `reorders`. Arrays that groups of
    # neighbours share have a dim G (see `kept_evenly`).
    reorders: ClassVar[bool] = True

    @abc.abstractmethod
    def make(self, dim: int, num_experts: int, rngs: nnx.Rngs) -> "Experts":
        """The module that holds `num_experts` experts for tokens of width `dim`."""

    def validate_sizes(self, num_experts: int, dim: int, path: str) -> None:
        """Raise `ConfigError` for errors that only the sizes of the layer show."""

    def expert_frac(self, num_experts: int, slots: float, name: str) -> float:
        """The share of the parameter `name` that a token with `slots` experts uses."""
        return slots / num_experts

    def kept_evenly(self, num_experts: int) -> int:
        """The size of the parts of which equally many experts must stay, if some go."""
        return num_experts

    def keep_experts(self, keep: list[int], num_experts: int) -> Self:
        """The kind of the experts `keep`, rising, of `num_experts`.

        Raises:
          ValueError: if the others are needed.
        """
        return dataclasses.replace(self)

    def takes_buffer_rows(self) -> bool:
        """Whether `Experts.sums` takes `buffer_rows`: see `MoE.buffer_slots`."""
        return False

    def travel_widths(
        self, num_experts: int, dim: int, num_slots: int, num_devices: int
    ) -> tuple[int, int]:
        """The widths of a row of `Experts.travel_form` on its way there and back."""
        return dim, dim

    def split(self, parts: int) -> Self:
        """The expert kind of which `parts` experts are as large as one of these.

        Raises:
          ValueError: if there is none.
        """
        raise ValueError(f"{type(self).__name__} experts cannot be cut into parts.")


class Experts(nnx.Module):
    """The module of an expert kind: the parameters of E experts, on one device."""

    @abc.abstractmethod
    def __call__(self, x_ND, group_sizes_E, ctx):
        """Compute each row by its expert, [N, D]: this defines the kind.

        Args:
          x_ND: rows sorted by expert.
          group_sizes_E: int32, rows of each expert; what is past their sum is not used.
          ctx: `Context`; it holds nothing that belongs to the batch.
        """

    def sums(self, x_TD, gate_TK, plan, ctx, buffer_rows=None):
        """Sum gate * expert(x) over the kept slots of each token, [T, D].

        Where adapters have gates, more columns come after these: for each token the
        sums of the gates over its kept slots. `projection.tell_of_rows` takes them.

        Override it where dispatch and combine can be part of the computation.

        Args:
          x_TD: tokens.
          gate_TK: float32 weights.
          plan: `kernels_pallas.Plan` of the kept slots.
          ctx: `Context`.
          buffer_rows: rows that buffers are made for; if there are more, they are
            computed too. It is only given if `ExpertsConfig.takes_buffer_rows`.
        """
        rows = ctx.listening()
        y_ND = self(dispatch(x_TD, plan), plan.group_sizes_E, rows)
        y_TD = combine(y_ND, gate_TK, plan)
        if not rows.told:
            return y_TD
        told = [gates_NE for _, gates_NE in sorted(rows.told.items())]
        gates_NC = ctx.tensor_share * jnp.concatenate(told, axis=1)
        gates_TC = combine(gates_NC, jnp.ones(gate_TK.shape), plan)
        return jnp.concatenate([y_TD, gates_TC.astype(y_TD.dtype)], axis=1)

    def travel_form(self, num_slots: int, num_devices: int) -> "TravelForm":
        """The form in which tokens travel between `num_devices` that hold experts."""
        return TravelForm(self)


@dataclasses.dataclass(frozen=True)
class TravelForm:
    """The form in which tokens travel to the devices of their experts: whole rows.

    One row leaves for each device that holds an expert of a token, and one comes back.
    N rows that leave · C numbers of a row
    """

    experts: Experts

    def leave(self, x_TD, layout, expert_N):
        """The rows that leave, [N, C].

        Args:
          x_TD: tokens of this device.
          layout: `kernels_pallas.plan.Layout` of the rows.
          expert_N: int32, an expert of the device to which each row goes.
        """
        return dispatch(x_TD, layout)

    def sums(self, x_RC, gate_RK, plan, ctx, buffer_rows=None):
        """Compute `Experts.sums` for the rows that arrived."""
        return self.experts.sums(x_RC, gate_RK, plan, ctx, buffer_rows)

    def arrive(self, y_NC, layout, expert_N):
        """The sums of the rows that came back, [T, D]; arguments as for `leave`."""
        return combine(y_NC, jnp.ones(layout.kept_TK.shape), layout)
