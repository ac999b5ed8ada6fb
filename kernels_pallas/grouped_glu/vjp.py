"""The VJP around a grouped_glu backend, and buffers smaller than all slots.

Legend: T tokens, K slots per token, N sorted rows, D model width, F expert hidden
width, C pre-activation columns (2F), E experts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.names import PRE_ACTIVATIONS


def differentiable(forward, backward):
    """Make a differentiable grouped_glu out of a forward and a backward pass.

    Args:
      forward: (x_TD, w_in_EDC, w_out_EFD, gate_TK, plan, activation, save) -> (y_TD,
        a), where `a` is whatever `backward` needs again; None unless `save`.
      backward: (a, x_TD, w_in_EDC, w_out_EFD, gate_TK, plan, activation, dy_TD) ->
        (dx_TD, dw_in_EDC, dw_out_EFD, dgate_TK).

    Returns:
      (x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan, activation, buffer_rows) -> y_TD,
      safe to call outside of jit.
    """

    def run_forward(
        save, x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan, activation, buffer_rows
    ):
        inputs = (x_TD, _merge(w_in_ED2F), w_out_EFD, gate_TK)

        def small(plan):
            return forward(*inputs, plan, activation, save)

        def large(plan):  # saves zeros in place of `a`: both branches return one shape
            y_TD, _ = forward(*inputs, plan, activation, False)
            _, kept = jax.eval_shape(small, plan.first_rows(buffer_rows))
            return y_TD, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kept)

        return _within(plan, buffer_rows, small, large)

    @partial(jax.custom_vjp, nondiff_argnums=(5, 6))
    def run(x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan, activation, buffer_rows):
        arrays = (x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan)
        return run_forward(False, *arrays, activation, buffer_rows)[0]

    def run_and_save(*args):
        y_TD, a = run_forward(True, *args)
        a = jax.tree.map(lambda leaf: checkpoint_name(leaf, PRE_ACTIVATIONS), a)
        # Save weights as they came: a scan over layers would keep a reshaped copy.
        return y_TD, (a, *args[:5])

    def run_backward(activation, buffer_rows, saved, dy_TD):
        a, x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan = saved
        inputs = (x_TD, _merge(w_in_ED2F), w_out_EFD, gate_TK)

        def small(plan):
            return backward(a, *inputs, plan, activation, dy_TD)

        def large(plan):
            _, a = forward(*inputs, plan, activation, True)
            return backward(a, *inputs, plan, activation, dy_TD)

        dx, dw_in, dw_out, dgate = _within(plan, buffer_rows, small, large)
        return dx, dw_in.reshape(w_in_ED2F.shape), dw_out, dgate, None

    run.defvjp(run_and_save, run_backward)
    return jax.jit(run, static_argnums=(5, 6))


def _merge(w_in_ED2F):
    """Merge the halves into [E, D, C]: gate columns, then up columns."""
    num_experts, dim = w_in_ED2F.shape[:2]
    return w_in_ED2F.reshape(num_experts, dim, -1)


def _within(plan, buffer_rows, small, large):
    """Call `small` on the plan's first rows if they hold every kept slot, else `large`.

    The branch is taken here, inside the custom VJP: outside of it differentiation
    would keep the arrays that both branches need.
    """
    if buffer_rows is None or buffer_rows >= plan.order_N.shape[0]:
        return small(plan)
    return lax.cond(
        plan.bounds[-1] <= buffer_rows,
        lambda: small(plan.truncated(buffer_rows)),
        lambda: large(plan),
    )
