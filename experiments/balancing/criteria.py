"""Verdicts on rules that balance experts."""

from moex.experiment.claims import smaller

VIOLATION = "max_violation"


def the_loss_balances(results):
    """The load-balance loss lowers the max violation."""
    return smaller(results.difference("loss", "none", VIOLATION), form="{:+.2f}")


def the_sign_rule_balances(results):
    """The loss-free bias with the sign rule lowers the max violation."""
    found = results.difference("bias_sign", "sigmoid_none", VIOLATION)
    return smaller(found, form="{:+.2f}")


def the_quantile_rule_balances(results):
    """The loss-free bias with the quantile rule lowers the max violation."""
    found = results.difference("bias_quantile", "sigmoid_none", VIOLATION)
    return smaller(found, form="{:+.2f}")


def quantiles_balance_better_than_signs(results):
    """The quantile rule has a lower max violation than the sign rule."""
    found = results.difference("bias_quantile", "bias_sign", VIOLATION)
    return smaller(found, form="{:+.2f}")


def a_bias_costs_less_than_a_loss(results):
    """A loss-free bias (sign rule) has a lower held-out loss than the loss has."""
    return smaller(results.difference("bias_sign", "loss", "nll"), form="{:+.4f}")


def quantiles_cost_less_than_a_loss(results):
    """A loss-free bias (quantile rule) has a lower held-out loss than the loss has."""
    return smaller(results.difference("bias_quantile", "loss", "nll"), form="{:+.4f}")


def z_keeps_logits_small(results):
    """The router z-loss lowers the norm of the router logits."""
    return smaller(results.difference("z", "none", "moe/logit_norm"), form="{:+.2f}")


MECHANISMS = (the_loss_balances, the_sign_rule_balances, the_quantile_rule_balances)
MECHANISMS += (z_keeps_logits_small,)
CLAIMS = (
    quantiles_balance_better_than_signs,
    a_bias_costs_less_than_a_loss,
    quantiles_cost_less_than_a_loss,
)
