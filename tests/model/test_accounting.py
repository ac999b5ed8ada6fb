"""Costs of a model, by hand."""

import types

import jax
import numpy as np
import optax
import pytest

from moex.adapters.lora import LoRA
from moex.adapters.v2 import AdapterV2, Visual
from moex.model import accounting
from moex.model.accounting import device_peak_flops, model_cost, model_table
from moex.model.losses import moe_layers
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.lowrank import LowRank
from moex.moe.experts.zero import Zero
from moex.moe.layer import MoE
from moex.moe.narrow import Narrow
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.hash import Hash
from moex.moe.routers.soft import Soft
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests.helpers import context

D, V, LENGTH = 8, 10, 6
MOE = MoE(
    num_experts=4,
    router=TopK(k=2, bias_rate=0.1),
    experts=Glu(hidden=3),
    shared=Dense(hidden=5),
)


def small(**fields):
    """A dense layer, then two MoE layers; 4 query heads and 2 key/value heads of 2."""
    return LM(
        dim=D,
        vocab=V,
        attention=Attention(heads=4, kv_heads=2, qk_norm=True),
        layers=(
            Segment(pattern=(Dense(hidden=7),)),
            Segment(pattern=(MOE,), repeat=2),
        ),
        **fields,
    )


def cost_of(model):
    return model_cost(model, model_spec(model), LENGTH)


def test_parameters_by_hand():
    cost = cost_of(small())
    assert cost.total == {
        "embedding": 10 * 8,
        "attention": 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8),  # q, k and v, out
        "router": 2 * 8 * 4,  # the bias is no parameter
        "experts": 2 * 4 * (3 * 8 * 3),
        "dense": 3 * 8 * 7 + 2 * (3 * 8 * 5),  # and the shared experts
        "norms": 3 * (8 + 8 + 2 + 2) + 8,  # before both parts, of q and k; the last
        "logits": 8 * 10,
        "adapters": 0,
    }
    assert cost.num_params == sum(cost.total.values())


def test_active_parameters_by_hand():
    """Two of four experts: half of the experts, all of the rest."""
    cost = cost_of(small())
    assert cost.active == cost.total | {"experts": cost.total["experts"] / 2}
    assert cost.num_active == cost.num_params - cost.total["experts"] // 2


def test_flops_by_hand():
    cost = cost_of(small())
    matrices = sum(cost.active[g] for g in ("attention", "router", "experts", "dense"))
    matrices += 8 * 10  # logits; the look-up of the embedding is no matmul
    # Scores and values: 2 FLOPs each per head width (8 in all) and visible position,
    # which are 3 of 6 on average; 3 layers.
    attention = 3 * (2 + 2) * 8 * 3
    assert cost.train_flops == 3 * (2 * matrices + attention)


def test_tied_embeddings_are_one_matrix_that_is_multiplied():
    tied, untied = cost_of(small(tied_embeddings=True)), cost_of(small())
    assert tied.total == untied.total | {"logits": 0}
    assert tied.num_params == untied.num_params - 80
    assert tied.train_flops == untied.train_flops


def test_a_pattern_of_two_kinds():
    """Each block has the share of its own router."""
    one = MoE(num_experts=8, router=TopK(k=1), experts=Glu(hidden=3))
    layers = (Segment(pattern=(MOE, one), repeat=3),)
    model = LM(dim=D, vocab=V, attention=Attention(heads=2), layers=layers)
    cost = cost_of(model)
    assert cost.total["experts"] == 3 * (4 + 8) * 72
    assert cost.active["experts"] == 3 * (2 + 1) * 72


def test_the_table_has_every_group_and_the_totals():
    model = small()
    text = model_table(model, model_spec(model), optax.sgd(0.1), LENGTH)
    cost = cost_of(model)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    for group in (g for g in accounting.GROUPS if g != "adapters"):
        active = f"{round(cost.active[group]):,}"
        assert lines[group] == [f"{cost.total[group]:,}", active]
    assert lines["total"] == [f"{cost.num_params:,}", f"{cost.num_active:,}"]
    assert "3 layers, width 8, vocabulary 10" in text
    gib = 8 * cost.num_params / 2**30  # float32 weights and gradients; SGD keeps none
    assert f"{gib:.3g} GiB of weights, gradients and optimizer state" in text


# Every kind of layer. D = 8; E = 4 experts; a Glu of width 3 has 3 * 8 * 3 = 72
# parameters, a router 8 per choice, the shared Dense of width 5 3 * 8 * 5 = 120.


def moe(experts=None, router=None, **fields):
    return MoE(
        num_experts=4,
        router=router or TopK(k=2),
        experts=experts or Glu(hidden=3),
        **fields,
    )


def ffn_cost(ffn):
    """(parameters, active ones, numbers multiplied per token) of a feed-forward."""
    model = LM(
        dim=D,
        vocab=V,
        attention=Attention(heads=2),
        layers=(Segment(pattern=(ffn,), repeat=2),),
    )
    (block,) = cost_of(model).blocks
    assert block.repeat == 2
    others = 4 * 8 * 8 + 2 * 8  # attention and two norms
    return (
        sum(block.total().values()) - others,
        sum(block.active().values()) - others,
        (block.forward_flops() - block.score_flops) / 2 - 4 * 8 * 8,
    )


LATENT = Latent(hidden=3, latent=2, group=2)  # two groups
# Down whole: 4 * 3 * 8; own factors of gate and up: 2 * 4 * 2 * 3; shared ones, two
# groups: 2 * 2 * 8 * 2.
LATENT_SIZE = 96 + 48 + 64
CHAIN = Chain(moe=moe(shared=Dense(hidden=5)), iterations=3)
BY_HAND = {
    "top-k": (moe(), 288 + 32, 144 + 32, 144 + 32),
    # Biases of both input projections and of the output: added, not multiplied.
    "bias": (
        moe(Glu(hidden=3, bias=True)),
        288 + 4 * (6 + 8) + 32,
        144 + 2 * (6 + 8) + 32,
        144 + 32,
    ),
    # Uniform routing uses floor(0.7 * 4) + 1 = 3.
    "top-p": (moe(router=TopP(p=0.7, k_max=3)), 320, 216 + 32, 216 + 32),
    "top-p, k_max": (moe(router=TopP(p=0.7, k_max=2)), 320, 144 + 32, 144 + 32),
    "expert choice": (moe(router=ExpertChoice(k=1.5)), 320, 108 + 32, 108 + 32),
    "hash": (moe(router=Hash(k=2)), 288, 144, 144),
    "soft": (moe(router=Soft()), 320, 320, 320),
    # Two slots of eight choices, four of them real: one expert. Two constant experts
    # have 8 + 16 each and are computed for every token.
    "zero": (
        moe(zero=Zero(null=1, copy=1, constant=2)),
        288 + 64 + 48,
        72 + 64 + 48,
        72 + 64 + 48,
    ),
    "shared with gate": (
        moe(shared=Dense(hidden=5), shared_gate=True),
        320 + 120 + 8,
        176 + 120 + 8,
        176 + 120 + 8,
    ),
    # One slot meets one of two groups; three slots meet both.
    "latent, k = 1": (
        moe(LATENT, TopK(k=1)),
        LATENT_SIZE + 32,
        24 + 12 + 32 + 32,
        24 + 12 + 32 + 32,
    ),
    "latent, k = 3": (
        moe(LATENT, TopK(k=3)),
        LATENT_SIZE + 32,
        72 + 36 + 64 + 32,
        72 + 36 + 64 + 32,
    ),
    "low rank": (moe(LowRank(rank=2)), 4 * 32 + 32, 2 * 32 + 32, 2 * 32 + 32),
    # Three rounds of two: six evaluations of four experts, all parameters once; three
    # routers once each; the shared expert three times.
    "chain": (CHAIN, 288 + 96 + 120, 288 + 96 + 120, 432 + 96 + 360),
    "chain, shared router and shared expert once": (
        Chain(
            moe=moe(shared=Dense(hidden=5), shared_gate=True),
            iterations=3,
            routers="shared",
            shared_once=True,
        ),
        288 + 32 + 128,
        288 + 32 + 128,
        432 + 3 * 32 + 128,
    ),
    "chain of other routers": (
        Chain(moe=moe(), iterations=2, routers=(TopK(k=1), TopP(p=0.3, k_max=3))),
        288 + 64,
        216 + 64,  # 1 + (floor(0.3 * 4) + 1) of 4
        216 + 64,
    ),
    # Two rounds of one slot may meet both groups, and meet one group each.
    "chain of latent": (
        Chain(moe=moe(LATENT, TopK(k=1)), iterations=2),
        LATENT_SIZE + 64,
        48 + 24 + 64 + 64,
        48 + 24 + 64 + 64,
    ),
    # Width 4 inside: experts of 36, a router of 16; 8 * 4 down and up.
    "narrow": (
        Narrow(latent=4, inner=moe()),
        144 + 16 + 64,
        72 + 16 + 64,
        72 + 16 + 64,
    ),
    "narrow chain": (
        Narrow(latent=4, inner=CHAIN),
        64 + 144 + 48 + 60,
        64 + 144 + 48 + 60,
        64 + 216 + 48 + 180,
    ),
    "narrow dense": (Narrow(latent=4, inner=Dense(hidden=5)), 124, 124, 124),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_every_kind_by_hand(kind):
    ffn, *expected = BY_HAND[kind]
    assert list(ffn_cost(ffn)) == expected


def test_groups_of_every_kind():
    inner = Chain(
        moe=moe(zero=Zero(constant=1), shared=Dense(hidden=5), shared_gate=True),
        iterations=2,
    )
    layers = (Segment(pattern=(Narrow(latent=4, inner=inner),)),)
    total = cost_of(
        LM(dim=D, vocab=V, attention=Attention(heads=2), layers=layers)
    ).total
    assert total["router"] == 2 * 4 * 5
    assert total["experts"] == 4 * 36 + (4 + 8)  # and the constant expert
    assert total["dense"] == 2 * 8 * 4 + 60 + 4  # projections, shared expert, its gate


def test_training_flops_by_experts_really_used():
    """One expert more per token of one layer: 72 numbers more, 6 FLOPs each."""
    layers = (
        Segment(pattern=(Dense(hidden=7), moe(router=TopP(p=0.4, k_max=4))), repeat=2),
        Segment(pattern=(CHAIN,), repeat=2),
        Segment(pattern=(Narrow(latent=4, inner=moe()),)),
    )
    model = LM(dim=D, vocab=V, attention=Attention(heads=2), layers=layers)
    cost, spec = cost_of(model), model_spec(model)
    # The paths are those of the model's own metrics.
    _, aux = jax.eval_shape(
        lambda p, s, ctx: spec.merge(p, s)(ctx), spec.params, spec.state, context(1, 6)
    )
    plain, chain, narrow = ("/".join(path) for path, _ in moe_layers(aux))

    def at(path, values):
        return cost.train_flops_at({path: {"experts_per_token": np.array(values)}})

    base = cost.train_flops
    assert at(plain, [2.0, 2.0]) == base
    assert at(plain, [2.0, 3.5]) == base + 6 * 72 * 1.5
    assert at(chain, [[2.0, 2.0, 2.0]] * 2) == base
    assert at(chain, [[2.0, 1.0, 4.0], [2.0, 2.0, 1.5]]) == base + 6 * 72 * 0.5
    assert at(narrow, [1.0]) == base - 6 * 36


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B100", 1750),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("TPU v2", 23),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        # A wrong figure is worse than none.
        ("Tesla V100-SXM2-16GB", None),
        ("Tesla T4", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40G", None),
        ("TPU v4 lite", None),
        ("TPU v9", None),
        ("", None),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind, tera):
    peak = device_peak_flops(types.SimpleNamespace(device_kind=kind))
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))


def adapted(adapter):
    """The cost of three layers whose MoE has `adapter`."""
    return cost_of(
        LM(
            dim=D,
            vocab=V,
            attention=Attention(heads=2),
            layers=(Segment(pattern=(moe(),), repeat=3),),
            adapter=adapter,
        )
    )


def test_adapters_cost_as_often_as_a_token_meets_them():
    """A shared one is used by both slots; rows of an embedding are looked up."""
    lora = {"rank": 2, "alpha": 2.0}
    own = D * 2 + 2 * (2 * 3)  # A and B of gate and up
    one_each = adapted(LoRA(targets=("experts/w_in",), **lora))
    assert one_each.active["adapters"] == 3 * 2 * own
    assert one_each.adapter_flops == 2 * 3 * 2 * own
    shared = adapted(LoRA(targets=("experts/w_in",), shared=True, **lora))
    assert shared.total["adapters"] == shared.active["adapters"] == 3 * own
    assert shared.adapter_flops == one_each.adapter_flops
    ends = adapted(LoRA(targets=("w_embed", "w_logits"), **lora))
    assert ends.total["adapters"] == 2 * (V * 2 + 2 * D)
    assert ends.adapter_flops == 2 * (2 * D) + 2 * (V * 2 + 2 * D)


def test_prompts_cost_what_their_scores_do():
    """In two of three layers: 2 FLOPs for each number of a query's keys and values."""
    off = {"targets": (), "bias": False, "scale_side": None, "norms": False}
    visual = Visual(width=7, tokens=3, layers=1)
    cost = adapted(AdapterV2(prompt_length=5, layers=2, visual=visual, **off))
    assert cost.adapter_flops == 2 * (2 * D) * (2 * 5 + 3)
