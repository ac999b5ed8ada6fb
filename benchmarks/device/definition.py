"""Compare one implementation of experts with the definition, values and gradients.

T tokens · K slots · D model width · F expert width · E experts
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import grouped_swiglu, make_plan

TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}  # share of the largest value in it
NAMES = ("dx", "dw_in", "dw_out", "dgate")


def error_of(implementation: str, dtype: str, shape) -> str | None:
    """The error in the gradients of a layer of this shape; None: there is none.

    Rows of the slots of the last tokens are not kept. They are NaN and must not reach
    anything.

    Args:
      implementation: a key of IMPLEMENTATIONS.
      dtype: dtype of tokens and weights.
      shape: T, K, D, F, E.
    """
    T, K, D, F, E = shape
    lost = min(7, T // 2)
    rng = np.random.default_rng(1)  # JAX would compile for every shape

    def normal(*size, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=size), dtype)

    x = np.array(normal(T, D))
    x[T - lost :] = np.nan
    w_in = normal(E, D, 2, F, scale=D**-0.5)
    w_out = normal(E, F, D, scale=F**-0.5)
    gate = jnp.asarray(rng.random((T, K)), jnp.float32)
    expert = np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int32)
    keep = np.broadcast_to(np.arange(T)[:, None] < T - lost, (T, K))
    plan = make_plan(jnp.asarray(expert), jnp.asarray(keep), E)

    def run(name):
        def loss(x, w_in, w_out, gate):
            y = grouped_swiglu(x, w_in, w_out, gate, plan, implementation=name)
            return jnp.sum(jnp.sin(y[: T - lost].astype(jnp.float32)))

        with jax.default_matmul_precision("highest"):
            arrays = (jnp.asarray(x), w_in, w_out, gate)
            return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)

    for what, a, b in zip(NAMES, run(implementation), run("reference"), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if not np.isfinite(a).all():
            return f"not finite: {np.sum(~np.isfinite(a))} of {a.size} of {what}"
        most = np.abs(b).max()
        off = np.abs(a - b).max() / max(most, 1e-30)
        if off > TOLERANCE[dtype]:
            return f"not equal: {what} is off by {off:.2g} of its largest, {most:.2g}"
    return None
