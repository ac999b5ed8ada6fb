"""What `examine` finds in the figures that a run has logged.

S logged steps
"""

import numpy as np
import pytest

from moex.moe.chain import Chain
from moex.moe.experts.zero import Zero
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.report import health, material
from moex.runs.directory import RunDir
from tests import runs
from tests.helpers import tiny_lm, tiny_moe
from tests.report import pages

S = 30  # of which the last three are looked at
MOST = 3  # experts of a token of the top-p router
NATS = np.log(4)  # the entropy of four equal probabilities


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """`examined(**figures)`: the health of a run that has logged them in layer 1.

    Layer 1 of two has four experts; each figure is one number, or one a line.
    """
    folder = tmp_path_factory.mktemp("health")

    def examined(dynamic=False, **figures):
        cfg = runs.config(folder, "model.vocab=257")
        if dynamic:
            cfg.model.layers[1].pattern[0].router = TopP(p=0.5, k_max=MOST)
        run = tmp_path_factory.mktemp("run")
        RunDir(run).save_config(cfg)
        series = {k: np.broadcast_to(v, S).tolist() for k, v in figures.items()}
        lines = []
        for s in range(S):
            own = {name: values[s] for name, values in series.items()}
            load = {"001": pages.healthy(10 * s)["001"]}
            lines.append(pages.routing_line(10 * s, load, **own))
        pages.write_lines(run / "routing.jsonl", lines)
        return health.examine(material.read(RunDir(run)))

    return examined


def late(value, other):
    """One value until the end of a run, and another one in the last three lines."""
    return np.where(np.arange(S) < S - 3, other, value)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"experts_per_token": 0.95 * MOST}, "gives 2.85 on average: near all of 3 "),
        ({"experts_per_token": late(MOST, 2)}, "gives 3 on average: near all of 3 "),
        ({"experts_per_token": 1.05}, "gives 1.05 on average: near one "),
    ],
)
def test_a_saturated_top_p_router(examined, figures, said):
    found = examined(dynamic=True, **figures)
    assert found.headline == "Warnings: saturated router"
    (text,) = found.groups["saturated router"]
    assert text.startswith("layer 1: ") and said in text
    # One that gives every token as many by its config is not saturated.
    assert examined(**figures).findings == ()


def test_a_top_p_router_that_is_not_saturated(examined):
    for mean in (1.15, 0.85 * MOST, late(2, MOST)):
        found = examined(dynamic=True, experts_per_token=mean)
        assert found.findings == () and "saturated routers" in found.checked
    assert "saturated routers" not in examined().checked


@pytest.mark.parametrize(
    ("kind", "ill", "well", "said"),
    [
        (
            "entropy collapse",
            {"entropy": late(0.09 * NATS, 1.2)},
            {"entropy": late(0.11 * NATS, 0.01)},
            "probabilities is 0.125 nats, 9 % of that of equal ones",
        ),
        (
            "uneven devices",
            {"device_violation": late(0.75, 0)},
            {"device_violation": late(0.45, 3)},
            "the fullest device has 1.75 times the mean load",
        ),
        (
            "dropped tokens",
            {"dropped_frac": late(0.06, 0)},
            {"dropped_frac": late(0.04, 0.5)},
            "6 % of the slots are over capacity",
        ),
        (
            "lost tokens",
            {"lost_frac": late(0, 0.002)},
            {"lost_frac": 0.0},
            "up to 0.2 % of the slots found no room",
        ),
        (
            "unrouted tokens",
            {"unrouted_frac": late(0.2, 0)},
            {"unrouted_frac": 0.2, "zero_frac": 0.1},  # where it is meant
            "20 % of the tokens are chosen by no expert",
        ),
        (
            "growing logits",
            {"logit_norm": np.linspace(5, 100, S)},
            {"logit_norm": np.linspace(50, 100, S)},
            "the norm of a token's router logits is ",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_found_at_the_end_of_a_run(examined, kind, ill, well, said):
    found = examined(**ill)
    assert found.headline == f"Warnings: {kind}"
    (text,) = found.groups[kind]
    assert text.startswith("layer 1: ") and said in text
    assert examined(**well).headline == "No warnings"


def test_devices_are_looked_at_where_there_are_several(examined):
    what = "balance of devices"
    one, two = examined(), examined(device_violation=0.1)
    assert f"{what}, for experts lie on one device" in one.unchecked
    assert what not in one.checked and what in two.checked


# How many experts a token may have.


def model(*feed_forwards, repeat=1):
    return tiny_lm(Segment(pattern=feed_forwards, repeat=repeat))


def test_layers_are_numbered_with_dense_ones_and_copies():
    topp = tiny_moe(num_experts=8, router=TopP(p=0.5, k_max=3))
    found = health.most_experts(model(Dense(hidden=8), topp, tiny_moe(), repeat=2))
    assert found == {"001": 3, "004": 3}


def test_each_round_of_a_chain_has_its_own_router():
    moe = tiny_moe(num_experts=8)
    routers = (TopP(p=0.5, k_max=4), TopK(k=2), TopP(p=0.5))
    chain = Chain(moe=moe, iterations=3, routers=routers)
    assert health.most_experts(model(chain)) == {"000.1": 4, "000.3": 8}


def test_zero_computation_experts_are_none():
    """Figures count experts that compute, so 4 is the most of these 8 choices."""
    moe = tiny_moe(num_experts=4, zero=Zero(null=4), router=TopP(p=0.9))
    assert health.most_experts(model(moe)) == {"000": 4}
