"""What only a GPU can show. `MOEX_TEST_PLATFORM=gpu pytest -m gpu`."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.device import kernels
from benchmarks.device.definition import error_of
from kernels_pallas.implementations import INTERPRETED
from moex.model.optim import AdamW, Optim, make_optimizer
from moex.model.spec import init_guard, init_params, model_spec
from moex.nn.attention import attend
from moex.nn.context import Compute
from moex.runs.keys import Loss
from moex.train.step import make_train_step
from tests.helpers import TASK, random_batch, tiny_lm
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu
INTERPRET = kernels.DRY in os.environ  # a rehearsal on a CPU


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu" and not INTERPRET:
        pytest.fail("no GPU here: run with MOEX_TEST_PLATFORM=gpu on a GPU machine")


def test_cudnn_attention_equals_einsum_on_packed_rows():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 256, 8, 64), jnp.bfloat16)
    k, v = (jax.random.normal(i, (2, 256, 2, 64), jnp.bfloat16) for i in keys[1:])
    segment = jnp.asarray(np.repeat([[1, 2, 3, 3]], 64, axis=1).repeat(2, 0), jnp.int32)
    position = jnp.tile(jnp.arange(256, dtype=jnp.int32), (2, 1))

    def run(name):
        def loss(q, k, v):
            y = attend(q, k, v, (segment,) * 2, (position,) * 2, implementation=name)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        grads, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return y, *grads

    for actual, expected in zip(run("cudnn"), run("einsum"), strict=True):
        assert_close(actual, expected, "bfloat16")


@pytest.mark.parametrize("shape", kernels.SHAPES)
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("triton", "float32"),
        ("triton", "bfloat16"),
        ("mosaic", "bfloat16"),
        ("xla", "float32"),
        ("xla", "bfloat16"),
    ],
)
def test_experts_equal_the_definition_with_poisoned_tail(implementation, dtype, shape):
    """Its names are what `python -m benchmarks.device` finds the failing layer by."""
    name = implementation + INTERPRETED * INTERPRET
    try:
        error = error_of(name, dtype, kernels.SHAPES[shape])
    except ValueError as e:
        if "cannot do" not in str(e):
            raise
        pytest.skip(str(e))
    assert error is None, error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns_one_batch(dtype):
    model = tiny_lm()
    spec = model_spec(model)
    optim = Optim(rule=AdamW(), lr=1e-2)
    tx, _ = make_optimizer(optim, 40, spec.params, spec.info)
    params, rest = init_params(model, jax.random.key(0))
    state = {"params": params, "state": rest, "opt": tx.init(params)}
    state["guard"] = init_guard()
    step = jax.jit(
        make_train_step(
            TASK,
            spec,
            tx,
            Loss(),
            grad_accum=1,
            num_domains=2,
            optim=optim,
            compute=Compute(dtype=dtype),
        )
    )
    batch = random_batch(4, 32)
    losses = []
    for i in range(40):
        state, metrics = step(state, np.int32(i), jax.random.key(0), batch)
        losses.append(float(metrics["nll"]))
    assert losses[-1] < 0.5 * losses[0]
