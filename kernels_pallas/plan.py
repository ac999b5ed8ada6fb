"""The routing plan: slots sorted by expert, computed once per layer and step.

Only integer bookkeeping is done here, O(N) in memory; no array of size T x E is
ever made. The caller decides which slots to keep, by capacity or otherwise.

Legend: T tokens, K slots per token, N slots or sorted rows (T*K), E experts.
Slot t*K + j is the j-th choice of token t.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.device import platform


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """A permutation of the N slots that puts each expert's rows together.

    Attributes:
      order_N: int32, the slot of each sorted row; slots not kept come last.
      bounds: int32[E + 1]; expert e owns the rows bounds[e] to bounds[e + 1] - 1.
        Rows from bounds[E] on are those of slots not kept.
      row_TK: int32, the sorted row of each slot, the inverse of `order_N`.
    """

    order_N: jax.Array
    bounds: jax.Array
    row_TK: jax.Array

    @property
    def group_sizes_E(self):
        """The kept rows per expert, int32; the sum may be less than N."""
        return self.bounds[1:] - self.bounds[:-1]

    @property
    def token_N(self):
        """The token that each sorted row reads, int32."""
        return self.order_N // self.row_TK.shape[1]

    @property
    def kept_TK(self):
        """Whether each slot has a row of some expert, bool.

        It is read off the row, never off a gate of zero: a kept slot whose gate
        underflows to 0 still has a gate gradient.
        """
        return self.row_TK < self.bounds[-1]

    @property
    def safe_row_TK(self):
        """The rows, with row 0 for slots not kept: it exists and is in the cache."""
        return jnp.where(self.kept_TK, self.row_TK, 0)

    @property
    def real_N(self):
        """Whether each sorted row belongs to a kept slot, bool."""
        return jnp.arange(self.order_N.shape[0], dtype=jnp.int32) < self.bounds[-1]

    def first_rows(self, num_rows):
        """The plan with `num_rows` rows; it is right only if bounds[E] <= num_rows."""
        return replace(self, order_N=self.order_N[:num_rows])

    def truncated(self, num_rows):
        """The plan with at most `num_rows` rows; slots of later rows are not kept."""
        if num_rows >= self.order_N.shape[0]:
            return self
        bounds = jnp.minimum(self.bounds, num_rows)
        return replace(self, order_N=self.order_N[:num_rows], bounds=bounds)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """The places of slots in a buffer with gaps; `dispatch` and `combine` read it.

    Attributes:
      order_N: int32, the slot of each buffer row; any slot in a gap.
      row_TK: int32, the buffer row of each slot; any row for slots not kept.
      kept_TK: bool, whether the slot has a row.
      real_N: bool, False in gaps.
    """

    order_N: jax.Array
    row_TK: jax.Array
    kept_TK: jax.Array
    real_N: jax.Array

    @property
    def token_N(self):
        """The token that each buffer row reads, int32."""
        return self.order_N // self.row_TK.shape[1]

    @property
    def safe_row_TK(self):
        """The rows of the slots, with row 0 for slots not kept."""
        return jnp.where(self.kept_TK, self.row_TK, 0)


def make_plan(expert_TK, keep_TK, num_experts):
    """Make a Plan that sorts the kept slots stably by expert.

    It sorts packed integers once, expert * N + slot, which is stable by
    construction and was 1.6 times faster than a stable argsort (2 CPU cores,
    N = 8192, E = 64). Where the packed key would not fit int32, it uses argsort.

    Args:
      expert_TK: int[T, K], expert of each slot. A slot with an id outside
        [0, num_experts) is not kept, whatever `keep_TK` says.
      keep_TK: bool[T, K], False for slots that must not be computed.
      num_experts: E, a Python int.

    Returns:
      Plan; deterministic, slots of one expert in rising order.

    Raises:
      ValueError: on shapes or dtypes that do not fit.
    """
    _validate(expert_TK, keep_TK, num_experts)
    num_slots = expert_TK.size
    in_range_TK = (expert_TK >= 0) & (expert_TK < num_experts)
    id_TK = jnp.where(keep_TK & in_range_TK, expert_TK, num_experts)
    id_N = id_TK.reshape(num_slots).astype(jnp.int32)
    slot_N = jnp.arange(num_slots, dtype=jnp.int32)

    if (num_experts + 1) * num_slots < 2**31:
        key_N = lax.sort(id_N * num_slots + slot_N)
        order_N, sorted_id_N = key_N % num_slots, key_N // num_slots
    else:
        sorted_id_N, order_N = lax.sort((id_N, slot_N), num_keys=1, is_stable=True)

    bounds = jnp.searchsorted(
        sorted_id_N,
        jnp.arange(num_experts + 1, dtype=jnp.int32),
        # On an accelerator a loop is one launch for each step, instead of one in all.
        method="scan" if platform() == "cpu" else "scan_unrolled",
    ).astype(jnp.int32)
    row_N = (
        jnp.zeros(num_slots, jnp.int32)
        .at[order_N]
        .set(slot_N, unique_indices=True, mode="promise_in_bounds")
    )
    return Plan(
        order_N=order_N,
        bounds=bounds,
        row_TK=row_N.reshape(expert_TK.shape),
    )


def _validate(expert_TK, keep_TK, num_experts):
    if num_experts < 1:
        raise ValueError(f"make_plan needs num_experts >= 1; got {num_experts}.")
    if expert_TK.ndim != 2 or expert_TK.size == 0:
        raise ValueError(
            "make_plan needs expert_TK of rank 2 with at least one slot; got shape "
            f"{expert_TK.shape}."
        )
    if keep_TK.shape != expert_TK.shape:
        raise ValueError(
            "make_plan needs one keep flag per slot; got expert_TK "
            f"{expert_TK.shape} and keep_TK {keep_TK.shape}."
        )
    if not jnp.issubdtype(expert_TK.dtype, jnp.integer) or keep_TK.dtype != bool:
        raise ValueError(
            "make_plan needs integer experts and boolean keep flags; got expert_TK "
            f"{expert_TK.dtype} and keep_TK {keep_TK.dtype}."
        )
