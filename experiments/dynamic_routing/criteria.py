"""Verdicts on dynamic top-p routing (arXiv:2403.07652), from results alone."""

import numpy as np

from moex.analysis.compare import estimate
from moex.experiment.claims import Finding, larger, smaller, true

COUNT = "moe/experts_per_token"
BETAS = ("0", "1e-4", "1e-3", "1e-2", "1e-1")
RATIO = {"nothing": 1.0, "form": "{:.4f}"}


def the_entropy_loss_lowers_the_number(results):
    """More entropy loss never means more experts, and 1e-2 at most 0.85 of none."""
    means = [results.mean(f"top_p_{beta}", COUNT).mean for beta in BETAS]
    falls = bool(np.all(np.diff(means) <= 0.05))
    ratio = results.ratio("top_p_1e-2", "top_p_0", COUNT)
    numbers = ", ".join(f"{mean:.2f}" for mean in means)
    return true(falls and ratio.mean <= 0.85, f"{numbers} experts for {BETAS}")


def too_much_of_it_leaves_one_expert(results):
    """With a weight of 1e-1 fewer than 1.2 experts are left."""
    return smaller(results.mean("top_p_1e-1", COUNT), at_most=1.2, nothing=1.2)


def the_controller_hits_its_target(results):
    """The controlled router uses 2 experts, within 5 %."""
    found = results.mean("controlled", COUNT).mean
    return true(abs(found - 2.0) <= 0.1, f"{found:.3f}")


def better_than_top_2(results):
    """Top-p has a loss at most that of top-2, with fewer than two experts (1e-2)."""
    ratio = results.ratio("top_p_1e-2", "top2", "nll")
    few = results.mean("top_p_1e-2", COUNT).mean
    found = smaller(ratio, at_most=1.0, **RATIO)
    if few >= 2:
        return true(False, f"{few:.2f} experts, ratio of losses {found.numbers}")
    return found


def controlled_is_better_than_top_2(results):
    """At a mean of two experts, top-p has a lower loss than top-2."""
    return smaller(results.ratio("controlled", "top2", "nll"), at_most=1.0, **RATIO)


def hard_tokens_use_more(results):
    """Hard text uses at least 1.03 times the experts of easy text (controlled)."""
    name = "by_domain_controlled"
    hard, easy = (results.values(name, d) for d in ("modular", "copies"))
    both = sorted(hard.keys() & easy.keys())
    ratios = np.array([hard[seed] / easy[seed] for seed in both])
    return larger(estimate(ratios), at_least=1.03, nothing=1.0, form="{:.3f}")


def low_layers_use_more(results):
    """The first layer uses more experts than the last (controlled)."""
    name = "by_domain_controlled"
    last = max(key for key in next(iter(results.arms[name].values())) if "layer" in key)
    first, final = (results.values(name, key) for key in ("layer_0", last))
    return larger(estimate(np.array([first[s] - final[s] for s in sorted(first)])))


def counted_savings_are_time(results):
    """Scoring takes less time than top-2, where fewer FLOPs are counted (1e-2)."""
    time = results.mean("time_top_p_1e-2", "time_ratio")
    flops = results.mean("time_top_p_1e-2", "flops_ratio").mean
    found = smaller(time, at_most=flops, nothing=1.0, form="{:.3f}")
    numbers = f"{found.numbers} of the time, {flops:.3f} of the FLOPs"
    return Finding(found.verdict, numbers)


MECHANISMS = (
    the_entropy_loss_lowers_the_number,
    too_much_of_it_leaves_one_expert,
    the_controller_hits_its_target,
)
CLAIMS = (
    better_than_top_2,
    controlled_is_better_than_top_2,
    hard_tokens_use_more,
    low_layers_use_more,
    counted_savings_are_time,
)
