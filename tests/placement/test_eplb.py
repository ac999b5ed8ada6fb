"""Replicas by load: the example of EPLB, and what must hold for every load."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moex.config.base import ConfigError
from moex.placement.eplb import replicate

LOADS = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
REPLICAS = (
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
)


@pytest.mark.parametrize("row", [0, 1])
def test_the_example_of_eplb(row):
    """Its README: 16 replicas, 4 groups, 2 nodes, 8 devices."""
    found = replicate(LOADS[row], 16, 8, nodes=2, groups=4)
    assert found.expert_X.tolist() == REPLICAS[row]


@hypothesis.given(
    load=st.lists(st.integers(0, 200), min_size=8, max_size=8),
    sizes=st.sampled_from([(8, 4, 1, 1), (16, 8, 2, 4), (12, 4, 2, 2), (12, 4, 2, 1)]),
)
def test_every_expert_has_a_replica_and_load_is_shared(load, sizes):
    replicas, devices, *_ = sizes
    found = replicate(load, *sizes)
    count_E = np.bincount(found.expert_X, minlength=8)
    assert (count_E >= 1).all()
    assert count_E.sum() == replicas
    share_X = (np.array(load) / count_E)[found.expert_X]
    np.testing.assert_allclose(found.load_P, share_X.reshape(devices, -1).sum(1))
    np.testing.assert_allclose(found.load_P.sum(), sum(load), atol=1e-9)
    if count_E.max() > 1 and sizes[2] == 1:  # no expert would rather have a copy
        e = int(np.argmax(np.array(load) / count_E))
        taken = np.flatnonzero(count_E > 1)
        before = np.array(load)[taken] / (count_E[taken] - 1)
        assert load[e] / count_E[e] <= before.min() + 1e-9


def test_numbers_that_do_not_fit_are_named():
    for sizes, told in {
        (15, 8): "--replicas = 15: must be a multiple",
        (8, 4): "--replicas = 8: .*from the 12 experts",
        (16, 8, 3): "--nodes = 3: must be a divisor of --devices = 8",
    }.items():
        with pytest.raises(ConfigError, match=told):
            replicate(LOADS[0], *sizes)
