"""Slots that are filled with rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.offload.slots import _fill


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32"])
def test_rows_come_to_their_slots_bit_for_bit(dtype):
    numbers = np.arange(-12, 12).reshape(6, 4)
    slots_CF, rows_NF = (jnp.asarray(own, dtype) for own in (numbers, 3 - numbers[:2]))
    expected_CF = np.asarray(slots_CF).copy()
    expected_CF[[4, 1]] = np.asarray(rows_NF)
    rows = [{"w": row_F} for row_F in rows_NF]
    found = _fill({"w": slots_CF}, rows, np.array([4, 1], np.int32))["w"]
    assert found.dtype == dtype
    assert np.asarray(found).tobytes() == expected_CF.tobytes()


def test_slots_in_bfloat16_are_not_turned_into_float32():
    """They would be all of them, for each row."""
    slots = {"w": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)}
    rows = [{"w": jax.ShapeDtypeStruct((16,), jnp.bfloat16)}]
    place_N = jax.ShapeDtypeStruct((1,), jnp.int32)
    assert "f32[8,16]" not in _fill.lower(slots, rows, place_N).compile().as_text()
