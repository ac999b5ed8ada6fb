"""What the report's checks know of a model before they look at figures."""

from moex.moe.chain import Chain
from moex.moe.experts.zero import Zero
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.report.health import most_experts
from tests.helpers import tiny_lm, tiny_moe


def model(*feed_forwards, repeat=1):
    return tiny_lm(Segment(pattern=feed_forwards, repeat=repeat))


def test_layers_are_numbered_with_dense_ones_and_copies():
    topp = tiny_moe(num_experts=8, router=TopP(p=0.5, k_max=3))
    found = most_experts(model(Dense(hidden=8), topp, tiny_moe(), repeat=2))
    assert found == {"001": 3, "004": 3}


def test_each_round_of_a_chain_has_its_own_router():
    moe = tiny_moe(num_experts=8)
    routers = (TopP(p=0.5, k_max=4), TopK(k=2), TopP(p=0.5))
    chain = Chain(moe=moe, iterations=3, routers=routers)
    assert most_experts(model(chain)) == {"000.1": 4, "000.3": 8}


def test_zero_computation_experts_are_none():
    """Figures count experts that compute, so 4 is the most of these 8 choices."""
    moe = tiny_moe(num_experts=4, zero=Zero(null=4), router=TopP(p=0.9))
    assert most_experts(model(moe)) == {"000": 4}
