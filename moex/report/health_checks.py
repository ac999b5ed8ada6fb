"""Checks that find in series what went wrong with routing and training.

Every check is a pure function of what was logged. It returns None where all is well,
and its text states its threshold. Checks of a layer look at the end of the run: the
last tenth of the log, at least `TAIL` lines, so that one odd batch does not count.

The argument `where` names the layer in the text; `step_S` are the steps of the
lines, `load_SE` the share of the slots of each expert (rows sum to 1).

S logged steps, ascending · E experts
"""

from typing import NamedTuple

import numpy as np

TAIL = 3  # logged steps that the end of a run has at least
DEAD = 0.01  # share of balanced load
EFFECTIVE = 0.5  # share of all experts
ENTROPY = 0.1  # share of the entropy of equal probabilities
NEAR_ALL, NEAR_ONE = 0.9, 1.1  # experts per token: share of the most; a number
GROWTH, LOGITS = 3.0, 10.0  # logits: growth of their norm; norm per root of E
DROPPED, UNROUTED = 0.05, 0.1  # share of slots; share of tokens
DEVICES = 0.5  # load of the fullest device over the mean, less 1
BEFORE = 20  # lines that a spike is compared with
SPIKE_DEVIATIONS, SPIKE_SHARE = 8.0, 0.1
DIVERGED = 0.1  # rise over the lowest mean, as a share of it
WORSE = 0.01  # rise of held-out loss over its best, as a share of it


class Finding(NamedTuple):
    """Something that a person should know."""

    kind: str  # what it is about, such as "dead experts"
    text: str  # all of it, in words


def tail(count: int) -> slice:
    """The end of a run of `count` logged steps."""
    return slice(max(0, count - max(TAIL, count // 10)), count)


def _end(value_S) -> float:
    """The mean of a figure over the end of a run."""
    return float(np.mean(np.asarray(value_S)[tail(len(value_S))]))


def dead_experts(where: str, step_S, load_SE) -> Finding | None:
    """Find experts that get next to no tokens at the end of the run, and since when."""
    ratio_SE = np.asarray(load_SE) * np.shape(load_SE)[1]
    end_E = np.mean(ratio_SE[tail(len(ratio_SE))], axis=0)
    dead = np.flatnonzero(end_E < DEAD)
    if not len(dead):
        return None
    groups: dict[int, list[int]] = {}
    for expert in dead:
        groups.setdefault(_since(ratio_SE[:, expert] < DEAD), []).append(int(expert))
    parts = []
    for first, experts in sorted(groups.items()):
        names = f"expert{'s' if len(experts) > 1 else ''} {listed(experts)}"
        since = f"since step {int(step_S[first])}" if first else "at all logged steps"
        parts.append(f"{names} {since}")
    return Finding(
        "dead experts",
        f"{where}: {'; '.join(parts)} ({len(dead)} of {len(end_E)}; dead: below "
        f"{_percent(DEAD)} of balanced load at the end of the run).",
    )


def _since(low_S) -> int:
    """The index from which on all is True; the last index if the last is False."""
    high = np.flatnonzero(~np.asarray(low_S))
    return 0 if len(high) == 0 else min(int(high[-1]) + 1, len(low_S) - 1)


def listed(numbers, most: int = 16) -> str:
    """`1, 2, 5`, cut after `most`."""
    text = ", ".join(map(str, numbers[:most]))
    return text + (f" and {len(numbers) - most} more" if len(numbers) > most else "")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def collapse(where: str, load_SE) -> Finding | None:
    """Find a layer where few experts take most of the load at the end of the run."""
    load_E = np.mean(np.asarray(load_SE)[tail(len(load_SE))], axis=0)
    effective = np.exp(-np.sum(load_E * np.log(np.maximum(load_E, 1e-30))))
    count = len(load_E)
    if not effective < EFFECTIVE * count:
        return None
    order = np.argsort(-load_E, kind="stable")
    most = min(int(np.searchsorted(np.cumsum(load_E[order]), 0.8)) + 1, count)
    top = sorted(int(e) for e in order[:most])
    return Finding(
        "collapse",
        f"{where}: expert{'s' if most > 1 else ''} {listed(top)} of {count} "
        f"take{'s' if most == 1 else ''} "
        f"{_percent(load_E[order[:most]].sum())} of the load; {effective:.3g} experts "
        f"are effective, exp(entropy of the load) (threshold: {_percent(EFFECTIVE)} "
        f"of {count}).",
    )


def saturated(where: str, experts_S, most: int) -> Finding | None:
    """Find a dynamic router that gives every token all experts, or one.

    `most`: the most experts that a token can have.
    """
    if most < 2:
        return None
    mean = _end(experts_S)
    if mean > NEAR_ALL * most:
        about = f"near all of {most} (threshold: {_percent(NEAR_ALL)} of them)"
    elif mean < NEAR_ONE:
        about = f"near one (threshold: {NEAR_ONE}; most: {most})"
    else:
        return None
    return Finding(
        "saturated router",
        f"{where}: the router chooses how many experts a token has, and gives "
        f"{mean:.3g} on average: {about}.",
    )


def entropy_collapse(where: str, entropy_S, num_experts: int) -> Finding | None:
    """Find a router whose probabilities are nearly one-hot."""
    if num_experts < 2:
        return None
    mean = _end(entropy_S)
    if not mean < ENTROPY * np.log(num_experts):
        return None
    return Finding(
        "entropy collapse",
        f"{where}: the entropy of the router's probabilities is {mean:.3g} nats, "
        f"{_percent(mean / np.log(num_experts))} of that of equal ones (threshold: "
        f"{_percent(ENTROPY)}): other experts get almost no gradient.",
    )


def growing_logits(where: str, norm_S, num_experts: int) -> Finding | None:
    """Find router logits that are large and grow: softmax saturates, bfloat16 rounds.

    `norm_S`: root mean square over tokens of the L2 norm of their logits.
    """
    norm_S = np.asarray(norm_S, dtype=float)
    if len(norm_S) < 2 * TAIL:
        return None
    early = float(np.mean(norm_S[len(norm_S) // 10 : len(norm_S) // 5 + 1]))
    late = _end(norm_S)
    size = late / np.sqrt(num_experts)
    if not (late > GROWTH * early and size > LOGITS):
        return None
    return Finding(
        "growing logits",
        f"{where}: the norm of a token's router logits is {late:.3g}, {size:.3g} per "
        f"root of an expert, and grew {late / early:.3g}-fold since early in the run "
        f"(threshold: {LOGITS:g} and {GROWTH:g}-fold); a router z-loss holds it.",
    )


def lost_slots(where: str, dropped_S, lost_S=None) -> Finding | None:
    """Find slots over capacity at the end, or lost between devices at any time."""
    lost = 0.0 if lost_S is None else float(np.max(np.nan_to_num(lost_S)))
    if lost > 0:
        return Finding(
            "lost tokens",
            f"{where}: up to {_percent(lost)} of the slots found "
            "no room on their way to the experts (threshold: none); raise "
            "config.mesh.exchange_buffer.",
        )
    mean = _end(dropped_S)
    if not mean > DROPPED:
        return None
    return Finding(
        "dropped tokens",
        f"{where}: {_percent(mean)} of the slots are over capacity and dropped "
        f"(threshold: {_percent(DROPPED)}).",
    )


def unrouted(where: str, unrouted_S) -> Finding | None:
    """Find tokens that no expert computes at the end of the run.

    With zero-computation experts this is intended: do not ask.
    """
    mean = _end(unrouted_S)
    if not mean > UNROUTED:
        return None
    return Finding(
        "unrouted tokens",
        f"{where}: {_percent(mean)} of the tokens are chosen by no expert "
        f"(threshold: {_percent(UNROUTED)}).",
    )


def uneven_devices(where: str, imbalance_S) -> Finding | None:
    """Find devices that wait for the fullest one.

    `imbalance_S`: load of the fullest device of the expert axis over the mean, less 1.
    """
    mean = _end(imbalance_S)
    if not mean > DEVICES:
        return None
    return Finding(
        "uneven devices",
        f"{where}: the fullest device has {1 + mean:.3g} times the mean load; all "
        f"others wait for it (threshold: {1 + DEVICES:g}).",
    )


def skipped_updates(step_S, skipped_S) -> Finding | None:
    """Find updates that were skipped."""
    skipped_S = np.asarray(skipped_S)
    if len(skipped_S) == 0 or not skipped_S[-1] > 0:
        return None
    first = int(step_S[int(np.argmax(skipped_S > 0))])
    return Finding(
        "skipped updates",
        f"{int(skipped_S[-1])} skipped in all, the first at or before step {first}: "
        "their loss or gradient was not finite, or spiked (threshold: none).",
    )


def not_finite(name: str, step_S, value_S) -> Finding | None:
    """Find NaN or infinity in a figure."""
    bad = np.flatnonzero(~np.isfinite(np.asarray(value_S, dtype=float)))
    if len(bad) == 0:
        return None
    return Finding(
        "not a number",
        f"{name} is NaN or infinite in {len(bad)} of {len(value_S)} logged steps, "
        f"first at step {int(step_S[bad[0]])} (threshold: none).",
    )


def spikes(step_S, loss_S) -> Finding | None:
    """Find training losses far above those before."""
    loss_S = np.asarray(loss_S, dtype=float)
    found = []
    for i in range(BEFORE, len(loss_S)):
        before = loss_S[i - BEFORE : i]
        middle = np.nanmedian(before)
        deviation = 1.4826 * np.nanmedian(np.abs(before - middle))
        if loss_S[i] > middle + max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * middle):
            found.append((loss_S[i] - middle, i, middle))
    if not found:
        return None
    _, at, middle = max(found)
    return Finding(
        "loss spikes",
        f"{len(found)} logged training losses are far above the {BEFORE} before; the "
        f"largest, at step {int(step_S[at])}: {loss_S[at]:.4g} after a median of "
        f"{middle:.4g} (threshold: {SPIKE_DEVIATIONS:g} robust deviations and "
        f"{_percent(SPIKE_SHARE)}).",
    )


def divergence(step_S, loss_S) -> Finding | None:
    """Find a training loss that ends above its lowest mean."""
    loss_S = np.asarray(loss_S, dtype=float)
    finite = np.isfinite(loss_S)
    step_S, loss_S = np.asarray(step_S)[finite], loss_S[finite]
    end = tail(len(loss_S))
    width = end.stop - end.start
    if len(loss_S) < 2 * TAIL:
        return None
    mean_S = np.convolve(loss_S, np.full(width, 1 / width), mode="valid")
    low, last = int(np.argmin(mean_S)), mean_S[-1]
    if not last > (1 + DIVERGED) * mean_S[low]:
        return None
    return Finding(
        "divergence",
        f"the training loss ends at {last:.4g} and was {mean_S[low]:.4g} around step "
        f"{int(step_S[low + width // 2])}, means of {width} lines (threshold: "
        f"{_percent(DIVERGED)} above).",
    )


def overfitting(step_S, loss_S, tokens_S) -> Finding | None:
    """Find a held-out loss above that of an earlier evaluation of the same tokens.

    `tokens_S`: how many were scored: the last evaluation may score more than others.
    """
    step_S, loss_S, tokens_S = map(np.asarray, (step_S, loss_S, tokens_S))
    if len(step_S) == 0:
        return None
    counts = {n: int(np.sum(tokens_S == n)) for n in tokens_S}
    same = tokens_S == max(counts, key=counts.__getitem__)
    step_S, loss_S = step_S[same], loss_S[same]
    if not np.isfinite(loss_S).any():
        return None
    best, last = int(np.nanargmin(loss_S)), loss_S[-1]
    if not last > (1 + WORSE) * loss_S[best]:
        return None
    return Finding(
        "held-out loss rises",
        f"held-out loss is {last:.4f} at step {int(step_S[-1])} and was "
        f"{loss_S[best]:.4f} at step {int(step_S[best])} on the same tokens "
        f"(threshold: {_percent(WORSE)} above): overfitting, or divergence.",
    )
