"""Costs of a model: by hand for a small one, and as published for the known ones."""

import importlib
import types

import pytest

from moex import accounting
from moex.accounting import device_peak_flops, model_cost, model_table
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.train.state import model_spec

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
    text = model_table(model, model_spec(model), LENGTH)
    cost = cost_of(model)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    for group in accounting.GROUPS:
        active = f"{round(cost.active[group]):,}"
        assert lines[group] == [f"{cost.total[group]:,}", active]
    assert lines["total"] == [f"{cost.num_params:,}", f"{cost.num_active:,}"]
    assert "3 layers, width 8, vocabulary 10" in text


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v4", 275),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind, tera):
    peak = device_peak_flops(types.SimpleNamespace(device_kind=kind))
    assert peak == (None if tera is None else tera * 1e12)


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
    cfg = importlib.import_module(f"configs.{name}").get_config()
    cfg.model.vocab = vocab
    cost = model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len)
    assert cost.num_params / 1e9 == pytest.approx(total, rel=min(tolerance, 0.05))
    assert cost.num_active / 1e9 == pytest.approx(active, rel=tolerance)
