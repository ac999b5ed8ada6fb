"""make_plan: a stable permutation by expert, its inverse, and what is not kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import Plan, make_plan

# Few shapes, so that hypothesis meets compiled operations.
SHAPES = ((1, 1, 1), (7, 2, 5), (13, 3, 3), (5, 4, 40))


@st.composite
def slots(draw):
    """(expert_TK, keep_TK, E) with some ids out of range on either side."""
    num_tokens, k, num_experts = draw(st.sampled_from(SHAPES))
    size = num_tokens * k
    ids = st.lists(st.integers(-2, num_experts + 2), min_size=size, max_size=size)
    flags = st.lists(st.booleans(), min_size=size, max_size=size)
    shape = (num_tokens, k)
    expert_TK = np.array(draw(ids), np.int32).reshape(shape)
    return expert_TK, np.array(draw(flags)).reshape(shape), num_experts


def by_hand(expert_TK, keep_TK, num_experts):
    """order_N and group_sizes_E from Python lists."""
    groups = [[] for _ in range(num_experts + 1)]
    for slot, (e, kept) in enumerate(zip(expert_TK.flat, keep_TK.flat, strict=True)):
        groups[e if kept and 0 <= e < num_experts else num_experts].append(slot)
    return sum(groups, []), [len(group) for group in groups[:-1]]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(slots())
def test_plan_is_the_stable_permutation_by_expert(case):
    plan = jax.jit(make_plan, static_argnums=2)(*case)
    order, group_sizes = by_hand(*case)
    np.testing.assert_array_equal(plan.order_N, order)
    np.testing.assert_array_equal(plan.group_sizes_E, group_sizes)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(slots())
def test_row_is_the_inverse_of_order_and_kept_follows(case):
    expert_TK, keep_TK, num_experts = case
    plan = jax.jit(make_plan, static_argnums=2)(*case)
    order_N, row_N = np.asarray(plan.order_N), np.asarray(plan.row_TK).reshape(-1)
    np.testing.assert_array_equal(order_N[row_N], np.arange(order_N.size))
    in_range_TK = (expert_TK >= 0) & (expert_TK < num_experts)
    np.testing.assert_array_equal(plan.kept_TK, keep_TK & in_range_TK)
    np.testing.assert_array_equal(plan.token_N, order_N // expert_TK.shape[1])


def test_keys_too_large_to_pack_take_the_stable_sort():
    # (E + 1) * N = (3e8 + 1) * 8 > 2**31; only the shapes' sizes are large, so look
    # at the traced program instead of making E counters.
    shape = jax.ShapeDtypeStruct((4, 2), jnp.int32)
    keep = jax.ShapeDtypeStruct((4, 2), jnp.bool_)
    traced = jax.make_jaxpr(lambda e, k: make_plan(e, k, 300_000_000))(shape, keep)
    sorts = [eqn for eqn in traced.eqns if eqn.primitive.name == "sort"]
    assert [len(eqn.invars) for eqn in sorts] == [2]
    assert sorts[0].params["is_stable"]


def test_both_sorts_agree():
    rng = np.random.default_rng(0)
    # N = 1e6 slots and E = 3000 experts pass int32; E = 2000 do not.
    expert_TK = rng.integers(0, 2000, (500_000, 2)).astype(np.int32)
    keep_TK = rng.random((500_000, 2)) < 0.9
    packed, pairs = (make_plan(expert_TK, keep_TK, n) for n in (2000, 3000))
    kept = int(packed.group_sizes_E.sum())
    np.testing.assert_array_equal(packed.order_N, pairs.order_N)
    np.testing.assert_array_equal(packed.row_TK, pairs.row_TK)
    np.testing.assert_array_equal(packed.group_sizes_E, pairs.group_sizes_E[:2000])
    assert kept == keep_TK.sum()


def test_plan_is_a_pytree_of_int32():
    shape = jax.ShapeDtypeStruct((7, 3), jnp.int32)
    keep = jax.ShapeDtypeStruct((7, 3), jnp.bool_)
    plan = jax.eval_shape(lambda e, k: make_plan(e, k, 5), shape, keep)
    assert isinstance(plan, Plan)
    assert {leaf.dtype for leaf in jax.tree.leaves(plan)} == {jnp.dtype("int32")}
    shapes = (plan.order_N.shape, plan.bounds.shape, plan.row_TK.shape)
    assert shapes == ((21,), (6,), (7, 3))


def test_no_array_of_tokens_times_experts():
    shape = jax.ShapeDtypeStruct((64, 2), jnp.int32)
    keep = jax.ShapeDtypeStruct((64, 2), jnp.bool_)
    plan = jax.jit(make_plan, static_argnums=2)
    memory = plan.lower(shape, keep, 4096).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 4096  # a byte for each pair would be it


@pytest.mark.parametrize(
    ("expert", "keep", "num_experts", "message"),
    [
        (np.zeros((3, 2), np.int32), np.ones((2, 3), bool), 4, r"\(3, 2\).*\(2, 3\)"),
        (np.zeros(3, np.int32), np.ones(3, bool), 4, "rank 2"),
        (np.zeros((3, 2)), np.ones((3, 2), bool), 4, "float64"),
        (np.zeros((3, 2), np.int32), np.ones((3, 2)), 4, "float64"),
        (np.zeros((3, 2), np.int32), np.ones((3, 2), bool), 0, "num_experts >= 1"),
    ],
)
def test_errors_name_what_was_given(expert, keep, num_experts, message):
    with pytest.raises(ValueError, match=message):
        make_plan(expert, keep, num_experts)
