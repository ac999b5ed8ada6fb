"""Experts of one implementation beside their definition, values and gradients.

T tokens · K slots · D model width · F expert width · E experts
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import grouped_swiglu, make_plan

TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}  # of the largest value of an array
NAMES = ("dx", "dw_in", "dw_out", "dgate")


def error_of(implementation: str, dtype: str, shape) -> str | None:
    """What is wrong with the gradients of a layer of this shape; None: nothing.

    Rows of the slots of the last tokens are not kept. They are NaN and must not reach
    anything.

    Args:
      implementation: a key of IMPLEMENTATIONS.
      dtype: of tokens and weights.
      shape: T, K, D, F, E.
    """
    T, K, D, F, E = shape
    lost = min(7, T // 2)
    keys = jax.random.split(jax.random.key(1), 5)
    token_T = jnp.arange(T)
    x = jax.random.normal(keys[0], (T, D), dtype)
    x = jnp.where(token_T[:, None] < T - lost, x, jnp.nan)
    w_in = (jax.random.normal(keys[1], (E, D, 2, F)) * D**-0.5).astype(dtype)
    w_out = (jax.random.normal(keys[2], (E, F, D)) * F**-0.5).astype(dtype)
    gate = jax.random.uniform(keys[3], (T, K))
    expert = jnp.argsort(jax.random.normal(keys[4], (T, E)), axis=1)[:, :K]
    keep = jnp.broadcast_to(token_T[:, None] < T - lost, (T, K))
    plan = make_plan(expert.astype(jnp.int32), keep, E)

    def run(name):
        def loss(x, w_in, w_out, gate):
            y = grouped_swiglu(x, w_in, w_out, gate, plan, implementation=name)
            return jnp.sum(jnp.sin(y[: T - lost].astype(jnp.float32)))

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, w_in, w_out, gate)

    for what, a, b in zip(NAMES, run(implementation), run("reference"), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if not np.isfinite(a).all():
            return f"not finite: {np.sum(~np.isfinite(a))} of {a.size} of {what}"
        most = np.abs(b).max()
        off = np.abs(a - b).max() / max(most, 1e-30)
        if off > TOLERANCE[dtype]:
            return f"not equal: {what} is off by {off:.2g} of its largest, {most:.2g}"
    return None
