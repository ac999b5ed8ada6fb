"""Verdicts on Chain-of-Experts (arXiv:2506.18945), from results alone.

k and n are those of the size: with `--size=cpu` 8 and 32, with `--size=gpu` 8 and 64.
"""

from moex.experiment.claims import larger, smaller

# Names of arms at both sizes, whose k is 8.
MOE, COE, SAME_K, TWICE = "moe_k8", "coe_k4c2", "coe_k8c2", "moe_k16"


def fewer(results):
    """The arms with three quarters of the experts: (mixture, chain)."""
    names = [name for name in results.arms if "_n" in name]
    return sorted(names, key=lambda name: name.startswith("coe"))


def without_the_inner_residual_it_is_worse(results):
    """A round that does not add to its input makes a chain worse (pre-norm block)."""
    return larger(results.difference("coe_outer_only", f"{COE}_pre", "nll"))


def a_chain_learns_a_chain(results):
    """A chain learns a random chain better than a mixture of equal work does."""
    return smaller(
        results.difference("student_coe_k2c2", "student_moe_k4", "error"),
        form="{:+.4f}",
    )


def lower_loss_at_equal_budget(results):
    """Two rounds of k = 4 reach a loss at most 0.98 times that of one of k = 8."""
    return smaller(results.ratio(COE, MOE, "nll"), at_most=0.98, **RATIO)


def in_the_usual_block_too(results):
    """The same holds in the usual pre-norm block."""
    ratio = results.ratio(f"{COE}_pre", f"{MOE}_pre", "nll")
    return smaller(ratio, at_most=0.98, **RATIO)


def at_equal_shape(results):
    """It holds against a mixture of equal parameters, FLOPs and attention."""
    return smaller(results.ratio(COE, "moe_matched", "nll"), at_most=0.98, **RATIO)


def better_than_more_experts(results):
    """Two rounds of k = 8 are no worse than one round of k = 16."""
    return smaller(results.ratio(SAME_K, TWICE, "nll"), at_most=1.0, **RATIO)


def better_than_depth(results):
    """Two rounds of k = 8 are no worse than twice as many layers of k = 8."""
    return smaller(results.ratio(SAME_K, "moe_deep", "nll"), at_most=1.0, **RATIO)


def fewer_experts_are_enough(results):
    """With three quarters of the experts a chain is no worse than a mixture of all."""
    _, chain = fewer(results)
    return smaller(results.ratio(chain, MOE, "nll"), at_most=1.0, **RATIO)


def fewer_experts_cost_a_mixture_more(results):
    """With three quarters of the experts a mixture is worse than the chain."""
    mixture, chain = fewer(results)
    return smaller(results.ratio(chain, mixture, "nll"), at_most=1.0, **RATIO)


def own_routers_are_better(results):
    """A router of its own for each round is better than one router for both."""
    return smaller(results.difference(COE, "coe_shared_router", "nll"), form="{:+.4f}")


def a_shared_router_loses_to_the_mixture(results):
    """With one router for both rounds a chain is worse than the mixture (a report)."""
    return larger(results.difference("coe_shared_router", MOE, "nll"), form="{:+.4f}")


def rounds_use_other_experts(results):
    """The second round takes the experts of the first less often than by chance."""
    name = f"routes_{COE}"
    chance = results.mean(name, "same_by_chance").mean
    return smaller(results.mean(name, "same"), at_most=chance, nothing=chance)


def memory_is_saved(results):
    """The compiled step of a chain needs no more memory than that of a mixture."""
    ratio = results.ratio(f"memory_{COE}", f"memory_{MOE}", "peak_mib")
    return smaller(ratio, at_most=1.0, **RATIO)


RATIO = {"nothing": 1.0, "form": "{:.4f}"}
MECHANISMS = (without_the_inner_residual_it_is_worse, a_chain_learns_a_chain)
CLAIMS = (
    lower_loss_at_equal_budget,
    in_the_usual_block_too,
    at_equal_shape,
    better_than_more_experts,
    better_than_depth,
    fewer_experts_are_enough,
    fewer_experts_cost_a_mixture_more,
    own_routers_are_better,
    a_shared_router_loses_to_the_mixture,
    rounds_use_other_experts,
    memory_is_saved,
)
