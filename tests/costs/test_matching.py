"""Models of equal size: the best integer widths, and what cannot be matched."""

import dataclasses

import pytest

from moex.config.base import ConfigError
from moex.costs.matching import MEASURES, hidden_widths, match
from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.lowrank import LowRank
from moex.moe.layer import MoE
from moex.moe.narrow import Narrow
from moex.moe.routers.topk import TopK
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests.helpers import tiny_lm, tiny_moe

LENGTH = 32


def lm(ffn, repeat=2):
    return tiny_lm(Segment(pattern=(ffn,), repeat=repeat))


def cost(model, by):
    return MEASURES[by](model_cost(model, model_spec(model), LENGTH))


def moe(hidden, k=2, **fields):
    return MoE(num_experts=8, router=TopK(k=k), experts=Glu(hidden=hidden), **fields)


@pytest.mark.parametrize("by", MEASURES)
def test_the_closest_width_is_found(by):
    """One width: no other integer comes closer."""
    model, like = lm(moe(64)), lm(Dense(hidden=100))
    found = match(model, like, by=by, seq_len=LENGTH)
    (path,), (width,) = found.hidden.keys(), found.hidden.values()
    assert path == "model.layers[0].pattern[0].experts.hidden"
    assert found.model.layers[0].pattern[0].experts.hidden == width
    assert found.target == cost(like, by)
    assert found.cost == cost(found.model, by)
    assert found.difference == found.cost / found.target - 1

    def miss(hidden):
        return abs(cost(lm(moe(hidden)), by) - found.target)

    assert miss(width) <= min(miss(width - 1), miss(width + 1))


def test_an_exact_match_by_hand():
    """Two of eight experts of width 12 are a dense layer of width 24 and a router.

    The router is D * E = 16 * 8 per token, a width has 3 * D = 48.
    """
    found = match(lm(Dense(hidden=99)), lm(moe(18)), by="active", seq_len=LENGTH)
    assert list(found.hidden.values()) == [39]  # 36 + 128 / 48 = 38.7
    assert found.cost - found.target == 2 * (39 * 48 - 36 * 48 - 128)


def test_a_chain_does_the_work_of_twice_the_experts():
    """Two rounds of k = 1 are k = 2 and one more evaluation of the router."""
    chain = Chain(moe=moe(64, k=1), iterations=2, routers="shared")
    found = match(lm(chain), lm(moe(64, k=2)), by="flops", seq_len=LENGTH)
    # The router has 128 numbers, a width 2 * 48 per token: 64 - 128 / 96 = 62.7.
    assert list(found.hidden.values()) == [63]
    assert found.cost - found.target == 2 * 6 * (128 - 96)


@pytest.mark.thorough
def test_all_widths_change_by_one_factor():
    """Experts, their shared expert and a dense layer, in all kinds of places."""
    shared = moe(16, shared=Dense(hidden=40))
    latent = tiny_moe(experts=Latent(hidden=16, latent=4, group=4), shared=None)
    model = tiny_lm(
        Segment(pattern=(Dense(hidden=40), shared)),
        Segment(pattern=(Chain(moe=latent, iterations=2),), repeat=2),
        Segment(pattern=(Narrow(latent=8, inner=moe(16)),)),
    )
    like = lm(Dense(hidden=300), repeat=5)
    found = match(model, like, by="params", seq_len=LENGTH)
    old, new = hidden_widths(model), found.hidden
    assert old.keys() == new.keys()
    assert [path.removeprefix("model.layers") for path in new] == [
        "[0].pattern[0].hidden",
        "[0].pattern[1].experts.hidden",
        "[0].pattern[1].shared.hidden",
        "[1].pattern[0].moe.experts.hidden",
        "[2].pattern[0].inner.experts.hidden",
    ]
    small = {n for path, n in new.items() if old[path] == 16}
    (small,), (large,) = small, {n for path, n in new.items() if old[path] == 40}
    assert abs(large - 2.5 * small) <= 2.5 + 1
    assert abs(found.difference) < 0.01
    assert list(old.values()) == [40, 16, 40, 16, 16]  # the model given is as it was


def test_a_model_matches_itself():
    model = tiny_lm()
    found = match(model, model, by="flops", seq_len=LENGTH)
    assert found.hidden == hidden_widths(model)
    assert found.difference == 0
    assert found.model == model


def test_low_rank_experts_are_matched_by_their_rank():
    """A rank has 2 * D per expert, a width 3 * D: rank 15 is width 10."""
    low_rank = lm(tiny_moe(8, experts=LowRank(rank=2), shared=None))
    found = match(
        low_rank,
        lm(tiny_moe(8, shared=None, experts=Glu(hidden=10))),
        by="params",
        seq_len=LENGTH,
    )
    assert found.hidden == {"model.layers[0].pattern[0].experts.rank": 15}
    assert found.difference == 0


def test_what_cannot_be_matched():
    large = dataclasses.replace(lm(moe(8)), vocab=10_000)
    message = r"match by params: the other model costs .* with hidden widths of 1\."
    with pytest.raises(ConfigError, match=message):
        match(large, tiny_lm(), by="params", seq_len=LENGTH)
    with pytest.raises(ConfigError, match="Did you mean 'flops'"):
        match(large, large, by="flop", seq_len=LENGTH)
