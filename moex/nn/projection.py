"""Projections: how a module multiplies by its matrices, and what may change the result.

A module multiplies by a parameter with `project`, or with `project_rows` where each row
has an expert of its own. Both look for an adapter of the parameter, which can change
input and output: see `moex/adapters/`. So every kind of adapter works on every matrix
that a module names in `PROJECTED`.

In an adapter's view each matrix is [inputs I, parts N, outputs O], whatever its dims
are: several input dims count as one. Parts are projections of the same input that stand
in one array, such as keys and values, and each has an adapter of its own; gate and up
of stacked experts count as one part, as in the files of PEFT.

N parts · I inputs · O outputs · E experts
"""

import abc
import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas import Lowered, grouped_matmul, lowered_matmul, matmul
from moex.config.base import Config, ConfigError
from moex.nn.context import fold_key
from moex.nn.lowered import BlockWeight, as_read
from moex.sharding import RULES


@dataclasses.dataclass(kw_only=True, slots=True)
class AdapterConfig(Config, abc.ABC):
    """A kind of adapter: trainable parts that are added to a model that stays fixed."""

    role: ClassVar[str] = "an adapter config such as LoRA"
    MIXES: ClassVar[bool] = False  # its adapters have experts, whose gates are logged
    TARGETLESS: ClassVar[bool] = False  # it can do without adapted matrices

    # Shell patterns of parameter paths, or parts of paths: the matrices to adapt.
    targets: tuple[str, ...]
    # Patterns of other parameters that are trained too, such as "router" or "norm".
    also_train: tuple[str, ...] = ()
    # How frozen weights are kept: "float32", "bfloat16" or "int8" (blocks of at most
    # 64 with a scale; embeddings and logits in bfloat16). Routers and norms stay
    # float32, and so do adapters.
    base_dtype: str = "float32"

    @abc.abstractmethod
    def make(self, matrix: "Matrix", rngs: nnx.Rngs) -> "Adapter":
        """The adapter of one matrix, with fresh parameters."""

    def validate_matrix(self, matrix: "Matrix", path: str) -> None:
        """Raise `ConfigError` for a matrix that this kind cannot adapt."""

    def continued(
        self, before: "AdapterConfig | None", params: dict, path: str
    ) -> dict:
        """The parameters that a run begins from, as a model with these adapters.

        Args:
          before: adapters of the run that it starts from; None: that has none, or
            there is no such run.
          params: nested dicts of that run's parameters.
          path: names this config in errors.

        Raises:
          ConfigError: if these adapters cannot begin there.
        """
        if before is not None and type(before) is not type(self):
            kind = type(before).__name__
            raise ConfigError(
                f"{path} = {type(self).__name__}(...): must be {kind}(...), for the "
                f"run that this one starts from has {kind} adapters."
            )
        return params

    def check_run(self, cfg, path: str) -> None:
        """Raise `ConfigError` for a run config that cannot train these adapters."""

    def about(self) -> str:
        """The words about its cost in a table; "" where there is nothing to say."""
        return ""

    def validate_domains(self, domains: tuple[str, ...], path: str) -> None:
        """Raise `ConfigError` for errors that only the domains of the data show."""

    def trained_too(self) -> tuple[str, ...]:
        """The patterns of parameters of the model that are trained too."""
        return self.also_train

    def extra_keys(self, cfg, number: int) -> int:
        """The keys that a layer attends to besides those of the tokens.

        Args:
          cfg: `Model` that has these adapters.
          number: that of the layer, from 0.
        """
        return 0

    def fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The fields of a sequence that they need, as `{name: (shape, dtype)}`."""
        return {}

    def extend(self, model, cfg, rngs: nnx.Rngs, path: str) -> None:
        """Add what belongs to the whole model, when its matrices have their adapters.

        Args:
          model: `Layers`.
          cfg: `Model` that it was made from.
          rngs: `nnx.Rngs` with a `params` stream.
          path: names this config in errors.
        """


class Adapter(nnx.Module):
    """The module that changes what one matrix computes.

    Attributes:
      path: path of the parameter in the model.
      parts: N of the matrix.
      input_axis: the logical axis that I is split along, or None.
      per_expert: whether its parameters have a leading dim [E], one for each expert.
      num_gates: the experts inside of it, for which it returns gates; 0: none.
      num_types: the types of sequences that `types` tells apart.
    """

    num_gates = 0
    num_types = 1

    def __init__(self, matrix: "Matrix", *, shared: bool = False):
        self.path, self.parts = matrix.path, matrix.parts
        self.input_axis = matrix.input_axis
        self.per_expert = matrix.experts is not None and not shared

    @abc.abstractmethod
    def __call__(self, x, base: Callable, product: "Product", ctx) -> tuple[Any, Any]:
        """Compute the pair (output of the adapted matrix [..., N, O], gates).

        Gates are the weights of the experts inside of the adapter for each row,
        [..., N, num_gates], for its figures and losses; None where there are none.

        Args:
          x: input [..., I].
          base: the matrix itself, [..., I] -> [..., N, O]; where N > 1,
            `base(x, part)` is one of its parts, [..., 1, O].
          product: multiplies by parameters of the adapter.
          ctx: `Context`.
        """

    def types(self, ctx) -> jax.Array | None:
        """The type of each sequence, int32[B] below `num_types`; None: not known."""
        return None

    def counted(self, ctx) -> jax.Array:
        """The positions that figures and losses are made of, bool[B, L]."""
        return ctx.valid_BL

    def losses(self, gates_BLNE, ctx) -> dict:
        """The losses of the gates by name, float32 scalars with their coefficients.

        Those of all matrices are added up; microbatches have the same weight.

        Args:
          gates_BLNE: as `__call__` returned them. Where each expert of an MoE layer has
            the adapter, they are the sums over the experts of a token.
          ctx: `Context`.
        """
        return {}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The facts about a matrix that an adapter of it is made by.

    Attributes:
      path: path of the parameter in the model.
      copies: leading dims of its array, such as (repeat,): copies of its layer.
      experts: E, if each expert has a matrix of its own; else None.
      inputs, parts: I and N.
      outer: dims whose product is O: those of gate and up, [2, F], stay apart, since a
        mesh splits F.
      input_axis: the logical axis that I is split along, or None.
      outer_axes: the same for each of `outer`.
    """

    path: str
    copies: tuple[int, ...]
    experts: int | None
    inputs: int
    parts: int
    outer: tuple[int, ...]
    input_axis: str | None
    outer_axes: tuple[str | None, ...]

    @property
    def outputs(self) -> int:
        """O."""
        return math.prod(self.outer)

    def array(
        self, rngs, shape, axes, make, *, matrix=None, shared=False, frozen=False
    ) -> nnx.Param:
        """Make a parameter of an adapter: one array for each copy and each expert.

        Args:
          rngs: `nnx.Rngs` with a `params` stream.
          shape: that of one adapter.
          axes: logical axes of `shape`.
          make: `(key, shape) -> float32 array`, such as `jax.random.normal`.
          matrix: (input dims, output dims) in `shape`, as in `param`.
          shared: all experts use the same array.
          frozen: it is not trained: the run that this one starts from has it.
        """
        if self.experts is not None and not shared:
            shape, axes = (self.experts, *shape), ("expert", *axes)
            matrix = matrix and tuple(tuple(d + 1 for d in dims) for dims in matrix)
        array = make(rngs.params(), (*self.copies, *shape))
        return nnx.Param(array, axes=tuple(axes), matrix=matrix, frozen=frozen)


@dataclasses.dataclass(frozen=True)
class Product:
    """The product of rows with parameters of an adapter that are the same for all rows.

    Attributes:
      ctx: `Context`.
      stacked: whether parameters are those of all copies of the layer.
    """

    ctx: Any
    stacked: bool = False

    def inward(self, x, a) -> jax.Array:
        """Multiply [..., I] by a parameter [I, N, R]: returns [..., N, R]."""
        return matmul(x, self._own(a, x.dtype), implementation=self._kernels)

    def outward(self, z, b) -> jax.Array:
        """Multiply [..., N, R] by a parameter [N, *R, *outer]: returns [..., N, O]."""
        own = self._own(b, z.dtype)
        own = own.reshape(len(own), z.shape[-1], -1)
        parts = [
            matmul(z[..., n, :], own[n], implementation=self._kernels)
            for n in range(len(own))
        ]
        return jnp.stack(parts, axis=-2)

    def each(self, v, dtype) -> jax.Array:
        """A parameter that is no matrix, as each row needs it: it broadcasts."""
        return self._own(v, dtype)

    def whole(self, z, adapter: Adapter) -> jax.Array:
        """The result of `inward` where a device may have a slice of each input only.

        Everything that is not linear in it needs the sum over these devices.
        """
        split = RULES.get(adapter.input_axis or "") == "tensor"
        return jax.lax.psum(z, "tensor") if split and self.ctx.tensor_share < 1 else z

    @property
    def _kernels(self):
        return self.ctx.compute.kernels

    def _own(self, parameter, dtype):
        array = parameter[...]
        if self.stacked:
            array = jax.lax.dynamic_index_in_dim(array, self.ctx.layer, 0, False)
        return array.astype(dtype)


@dataclasses.dataclass(frozen=True)
class RowProduct(Product):
    """The same for one-hot rows, which are given by the numbers of their ones."""

    def inward(self, x, a):
        return a[...].at[x].get(mode="clip")


@dataclasses.dataclass(frozen=True)
class GroupedProduct(Product):
    """The same for rows sorted by expert, where each expert has parameters of its own.

    Attributes:
      group_sizes_E: int32, rows of each expert.
      num_rows: the number of rows.
    """

    group_sizes_E: Any = None
    num_rows: int = 0

    def inward(self, x, a):
        own = self._own(a, x.dtype)
        z = self._grouped(x, own.reshape(*own.shape[:2], -1))
        return z.reshape(-1, *own.shape[2:])

    def outward(self, z, b):
        own = self._own(b, z.dtype)
        own = own.reshape(*own.shape[:2], z.shape[-1], -1)
        parts = [self._grouped(z[:, n], own[:, n]) for n in range(own.shape[1])]
        return jnp.stack(parts, axis=1)

    def each(self, v, dtype):
        return per_row(self._own(v, dtype), self.group_sizes_E, self.num_rows)

    def _grouped(self, x, w):
        return grouped_matmul(x, w, self.group_sizes_E, implementation=self._kernels)

    def _own(self, parameter, dtype):
        array = parameter[...].astype(dtype)
        if self.stacked:  # experts are counted through all copies of the layer
            array = array.reshape(-1, *array.shape[2:])
        return array


def per_row(own_EC, group_sizes_E, num_rows: int) -> jax.Array:
    """The values of each row's expert, [num_rows, ...]; 0 past the groups.

    Args:
      own_EC: values of each expert, [E, ...].
      group_sizes_E: int32, rows of each expert; rows are sorted by expert.
      num_rows: the number of rows.
    """
    end_E = jnp.cumsum(group_sizes_E)
    expert_N = jnp.searchsorted(end_E, jnp.arange(num_rows), side="right")
    # Rows past the last group have index E, which reads as 0 and has no gradient.
    return own_EC.at[expert_N].get(mode="fill", fill_value=0)


class Projector(nnx.Module):
    """A module that multiplies by matrices which adapters can change.

    Attributes:
      PROJECTED: names of the parameters that it uses through `project` or
        `project_rows` alone.
      READ_WHOLE: those of them that it also reads by itself, when it decodes.
      adapters: the adapter of each adapted parameter, by the parameter's name.
    """

    PROJECTED: ClassVar[tuple[str, ...]] = ()
    READ_WHOLE: ClassVar[tuple[str, ...]] = ()
    adapters: Any = {}  # set by `moex.adapters.attach`


def of_adapter(path: str) -> bool:
    """Whether a parameter is one of an adapter, by its path in the model."""
    return "adapters" in path.split("/")


def project(module: Projector, name: str, x, ctx, contract=1, out_dtype=None):
    """Multiply the last `contract` axes of `x` by a parameter, in the dtype of `x`.

    Args:
      module: the module that has the parameter.
      name: its name there.
      x: [..., *inner].
      ctx: `Context`; with `whole_stack` a parameter that C reads is that of all copies.
      contract: the number of dims that `x` and the first dims of the parameter share.
      out_dtype: dtype of the result; None: that of `x`.

    Returns:
      [..., *outer], changed by the adapter of the parameter if there is one.
    """
    weight = getattr(module, name)
    low = as_read(weight, ctx)
    stacked = ctx.whole_stack and name not in module.READ_WHOLE
    layer = ctx.layer if stacked else 0
    if low is not None and not stacked:
        low = jax.tree.map(lambda a: a[None], low)

    def base(x, part=None):
        if low is not None and part is None:
            return _multiply_in_c(x, low, layer, contract, out_dtype or x.dtype)
        w = weight[...] if low is None else low.copy_of(layer).raised()
        own = w if part is None else w[*[slice(None)] * contract, part]
        options = {"implementation": ctx.compute.kernels, "out_dtype": out_dtype}
        return matmul(x, own.astype(x.dtype), contract=contract, **options)

    return adapted(module, name, base, x, ctx, contract)


def _multiply_in_c(x, low: Lowered, layer, contract: int, out_dtype) -> jax.Array:
    """Multiply by copy `layer` of matrices [repeat, *inner, *outer], where it lies."""
    x_MK = x.reshape(-1, math.prod(x.shape[-contract:])).astype(jnp.float32)
    copies, outer = low.shape[0], low.shape[1 + contract :]
    after = jnp.arange(copies + 1) > layer
    bounds = jnp.where(after, len(x_MK), 0).astype(jnp.int32)
    y_MN = lowered_matmul(x_MK, low.matrices(1, contract), bounds)
    return y_MN.reshape(*x.shape[:-contract], *outer).astype(out_dtype)


def adapted(module: Projector, name: str, base: Callable, x, ctx, contract=1):
    """The result of `base(x)`, changed by the adapter of a parameter if there is one.

    Args:
      base: multiplies [..., *inner] by the parameter: [..., *outer]; if the parameter
        has parts, `base(x, part)` does so by one of them.
      module, name, x, ctx, contract: as for `project`.
    """
    if name not in module.adapters:
        return base(x)
    adapter, shape = module.adapters[name], x.shape
    batch = shape[: x.ndim - contract]
    outer = jax.eval_shape(base, x).shape[len(batch) :]

    def flat_base(x, *part):
        return base(x.reshape(shape), *part).reshape(
            *batch, 1 if part else adapter.parts, -1
        )

    flat = x.reshape(*batch, math.prod(shape[len(batch) :]))
    y, gates = adapter(flat, flat_base, Product(ctx), _inside(ctx, name))
    _tell(adapter, gates, ctx)
    return y.reshape(*batch, *outer)


def look_up(module: Projector, name: str, id_BL, ctx):
    """The rows of a parameter [V, D] by their numbers: float32[B, L, D].

    An adapter sees them as the product of one-hot rows with the parameter.

    Args:
      module, name, ctx: as for `project`.
      id_BL: int32; those outside of the parameter count as the nearest.
    """
    array = getattr(module, name)

    def base(id_BL):
        rows = array[...]
        if rows.dtype != jnp.bfloat16:
            return rows.at[id_BL].get(mode="clip").astype(jnp.float32)
        # We look up bits: XLA on a CPU would widen the whole bfloat16 array first.
        bits = jax.lax.bitcast_convert_type(rows, jnp.uint16)
        bits = bits.at[id_BL].get(mode="clip").astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    if name not in module.adapters:
        return base(id_BL)
    adapter, product = module.adapters[name], RowProduct(ctx)
    inside = _inside(ctx, name)
    y, gates = adapter(id_BL, lambda i: base(i)[..., None, :], product, inside)
    _tell(adapter, gates, ctx)
    return y[..., 0, :]


def project_rows(module: Projector, name: str, x_NC, group_sizes_E, ctx):
    """Multiply each row by the matrix of its expert, in the dtype of the rows.

    Args:
      module: the experts that have the parameter [E, C, *outer].
      name: its name there.
      x_NC: rows sorted by expert.
      group_sizes_E: int32, rows of each expert.
      ctx: `Context`; with `whole_stack` the parameter is that of all copies.

    Returns:
      [N, prod(outer)], changed by the adapter of the parameter if there is one; its
      gates for the rows are in `ctx.told` by the name of the parameter, [N, num_gates].
    """
    weight = getattr(module, name)
    low = as_read(weight, ctx)

    def base(x_NC):
        if low is not None:
            w_ECO = low.matrices(1 + ctx.whole_stack, 1)
            bounds = jnp.cumulative_sum(group_sizes_E, include_initial=True)
            y_NO = lowered_matmul(x_NC.astype(jnp.float32), w_ECO, bounds)
            return y_NO.astype(x_NC.dtype)
        w, sizes_E = weight[...], group_sizes_E
        if ctx.whole_stack and isinstance(weight, BlockWeight):
            # Rows are those of one copy: the other ones need not be widened.
            w = weight.lowered().copy_of(ctx.layer).raised()
            first = ctx.layer * w.shape[0]
            sizes_E = jax.lax.dynamic_slice_in_dim(sizes_E, first, w.shape[0])
        elif ctx.whole_stack:
            w = w.reshape(-1, *w.shape[2:])
        w_ECO = w.astype(x_NC.dtype).reshape(*w.shape[:2], -1)
        kernels = ctx.compute.kernels
        return grouped_matmul(x_NC, w_ECO, sizes_E, implementation=kernels)

    if name not in module.adapters:
        return base(x_NC)
    adapter, product = module.adapters[name], Product(ctx, ctx.whole_stack)
    if adapter.per_expert:
        product = GroupedProduct(ctx, ctx.whole_stack, group_sizes_E, len(x_NC))
    inside = _inside(ctx, name)
    y, gates = adapter(x_NC, lambda x: base(x)[:, None], product, inside)
    if gates is not None and ctx.told is not None:
        ctx.told[name] = gates[:, 0]
    return y[:, 0]


def tell_of_rows(module, gates_TC, ctx) -> None:
    """Report the gates of the adapters of experts, summed over the rows of each token.

    Args:
      module: the experts.
      gates_TC: those of all adapters that have any, in the order of their names.
      ctx: `Context`.
    """
    if gates_TC.shape[1] == 0:
        return
    start = 0
    for _, adapter in sorted(module.adapters.items()):
        end = start + adapter.num_gates
        _tell(adapter, gates_TC[:, None, start:end], ctx)
        start = end


def _tell(adapter: Adapter, gates, ctx) -> None:
    """Put the report of an adapter into `ctx.told`; what it told before is added."""
    if gates is None or ctx.told is None:
        return
    gates_BLNE = gates.reshape(*ctx.segment_BL.shape, *gates.shape[-2:])
    own = {
        "losses": adapter.losses(gates_BLNE, ctx),
        "sums": gate_sums(adapter, gates_BLNE, ctx),
    }
    before = ctx.told.get(adapter.path)
    ctx.told[adapter.path] = (
        own if before is None else jax.tree.map(jnp.add, before, own)
    )


def gate_sums(adapter: Adapter, gates_BLNE, ctx) -> dict:
    """The float32 sums that figures of gates are made of, by type Y of sequences.

    They have no gradient. `moex/adapters/figures.py` makes the figures.
    """
    gates_BLNE = jax.lax.stop_gradient(gates_BLNE).astype(jnp.float32)
    type_B = adapter.types(ctx)
    if type_B is None:
        type_B = jnp.zeros(len(gates_BLNE), jnp.int32)
    type_BY = jax.nn.one_hot(type_B, adapter.num_types)
    counted_BL = adapter.counted(ctx).astype(jnp.float32)
    size_BLNE = jnp.abs(gates_BLNE)
    share_BLNE = size_BLNE / jnp.maximum(size_BLNE.sum(-1, keepdims=True), 1e-30)
    entropy_BLN = -jnp.sum(
        share_BLNE * jnp.log(jnp.maximum(share_BLNE, 1e-30)), axis=-1
    )
    used_BLNE = (share_BLNE >= USED / gates_BLNE.shape[-1]).astype(jnp.float32)

    def total(array):
        return jnp.einsum("by,bl,bl...->y...", type_BY, counted_BL, array)

    return {
        "gate_sum_YNE": total(size_BLNE),
        "used_sum_YNE": total(used_BLNE),
        "entropy_sum_YN": total(entropy_BLN),
        "tokens_Y": total(jnp.ones_like(counted_BL)),
    }


# A token uses an expert of an adapter whose gate is this part of an equal share.
USED = 0.1


def _inside(ctx, name: str):
    """The context of an adapter: a random key of its own."""
    return dataclasses.replace(ctx, key=fold_key(ctx.key, zlib.crc32(name.encode())))
