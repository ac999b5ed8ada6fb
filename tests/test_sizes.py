"""Sizes of published models, read off their abstract counterparts here."""

import importlib

import pytest

from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent, latent_ratio
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment

# Billions of parameters, in all and active per token, as published: Jiang et al. 2024,
# arXiv:2401.04088 (Mixtral 8x7B), Muennighoff et al. 2024, arXiv:2409.02060 (OLMoE,
# with its vocabulary); of moe_100m as its own docstring says.
PUBLISHED = {
    "moe_8x7b": (32_000, 46.7, 12.9, 0.01),
    "moe_1b": (50_304, 6.9, 1.3, 0.02),
    "moe_100m": (32_000, 0.396, 0.0935, 0.01),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    vocab, total, active, tolerance = PUBLISHED[name]
    cfg = importlib.import_module(f"moex.configs.{name}").get_config()
    cfg.model.vocab = vocab
    cost = model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len)
    assert cost.num_params / 1e9 == pytest.approx(total, rel=min(tolerance, 0.05))
    assert cost.num_active / 1e9 == pytest.approx(active, rel=tolerance)


# Chain-of-Experts, arXiv:2506.18945: width 1024, experts of width 704, one of them
# shared; sizes in Mi = 2^20 parameters without embeddings, memory in GiB. A layer of
# two iterations has two routers.


def coe(num_routed, iterations, num_layers):
    layer = MoE(
        num_experts=num_routed,
        router=TopK(k=8 // iterations),
        experts=Glu(hidden=704),
        shared=Dense(hidden=704),
    )
    ffn = layer if iterations == 1 else Chain(moe=layer, iterations=iterations)
    return LM(
        dim=1024,
        vocab=102_400,
        attention=Attention(heads=8),
        layers=(Segment(pattern=(ffn,), repeat=num_layers),),
    )


# Their attention, which moex does not have: DeepSeek-V2's MLA without query compression
# (8 heads of 128 + 64, key/value rank 512 with a norm, 64 rotary dims, values of 128).
MLA = 1024 * 8 * 192 + 1024 * (512 + 64) + 512 + 512 * 8 * (128 + 128) + 8 * 128 * 1024
COE = {
    "MoE, N = 64": (coe(63, 1, 4), 544.51, 11.63),
    "CoE, N = 64": (coe(63, 2, 4), 544.75, 11.64),
    "CoE, N = 48": (coe(47, 2, 4), 412.63, 9.57),
    "MoE, 8 layers": (coe(63, 1, 8), 1089.01, 20.14),
    "MoE, 12 layers": (coe(63, 1, 12), 1633.52, 28.65),
}


@pytest.mark.parametrize("name", COE)
def test_sizes_of_chain_of_experts(name):
    model, mebi, gib = COE[name]
    total = model_cost(model, model_spec(model), 512).total
    embeddings = total["embedding"] + total["logits"]
    assert embeddings == 2 * 102_400 * 1024
    size = sum(total.values()) - embeddings
    size += model.num_layers() * MLA - total["attention"]
    assert round(size / 2**20, 2) == mebi
    # Weight, gradient and two moments of Adam in float32; the activations that a second
    # iteration adds are in no figure of the paper.
    assert round(16 * (size + embeddings) / 2**30, 2) == gib


# Ratios of latent to plain experts with latent = hidden, for gate and up / all three.
ALL = ("gate", "up", "down")
# Of Qwen1.5-MoE-A2.7B, DeepSeek-V2-Lite and DeepSeek-V3.
LATENT_RATIOS = [  # experts, hidden width, model width, group, ratios
    (60, 1408, 2048, 1, 1.458, 1.688),
    (60, 1408, 2048, 4, 0.958, 0.938),
    (60, 1408, 2048, 60, 0.803, 0.704),
    (64, 1408, 2048, 64, 0.802, 0.703),
    (256, 2048, 7168, 1, 1.190, 1.286),
    (256, 2048, 7168, 4, 0.690, 0.536),
    (256, 2048, 7168, 256, 0.526, 0.290),
]


@pytest.mark.parametrize(("E", "F", "D", "group", "two", "three"), LATENT_RATIOS)
def test_ratios_of_latent_experts(E, F, D, group, two, three):
    for ops, ratio in ((("gate", "up"), two), (ALL, three)):
        cfg = Latent(hidden=F, latent=F, group=group, ops=ops)
        assert round(latent_ratio(E, D, cfg), 3) == ratio


@pytest.mark.parametrize("ops", [("gate", "up"), ALL, ("down",)])
def test_the_ratio_is_that_of_the_model(ops):
    """Seven experts in groups of three: the last group is smaller."""

    def size(experts):
        layer = MoE(num_experts=7, router=TopK(k=2), experts=experts)
        layers = (Segment(pattern=(layer,)),)
        model = LM(dim=8, vocab=10, attention=Attention(heads=2), layers=layers)
        return model_cost(model, model_spec(model), 512).total["experts"]

    latent = Latent(hidden=6, latent=4, group=3, ops=ops)
    assert size(latent) / size(Glu(hidden=6)) == latent_ratio(7, 8, latent)
