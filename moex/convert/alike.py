"""How alike experts are, where that is measured on data: `merge.Used` has the sums.

Source: Li et al. 2024, arXiv:2310.01334, and its code (grouping.py), where similarity
by gradients and by MSE are ablations. There all hidden units are in the order of the
first expert before, as here by `aligned`.

S sampled tokens · E experts · D width
"""

import jax
import jax.numpy as jnp
import numpy as np

from moex.convert.align import matching, one_expert, reordered
from moex.convert.to_latent import at_path, with_path

EXACT = jax.lax.Precision.HIGHEST


def aligned(params, path: tuple[str, ...]):
    """The parameters with all hidden units in the order of the first expert.

    Args:
      params: nested dict; not changed.
      path: of the experts of a layer; its arrays are [R, E, ...], of all R copies.
    """
    old = at_path(params, path)
    new = {name: np.array(jax.device_get(value)) for name, value in old.items()}
    copies, E = next(iter(new.values())).shape[:2]
    for r in range(copies):
        weights = {name: value[r] for name, value in new.items()}
        first = one_expert(weights, 0)
        for e in range(1, E):
            expert = one_expert(weights, e)
            moved = reordered(expert, matching(first, expert))
            for name, value in moved.items():
                new[name][r, e] = value
    placed = {n: jax.device_put(new[n], value.sharding) for n, value in old.items()}
    return with_path(params, path, placed)


def merge_errors(outputs, experts, y_ESD, uses_ES):
    """Sums of squares by which merged pairs miss their experts, float32[E, E].

    Two experts with the outputs f_i and f_j become m, which has the plain mean of their
    weights. The sum is of |m - f_i|^2 over the tokens of i, and of |m - f_j|^2 over
    those of j.

    Args:
      outputs: a function from experts to their outputs for all tokens, [E, S, D].
      experts: module whose arrays have the experts first.
      y_ESD: `outputs` of these.
      uses_ES: 1 for the tokens of an expert, else 0.
    """
    E = len(y_ESD)

    def of_pairs(shift):
        """The sums of experts e and e + shift."""
        pairs = jax.tree.map(lambda a: (a + jnp.roll(a, -shift, 0)) / 2, experts)
        m_ESD, sums_E = outputs(pairs), jnp.zeros(E)
        for by in (0, shift):
            y, uses = jnp.roll(y_ESD, -by, 0), jnp.roll(uses_ES, -by, 0)
            sums_E += jnp.einsum("es,esd->e", uses, (m_ESD - y) ** 2, precision=EXACT)
        return sums_E

    shift_P = jnp.arange(1, E // 2 + 1)
    sums_PE = jax.lax.map(of_pairs, shift_P)
    one_PE = jnp.broadcast_to(jnp.arange(E), sums_PE.shape)
    other_PE = (one_PE + shift_P[:, None]) % E
    sums_EE = jnp.zeros((E, E)).at[one_PE, other_PE].set(sums_PE)
    return sums_EE.at[other_PE, one_PE].set(sums_PE)


def gradient_grams(gradients: dict):
    """The products of the gradients of every two experts, float32[R, E, E].

    Args:
      gradients: of the arrays of a layer, [R, E, ...].
    """
    flat = [g.astype(jnp.float32).reshape(*g.shape[:2], -1) for g in gradients.values()]
    return sum(
        jnp.einsum("ren,rfn->ref", g_REN, g_REN, precision=EXACT) for g_REN in flat
    )
