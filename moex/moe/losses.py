"""Auxiliary losses of routing: pure functions, float32, never scaled here.

Coefficients are applied in `train/losses.py`. Arguments are sums over all tokens of a
microbatch (over all devices, since the arrays are global), so the same functions serve
any scope.

E experts · ... any leading dims (layers, chain steps)
"""

import jax.numpy as jnp


def load_balance_loss(load_E, prob_sum_E, num_tokens):
    """E * sum_e f_e P_e; 1 at uniform routing for any k.

    Args:
      load_E: float32[..., E] kept slots per expert; carries no gradient.
      prob_sum_E: float32[..., E] router probabilities summed over tokens.
      num_tokens: float32[...] tokens that were routed.

    Returns:
      float32[...]; 0 when no token was routed.

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, with f as share of
    kept slots (theirs has k = 1, where the two agree).
    """
    num_experts = load_E.shape[-1]
    frac_E = load_E / jnp.maximum(jnp.sum(load_E, axis=-1, keepdims=True), 1.0)
    prob_E = prob_sum_E / jnp.maximum(num_tokens, 1.0)[..., None]
    return num_experts * jnp.sum(frac_E * prob_E, axis=-1)


def router_z_loss(z_sum, num_tokens):
    """Mean over tokens of logsumexp(logits)^2.

    Source: Zoph et al. 2022, arXiv:2202.08906, equation 5.
    """
    return z_sum / jnp.maximum(num_tokens, 1.0)


def update_bias(bias_E, load_E, rate):
    """Loss-free balancing: raise the bias of underloaded experts by `rate`.

    b_e += rate * sign(mean(load) - load_e), once per optimizer step with the load of
    all its microbatches.

    Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    mean = jnp.mean(load_E, axis=-1, keepdims=True)
    return bias_E + rate * jnp.sign(mean - load_E)
