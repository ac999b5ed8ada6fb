"""FLOPs of `accounting` beside those that XLA counts in the program."""

import jax
import pytest

from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.lowrank import LowRank
from moex.moe.layer import MoE
from moex.moe.narrow import Narrow
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.context import Compute
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests.helpers import context
from tests.marks import thorough_but_for

EINSUM = Compute(kernels="xla", attention="einsum")
# XLA counts the FLOPs of the program itself. With one expert, because on CPU its ragged
# dot computes every expert on every row. It counts all of the attention's scores where
# we count the causal half, and elementwise work, which is below 0.6 % at these widths.


LENGTH, D = 256, 1024


def one(experts, **fields):
    return MoE(num_experts=1, router=TopK(k=1), experts=experts, **fields)


COUNTED = {
    "dense": Dense(hidden=2048),
    "glu": one(Glu(hidden=2048)),
    "bias": one(Glu(hidden=2048, bias=True)),
    "shared": one(Glu(hidden=2048), shared=Dense(hidden=1024), shared_gate=True),
    "latent": one(Latent(hidden=2048, latent=512, group=1)),
    "latent, all": one(
        Latent(hidden=2048, latent=512, group=1, ops=("gate", "up", "down"))
    ),
    "low rank": one(LowRank(rank=512)),
    "chain": Chain(moe=one(Glu(hidden=1024), shared=Dense(hidden=1024)), iterations=2),
    "chain, shared once": Chain(
        moe=one(Glu(hidden=1024), shared=Dense(hidden=1024)),
        iterations=3,
        routers="shared",
        shared_once=True,
    ),
    "narrow": Narrow(latent=512, inner=one(Glu(hidden=2048))),
}


def flops_over_ours(names, *, compiled):
    """XLA's forward FLOPs of an unrolled model over ours with whole attention."""
    model = LM(
        dim=D,
        vocab=512,
        attention=Attention(heads=8, kv_heads=2),
        layers=tuple(Segment(pattern=(COUNTED[name],)) for name in names),
    )
    spec = model_spec(model)
    run = jax.jit(lambda p, s, ctx: spec.merge(p, s)(ctx)[0])
    ctx = jax.eval_shape(lambda: context(1, LENGTH, compute=EINSUM))
    program = run.lower(spec.params, spec.state, ctx)
    program = program.compile() if compiled else program
    cost = model_cost(model, spec, LENGTH)
    scores = sum(block.score_flops for block in cost.blocks)
    ours = cost.train_flops / 3 + scores
    return program.cost_analysis()["flops"] / (LENGTH * ours)


@pytest.mark.parametrize(
    "name", thorough_but_for(COUNTED, "dense", "glu", "latent", "chain")
)
def test_flops_as_xla_counts_them(name):
    assert 1 < flops_over_ours([name], compiled=False) < 1.006


@pytest.mark.thorough
def test_flops_of_a_compiled_model():
    names = ["glu", "latent", "chain"]
    assert 1 < flops_over_ours(names, compiled=True) < 1.006
