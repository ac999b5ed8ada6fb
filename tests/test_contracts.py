"""A part of a model is known by its contract class: what is none is refused by name."""

import dataclasses
import inspect

import pytest

from moex.config.base import ConfigError, check, from_dict
from moex.moe.chain import Chain
from moex.moe.contract import ExpertsConfig, FixedK, RouterConfig
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.narrow import Narrow
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.contract import AttentionConfig, FeedForwardConfig
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment

ATTENTION = Attention(heads=2)
MODULES = (ExpertsConfig, RouterConfig, FixedK, AttentionConfig, FeedForwardConfig)


def moe(**fields):
    own = {"router": TopK(k=1), "experts": Glu(hidden=4)}
    return MoE(num_experts=4, **own | fields)


def model(ffn=None, attention=ATTENTION):
    layers = (Segment(pattern=(Dense(hidden=4), ffn or moe())),)
    return LM(dim=8, attention=attention, layers=layers)


@dataclasses.dataclass(kw_only=True, slots=True)
class Uncounted(RouterConfig):
    """A router that forgets `expected_slots`."""

    def make(self, dim, num_experts, rngs):
        raise NotImplementedError


FEED_FORWARD = "a feed-forward config such as Dense or MoE"
WRONG = [
    (model(ATTENTION), f"layers[0].pattern[1] = 'Attention': must be {FEED_FORWARD}."),
    (
        model(moe(shared=ATTENTION)),
        f"pattern[1].shared = 'Attention': must be {FEED_FORWARD} or None.",
    ),
    (
        model(moe(router=ATTENTION)),
        "pattern[1].router = 'Attention': must be a router config such as TopK.",
    ),
    (
        model(moe(experts=TopK(k=1))),
        "pattern[1].experts = 'TopK': must be an experts config such as Glu.",
    ),
    (
        model(Narrow(latent=4, inner=Glu(hidden=4))),
        f"pattern[1].inner = 'Glu': must be {FEED_FORWARD}.",
    ),
    (
        model(Chain(moe=moe(), iterations=2, routers=(TopK(k=1), Glu(hidden=4)))),
        "pattern[1].routers[1] = 'Glu': must be a router config such as TopK.",
    ),
    (
        model(attention=Dense(hidden=4)),
        "config.attention = 'Dense': must be an attention config such as Attention or "
        "LatentAttention.",
    ),
    (
        LM(
            dim=8,
            attention=ATTENTION,
            layers=(Segment(pattern=(moe(),), attention=(moe(),)),),
        ),
        "layers[0].attention[0] = 'MoE': must be an attention config such as "
        "Attention or LatentAttention.",
    ),
    (
        model(moe(router=ExpertChoice(k=1), capacity_factor=1.0)),
        "capacity_factor = 1.0: must be None: ExpertChoice fills its experts evenly.",
    ),
]


@pytest.mark.filterwarnings("ignore::moex.config.base.ConfigWarning")
@pytest.mark.parametrize(("cfg", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_what_is_no_such_part_is_refused_by_the_field(cfg, message):
    with pytest.raises(ConfigError) as error:
        check(cfg)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_part_that_lacks_a_hook_cannot_be_made():
    with pytest.raises(TypeError, match="abstract method '?expected_slots"):
        Uncounted()
    tag = f"{Uncounted.__module__}.Uncounted"
    with pytest.raises(ConfigError, match=r"config.router: .* not a config class"):
        from_dict({"router": {"__config__": tag}})


@pytest.mark.parametrize("cls", MODULES)
def test_a_contract_itself_is_no_part(cls):
    """Of a config.json that names it: one line, not Python's TypeError."""
    assert inspect.isabstract(cls)
    tag = f"{cls.__module__}.{cls.__name__}"
    with pytest.raises(ConfigError, match=r"is not a config class of moex\."):
        from_dict({"__config__": tag})
