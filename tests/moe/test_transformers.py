"""The MoE layer against the sparse blocks of Hugging Face transformers (`-m hf`).

Random weights in blocks of each family's config class, nothing from the hub; both sides
in float32. A matrix of transformers is (out, in), ours (in, out).

B batch · L length · T = B * L tokens · D model width · E experts · F expert width
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.moe.experts.glu import Glu
from moex.moe.experts.zero import Zero
from moex.moe.layer import MoE
from moex.moe.routers.topk import Groups, TopK
from moex.nn.mlp import Dense
from tests.helpers import XLA, context, split_module
from tests.tolerances import assert_close

# The libraries warn of their own deprecations, and pytest makes errors of warnings.
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

B, L, D, E, F = 3, 11, 16, 8, 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A block of transformers and the layer that should equal it."""

    module: str  # of transformers.models
    block: str
    config: str
    fields: dict  # of the config; all else at its default
    moe: MoE
    more: tuple = ()  # arguments of the block after the config


def layer(experts=None, **fields):
    experts = Glu(hidden=F) if experts is None else experts
    return MoE(num_experts=E, experts=experts, **fields)


def olmoe(norm, normalize):
    return Family(
        module="olmoe",
        block="OlmoeSparseMoeBlock",
        config="OlmoeConfig",
        fields={
            "num_experts": E,
            "num_experts_per_tok": 3,
            "intermediate_size": F,
            "norm_topk_prob": norm,
        },
        moe=layer(router=TopK(k=3, normalize=normalize)),
    )


FAMILIES = {
    "mixtral": Family(
        module="mixtral",
        block="MixtralSparseMoeBlock",
        config="MixtralConfig",
        fields={
            "num_local_experts": E,
            "num_experts_per_tok": 2,
            "intermediate_size": F,
        },
        moe=layer(router=TopK(k=2)),
    ),
    "qwen2-moe": Family(
        module="qwen2_moe",
        block="Qwen2MoeSparseMoeBlock",
        config="Qwen2MoeConfig",
        fields={
            "num_experts": E,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": F,
            "shared_expert_intermediate_size": 20,
            "norm_topk_prob": False,
        },
        moe=layer(
            router=TopK(k=3, normalize="none"),
            shared=Dense(hidden=20),
            shared_gate=True,
        ),
    ),
    "qwen3-moe": Family(
        module="qwen3_moe",
        block="Qwen3MoeSparseMoeBlock",
        config="Qwen3MoeConfig",
        fields={
            "num_experts": E,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": F,
            "norm_topk_prob": True,
        },
        moe=layer(router=TopK(k=3)),
    ),
    "olmoe, raw": olmoe(False, "none"),
    "olmoe, renormalised": olmoe(True, "after"),
    "jamba": Family(
        module="jamba",
        block="JambaSparseMoeBlock",
        config="JambaConfig",
        fields={"num_experts": E, "num_experts_per_tok": 2, "intermediate_size": F},
        moe=layer(router=TopK(k=2, normalize="none")),
    ),
    "deepseek-v2": Family(
        module="deepseek_v2",
        block="DeepseekV2Moe",
        config="DeepseekV2Config",
        fields={
            "n_routed_experts": E,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": F,
            "n_shared_experts": 2,
            "num_attention_heads": 1,  # it checks that they divide the width
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
        moe=layer(
            router=TopK(
                k=3, normalize="none", scale=16.0, groups=Groups(num=4, keep=2)
            ),
            shared=Dense(hidden=2 * F),
        ),
    ),
    "deepseek-v3": Family(
        module="deepseek_v3",
        block="DeepseekV3MoE",
        config="DeepseekV3Config",
        fields={
            "n_routed_experts": E,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": F,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
        moe=layer(
            router=TopK(
                k=3,
                score="sigmoid",
                scale=2.5,
                bias_rate=1e-3,
                groups=Groups(num=4, keep=2, score="top2"),
            ),
            shared=Dense(hidden=F),
        ),
    ),
    # Its clamp of silu experts is a limit that these activations do not reach.
    "deepseek-v4": Family(
        module="deepseek_v4",
        block="DeepseekV4SparseMoeBlock",
        config="DeepseekV4Config",
        fields={
            "n_routed_experts": E,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": F,
            "scoring_func": "sqrtsoftplus",
            "routed_scaling_factor": 1.5,
            "swiglu_limit": 1e3,
            "num_hidden_layers": 1,
            "mlp_layer_types": ["moe"],
        },
        moe=layer(
            router=TopK(k=3, score="sqrt_softplus", scale=1.5, bias_rate=1e-3),
            shared=Dense(hidden=F),
        ),
        more=(0,),
    ),
    "longcat-flash": Family(
        module="longcat_flash",
        block="LongcatFlashMoE",
        config="LongcatFlashConfig",
        fields={
            "n_routed_experts": E,
            "zero_expert_num": 3,
            "moe_topk": 4,
            "expert_ffn_hidden_size": F,
            "routed_scaling_factor": 6.0,
        },
        moe=layer(
            router=TopK(k=4, normalize="none", scale=6.0, bias_rate=1e-3),
            zero=Zero(copy=3),
        ),
    ),
    "gpt-oss": Family(
        module="gpt_oss",
        block="GptOssMLP",
        config="GptOssConfig",
        fields={
            "num_local_experts": E,
            "num_experts_per_tok": 3,
            "intermediate_size": F,
        },
        moe=layer(Glu(hidden=F, activation="clamped", bias=True), router=TopK(k=3)),
    ),
}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def block_of(family):
    """The block with random weights, or a skip."""
    torch = pytest.importorskip("torch", reason="needs the hf extra")
    # Routers of some families returned other things before.
    pytest.importorskip("transformers", "5.23", reason="needs transformers >= 5.23")
    name = family.module
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = getattr(modeling, family.config)(hidden_size=D, **family.fields)
    block = getattr(modeling, family.block)(config, *family.more)
    rng = np.random.default_rng(0)
    for weight_name, weight in block.state_dict().items():
        # Pre-activations of GPT-OSS reach its clamp; sums of others are of order 1.
        std = 1.0 if name == "gpt_oss" and "gate_up" in weight_name else 0.25
        weight.copy_(torch.tensor(std * rng.normal(size=tuple(weight.shape))))
        if weight_name == "router.bias":  # of GPT-OSS: see `to_params`
            weight.zero_()
    return block


def numpy_of(tensor):
    return tensor.detach().numpy()


def to_params(weights, moe):
    """Our parameters from arrays by transformers' names; linear, so for gradients too.

    Every array is used, or this fails.
    """
    weights = {
        # One name for what the families call differently.
        name.replace("router.", "gate.")
        .replace("classifier.", "")
        .replace("shared_experts.", "shared_expert."): value
        for name, value in weights.items()
    }
    w_in, w_out = weights.pop("experts.gate_up_proj"), weights.pop("experts.down_proj")
    if "experts.gate_up_proj_bias" in weights:  # GPT-OSS: (in, out), gate and up mixed
        weights.pop("gate.bias")  # 0; our routers have none
        bias_in = weights.pop("experts.gate_up_proj_bias")
        experts = {
            "w_in_ED2F": w_in.reshape(E, D, F, 2).swapaxes(2, 3),
            "w_out_EFD": w_out,
            "bias_in_E2F": bias_in.reshape(E, F, 2).swapaxes(1, 2),
            "bias_out_ED": weights.pop("experts.down_proj_bias"),
        }
    else:
        # LongCat-Flash also stores rows for its zero-computation experts.
        experts = {
            "w_in_ED2F": w_in[:E].reshape(E, 2, F, D).transpose(0, 3, 1, 2),
            "w_out_EFD": w_out.swapaxes(1, 2),
        }
    params = {"router": {"w_DE": weights.pop("gate.weight").T}, "experts": experts}
    if moe.shared is not None:
        w_gate, w_up, w_out = (
            weights.pop(f"shared_expert.{name}_proj.weight").T
            for name in ("gate", "up", "down")
        )
        params["shared"] = {
            "w_in_D2F": np.stack([w_gate, w_up], axis=1),
            "w_out_FD": w_out,
        }
    if moe.shared_gate:
        params["w_shared_gate_D1"] = weights.pop("shared_expert_gate.weight").T
    assert not weights
    return params


def run_theirs(block, moe, x_BLD, dy_BLD):
    """(y_BLD, gate_TE, gradients of params, gradient of x)."""
    torch = importlib.import_module("torch")
    x = torch.tensor(x_BLD, requires_grad=True)
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y  # GPT-OSS returns its gates as well
    (y * torch.tensor(dy_BLD)).sum().backward()
    grads = {name: numpy_of(p.grad) for name, p in block.named_parameters()}
    router = block.gate if hasattr(block, "gate") else block.router
    _, gate_TK, expert_TK = router(x.reshape(-1, D))
    gate_TE = dense_gates(numpy_of(expert_TK), numpy_of(gate_TK), moe)
    return numpy_of(y), gate_TE, to_params(grads, moe), numpy_of(x.grad)


def run_ours(block, moe, x_BLD, dy_BLD):
    """The same of our layer, with the block's weights."""
    graphdef, own_params, state = split_module(moe.make(D, nnx.Rngs(params=0)))
    weights = {name: numpy_of(p) for name, p in block.named_parameters()}
    params = jax.tree.map(jnp.asarray, to_params(weights, moe))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, own_params)
    buffers = [numpy_of(b) for _, b in block.named_buffers()]
    assert len(buffers) == len(jax.tree.leaves(state))
    if buffers:
        state = {"router": {"bias_E": jnp.asarray(buffers[0])}}
    ctx = context(B, L, compute=XLA, collect=True)

    def loss(params, x_BLD):
        y_BLD, aux = nnx.merge(graphdef, params, state)(x_BLD, ctx)
        return jnp.sum(y_BLD * dy_BLD), (y_BLD, aux["trace"])

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (y_BLD, trace)), (dparams, dx_BLD) = run(params, jnp.asarray(x_BLD))
    gate_TE = dense_gates(trace["expert"], trace["gate"], moe)
    return y_BLD, gate_TE, dparams, dx_BLD


def dense_gates(expert_TK, gate_TK, moe):
    """Order of the slots does not matter: gates by expert, 0 where not chosen."""
    gate_TE = np.zeros((B * L, moe.num_choices()), np.float32)
    np.put_along_axis(gate_TE, np.asarray(expert_TK), np.asarray(gate_TK), axis=1)
    return gate_TE


def tokens():
    rng = np.random.default_rng(1)
    x_BLD, dy_BLD = rng.normal(size=(2, B, L, D)).astype(np.float32)
    return x_BLD, dy_BLD


@families
def test_values_choices_and_gradients_are_those_of_transformers(family):
    block, (x_BLD, dy_BLD) = block_of(family), tokens()
    y_BLD, gate_TE, dparams, dx_BLD = run_ours(block, family.moe, x_BLD, dy_BLD)
    expected = run_theirs(block, family.moe, x_BLD, dy_BLD)
    np.testing.assert_array_equal(gate_TE > 0, expected[1] > 0)
    assert_close(gate_TE, expected[1], "float32", "gates")
    assert_close(y_BLD, expected[0], "float32", "values")
    assert_close(dx_BLD, expected[3], "float32", "gradient of x")
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), dparams, expected[2])


def test_a_mask_of_deepseek_v3_is_minus_infinity():
    """A constant in the bias changes nothing, though it makes every score negative.

    So the experts of the groups that are left out are at -inf, here and there. At 0.0,
    as in transformers before 5.6 and DeepSeek's first remote code, they would win.
    """
    family = FAMILIES["deepseek-v3"]
    block, (x_BLD, dy_BLD) = block_of(family), tokens()
    for run in (run_theirs, run_ours):
        before_TE = run(block, family.moe, x_BLD, dy_BLD)[1]
        block.gate.e_score_correction_bias -= 3.0
        after_TE = run(block, family.moe, x_BLD, dy_BLD)[1]
        block.gate.e_score_correction_bias += 3.0
        np.testing.assert_array_equal(after_TE, before_TE)
