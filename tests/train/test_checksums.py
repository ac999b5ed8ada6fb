"""Checksums of arrays: any change shows, and sharding does not.

D, F widths
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from moex.runs.checksums import checksums
from tests.helpers import mesh_of

WORDS = {"float32": np.uint32, "bfloat16": np.uint16, "int8": np.uint8}


@st.composite
def arrays(draw):
    """(dtype, bit patterns, two places)."""
    dtype = draw(st.sampled_from(sorted(WORDS)))
    size = draw(st.sampled_from([1, 2, 37]))
    top = np.iinfo(WORDS[dtype]).max
    edges = st.sampled_from([0, 1, top, top // 2 + 1])
    bits = draw(st.lists(edges | st.integers(0, top), min_size=size, max_size=size))
    places = st.integers(0, size - 1)
    return dtype, np.array(bits, WORDS[dtype]), draw(places), draw(places)


def checksum(dtype, bits):
    return checksums(jnp.asarray(bits.view(jnp.dtype(dtype))))


@hypothesis.given(arrays(), st.integers(1, 2**32 - 1))
def test_any_change_of_one_element_shows(array, change):
    dtype, bits, place, _ = array
    other = bits.copy()
    other[place] ^= max(1, change & np.iinfo(bits.dtype).max)
    assert checksum(dtype, bits) != checksum(dtype, other)


@hypothesis.given(arrays())
def test_any_swap_of_two_elements_shows(array):
    dtype, bits, i, j = array
    other = bits.copy()
    other[[i, j]] = other[[j, i]]
    same = np.array_equal(bits, other)
    assert (checksum(dtype, bits) == checksum(dtype, other)) == same


def test_swapped_signs_show():
    """x and -x differ by 2**31, which the weighted sum alone would miss."""
    x = np.linspace(1, 2, 8, dtype=np.float32)
    for i in range(1, 8):
        a, b = x.copy(), x.copy()
        a[i], b[0], b[i] = -x[0], -x[0], x[0]
        assert checksums(a) != checksums(b)


def test_shape_and_name_are_part_of_it():
    x = jnp.arange(6.0)
    assert checksums({"a": x}) != checksums({"b": x})
    assert checksums({"a": x, "b": x}).keys() == {"['a']", "['b']"}
    assert list(checksums({"a": x}).values()) == list(checksums({"b": x}).values())


SPECS = [(), ("fsdp",), (None, "fsdp"), (("data", "fsdp"),), ("data", "fsdp")]


@pytest.mark.parametrize("spec", SPECS)
def test_checksums_do_not_depend_on_sharding(spec):
    rng = np.random.default_rng(0)
    tree = {
        "w_DF": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
        "u_DF": jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16),
    }
    expected = checksums(tree)
    place = NamedSharding(mesh_of(8, data=2, fsdp=4), PartitionSpec(*spec))
    assert checksums(jax.device_put(tree, place)) == expected
