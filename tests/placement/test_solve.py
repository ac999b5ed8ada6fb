"""Placements: brute force on small instances, properties on random ones."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moex.config.base import ConfigError
from moex.placement import lsa, milp
from moex.placement.affinity import Affinity, Layer, Term
from moex.placement.problem import Problem, evened, packed
from moex.placement.solve import How, contiguous, place


def made(sizes, pairs, seed, *, blocks=None, most=20):
    """Random counts between the layers of `pairs`, and random load."""
    rng = np.random.default_rng(seed)
    terms = []
    for a, b in pairs:
        count_AB = rng.poisson(rng.exponential(most, (sizes[a], sizes[b])))
        terms.append(Term(a, b, np.triu(count_AB, 1) if a == b else count_AB))
    layers = [Layer(2 * i, E, (blocks or {}).get(i, ())) for i, E in enumerate(sizes)]
    load = tuple(rng.integers(0, 100, E) for E in sizes)
    return Affinity(layers=tuple(layers), terms=tuple(terms), load=load, tokens=1)


def in_row(L):
    return list(itertools.pairwise(range(L)))


def cost(placement, affinity):
    return round(placement.crossings(affinity).all * affinity.total)


def every_placement(E, P):
    own = np.repeat(np.arange(P), E // P).tolist()
    return [np.array(device) for device in sorted(set(itertools.permutations(own)))]


def brute_force(affinity, P, allowed=lambda layer, device_E: True):
    """The least cost of all placements; None: none is allowed."""
    choices = [
        [d for d in every_placement(own.experts, P) if allowed(i, d)]
        for i, own in enumerate(affinity.layers)
    ]
    costs = (
        sum(
            int(n[device[a][:, None] != device[b][None]].sum())
            for a, b, n in affinity.terms
        )
        for device in itertools.product(*choices)
    )
    return min(costs, default=None)


def assert_balanced(placement):
    for layer, device_E in zip(placement.layers, placement.device, strict=True):
        counts = np.bincount(device_E, minlength=placement.devices)
        assert counts.tolist() == [layer.experts // placement.devices] * len(counts)
    for i, layer in enumerate(placement.layers):
        every = sorted(e for own in placement.experts(i) for e in own)
        assert every == list(range(layer.experts))


SHAPES = {
    "three layers": ((4, 4, 4), in_row(3)),
    "rounds of a chain": ((4, 4), [(0, 0), (0, 1), (1, 1)]),
    "layers of other sizes": ((4, 2, 6), in_row(3)),
    "within layers": ((6,), [(0, 0)]),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_both_methods_are_the_best_of_all_placements(shape, seed):
    """The instance of the paper notes is the first: 6 placements of each layer."""
    affinity = made(*SHAPES[shape], seed)
    least = brute_force(affinity, 2)
    exact = place(affinity, How(devices=2, method="milp"))
    assert cost(exact, affinity) == least
    assert exact.gap == 0
    assert exact.notes == ()
    quick = place(affinity, How(devices=2))
    assert cost(quick, affinity) == least  # with 20 starts, on these
    for found in (exact, quick):
        assert_balanced(found)


@pytest.mark.parametrize("seed", range(3))
def test_three_devices_by_brute_force(seed):
    affinity = made((6, 3), [(0, 1), (0, 0)], seed)
    least = brute_force(affinity, 3)
    for method in ("lsa", "milp"):
        assert cost(place(affinity, How(devices=3, method=method)), affinity) == least


@pytest.mark.parametrize("seed", range(4))
def test_a_limit_of_load_is_kept_and_the_best_of_those_that_keep_it(seed):
    affinity, slack = made((4, 4, 4), in_row(3), seed), 0.4

    def allowed(layer, device_E):
        load_P = np.bincount(device_E, affinity.load[layer])
        return load_P.max() <= (1 + slack) * load_P.mean() + 1e-9

    least = brute_force(affinity, 2, allowed)
    for method in ("lsa", "milp"):
        how = How(devices=2, method=method, slack=slack)
        if least is None:
            with pytest.raises(ConfigError, match="allow more load"):
                place(affinity, how)
            continue
        found = place(affinity, how)
        assert found.imbalance(affinity) <= 1 + slack + 1e-9
        assert cost(found, affinity) == least, method
    assert (least is None) == (seed == 3)


def test_a_limit_that_none_keeps_is_said():
    affinity = made((4, 4), in_row(2), 0)
    affinity.load[0][:] = [90, 1, 1, 1]
    for method in ("lsa", "milp"):
        with pytest.raises(ConfigError, match=r"--slack = 0\.1: .*allow more load"):
            place(affinity, How(devices=2, method=method, slack=0.1))


@hypothesis.given(
    seed=st.integers(0, 2**20),
    L=st.integers(2, 5),
    P=st.sampled_from([2, 3, 4]),
    share=st.integers(1, 3),
    chain=st.booleans(),
)
def test_placements_are_balanced_and_never_worse_than_contiguous(
    seed, L, P, share, chain
):
    sizes = (P * share,) * L
    pairs = in_row(L) + ([(0, 0)] if chain else [])
    affinity = made(sizes, pairs, seed)
    how = How(devices=P, restarts=2, seed=seed)
    found = place(affinity, how)
    assert_balanced(found)
    before = cost(contiguous(affinity.layers, P), affinity)
    assert cost(found, affinity) <= before
    again = place(affinity, how)
    for one, other in zip(found.device, again.device, strict=True):
        np.testing.assert_array_equal(one, other)


@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 2**20))
def test_coordinate_descent_is_never_below_the_proven_optimum(seed):
    affinity = made((4, 4, 4, 4), in_row(4), seed)
    exact = place(affinity, How(devices=2, method="milp"))
    assert exact.gap == 0
    quick = place(affinity, How(devices=2, restarts=0))
    assert cost(quick, affinity) >= cost(exact, affinity)


@pytest.mark.parametrize("method", ["lsa", "milp"])
def test_nodes_come_first_and_devices_inside_of_them(method):
    """Pairs that must be together in a node, and tighter ones on a device."""
    E, rng = 8, np.random.default_rng(0)
    first, second = rng.permutation(E), rng.permutation(E)
    count_AB = np.zeros((E, E), int)
    for i in range(E):
        for j in range(E):
            count_AB[first[i], second[j]] = (
                1 + 10 * (i // 4 == j // 4) + 100 * (i // 2 == j // 2)
            )
    layers, load = (Layer(0, E), Layer(1, E)), (np.ones(E, int),) * 2
    terms = (Term(0, 1, count_AB),)
    affinity = Affinity(layers=layers, terms=terms, load=load, tokens=1)
    found = place(affinity, How(devices=4, nodes=2, method=method))
    assert_balanced(found)
    crossings = found.crossings(affinity)
    assert crossings.between * affinity.total == pytest.approx(32)
    assert crossings.within * affinity.total == pytest.approx(16 * 11)
    node_E = found.device[0] // 2
    assert [len(set(node_E[first[4 * n : 4 * n + 4]])) for n in range(2)] == [1, 1]


def blocks_of(placement, layer, size):
    """The groups of each run of `size` experts in the order of devices."""
    order = [e for own in placement.experts(layer) for e in own]
    runs = [order[i : i + size] for i in range(0, len(order), size)]
    return [len({e // size for e in run}) for run in runs]


@pytest.mark.parametrize(("devices", "nodes"), [(2, 1), (4, 1), (8, 1), (8, 2), (8, 4)])
@pytest.mark.parametrize("method", ["lsa", "milp"])
def test_groups_stay_whole_on_devices_and_over_devices(devices, nodes, method):
    blocks = {0: (4,), 1: (2, 8)}
    affinity = made((16, 16, 16), in_row(3), 3, blocks=blocks)
    how = How(devices=devices, nodes=nodes, method=method, restarts=2, time_limit=1)
    found = place(affinity, how)
    assert_balanced(found)
    assert set(blocks_of(found, 0, 4)) == {1}
    assert set(blocks_of(found, 1, 2)) == {1}
    assert set(blocks_of(found, 1, 8)) == {1}


def test_experts_that_nobody_uses_stay_where_they_are():
    affinity = made((8, 8), in_row(2), 0)
    affinity.terms[0].count_AB[:] = 0
    found = place(affinity, How(devices=4))
    for device_E, before_E in zip(
        found.device, contiguous(affinity.layers, 4).device, strict=True
    ):
        np.testing.assert_array_equal(device_E, before_E)


def test_without_time_the_program_falls_back_to_coordinate_descent():
    affinity = made((16,) * 6, in_row(6), 1)
    found = place(affinity, How(devices=8, method="milp", time_limit=1e-3, restarts=1))
    assert_balanced(found)
    assert found.notes
    assert "lsa" in found.notes[0]
    assert 0 < found.gap <= 1
    quick = place(affinity, How(devices=8, restarts=1))
    assert cost(found, affinity) <= cost(quick, affinity)


def test_a_program_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(milp, "MOST_ROWS", 100)
    affinity = made((4, 4), in_row(2), 0, most=50)
    with pytest.raises(ConfigError, match="too many .*use --method=lsa"):
        place(affinity, How(devices=4, method="milp"))


BAD = {
    "--devices = 1: must be from 2": {"devices": 1},
    "--devices = 0: must be from 2": {"devices": 0},
    r"--devices = 3: must divide the 8 experts of layer 0: 2, 4, 8\.": {"devices": 3},
    "--devices = 16: must divide the 8 experts": {"devices": 16},
    "--nodes = 3: must be a divisor of --devices = 4": {"devices": 4, "nodes": 3},
    "--nodes = 0: must be a divisor": {"devices": 4, "nodes": 0},
    "--method = 'ilp'.*milp": {"devices": 4, "method": "ilp"},
    "--slack = -1: must be at least 0": {"devices": 4, "slack": -1},
    "--slack = nan": {"devices": 4, "slack": float("nan")},
    "--restarts = -1": {"devices": 4, "restarts": -1},
    "--time-limit = 0: must be above 0": {"devices": 4, "time_limit": 0},
}


@pytest.mark.parametrize("told", BAD)
def test_choices_that_do_not_fit_are_named(told):
    with pytest.raises(ConfigError, match=told):
        place(made((8, 8), in_row(2), 0), How(**BAD[told]))


def test_groups_that_do_not_fit_devices_are_named():
    affinity = made((12, 12), in_row(2), 0, blocks={1: (4,)})
    with pytest.raises(ConfigError, match="groups of 4 that stay together do not fit"):
        place(affinity, How(devices=2))
    affinity = made((12, 12), in_row(2), 0, blocks={1: (4,)})
    with pytest.raises(ConfigError, match="do not fit into each other"):
        place(affinity, How(devices=12, nodes=2))


def test_swaps_count_what_the_cost_counts():
    """The gain of a swap in a layer with pairs of its own is that of the cost."""
    affinity = made((8, 8), [(0, 0), (0, 1)], 5)
    problem = Problem(sizes=(8, 8), terms=affinity.terms, devices=4)
    device = problem.contiguous()
    before = problem.cost(device)
    near = lsa._Neighbours(problem, 0)
    gained = lsa._swap(problem, device, 0, near)
    assert gained > 0
    assert problem.cost(device) == before - gained


@hypothesis.given(
    load=st.lists(st.integers(0, 50), min_size=12, max_size=12),
    devices=st.sampled_from([2, 3, 4, 6, 12]),
)
def test_packing_gives_each_device_as_many_and_swaps_make_it_more_even(load, devices):
    first_U = packed(load, devices)
    second_U = evened(np.array(load, float), first_U, devices)
    for device_U in (first_U, second_U):
        counts = np.bincount(device_U, minlength=devices)
        assert counts.tolist() == [12 // devices] * devices
    before, after = (np.bincount(d, load).max() for d in (first_U, second_U))
    assert after <= before
