"""Checks of series: what they find, what they say, and that health says nothing."""

import numpy as np
import pytest

from moex.report import health_checks

STEP = np.arange(10, 1010, 10)
S, E = len(STEP), 8


@pytest.fixture
def balanced():
    """Noisy loads of a healthy layer, [S, E]."""
    rng = np.random.default_rng(0)
    load_SE = rng.uniform(0.5, 1.5, (S, E))
    return load_SE / load_SE.sum(axis=1, keepdims=True)


@pytest.fixture
def loss():
    """A loss that falls from 8 to 3 with noise."""
    rng = np.random.default_rng(1)
    return 3 + 5 * np.exp(-np.arange(S) / 15) + rng.normal(0, 0.1, S)


def without(load_SE, expert, start, stop=None):
    load_SE = load_SE.copy()
    load_SE[start:stop, expert] = 0
    return load_SE / load_SE.sum(axis=1, keepdims=True)


def test_tail():
    assert health_checks.tail(100) == slice(90, 100)
    assert health_checks.tail(8) == slice(5, 8)
    assert health_checks.tail(2) == slice(0, 2)


def test_dead_experts(balanced):
    assert health_checks.dead_experts("layer 3", STEP, balanced) is None
    # Silent for a while in the middle, or for one line at the end: alive.
    assert (
        health_checks.dead_experts("layer 3", STEP, without(balanced, 2, 20, 90))
        is None
    )
    assert health_checks.dead_experts("layer 3", STEP, without(balanced, 2, 99)) is None
    load_SE = without(without(without(balanced, 2, 40), 5, 40), 7, 0)
    found = health_checks.dead_experts("layer 3", STEP, load_SE)
    assert found == (
        "dead experts",
        "layer 3: expert 7 at all logged steps; experts 2, 5 since step 410 "
        "(3 of 8; dead: below 1 % of balanced load at the end of the run).",
    )


def test_an_expert_that_dies_again_is_dead_since_then(balanced):
    load_SE = without(without(balanced, 1, 10, 20), 1, 60)
    assert (
        "expert 1 since step 610 " in health_checks.dead_experts("", STEP, load_SE).text
    )


def test_collapse(balanced):
    assert health_checks.collapse("layer 1", balanced) is None
    # Halves of the load at two of eight: exp(ln 2) = 2 are effective, below 4.
    load_SE = np.zeros((S, E))
    load_SE[:, [1, 6]] = 0.5
    kind, text = health_checks.collapse("layer 1", load_SE)
    assert kind == "collapse"
    assert "experts 1, 6 of 8 take 100 % of the load; 2 experts are effective" in text
    assert "threshold: 50 % of 8" in text
    # Four equal ones of eight are just not a collapse, as the threshold says.
    load_SE = np.zeros((S, E))
    load_SE[:, :5] = 0.2
    assert health_checks.collapse("layer 1", load_SE) is None
    # Each line at another expert: balanced over the end of the run.
    assert health_checks.collapse("layer 1", np.eye(E)[np.arange(80) % E]) is None


def test_saturated_routers():
    mean = np.full(S, 3.0)
    assert health_checks.saturated("layer 0", mean, 8) is None
    _, text = health_checks.saturated("layer 0", np.linspace(2, 7.9, S), 8)
    assert "near all of 8 (threshold: 90 % of them)" in text
    kind, text = health_checks.saturated(
        "layer 0", np.maximum(np.linspace(8, -8, S), 1.02), 8
    )
    assert kind == "saturated router"
    assert "near one (threshold: 1.1; most: 8)" in text
    assert health_checks.saturated("layer 0", np.ones(S), 1) is None


def test_entropy_collapse():
    assert health_checks.entropy_collapse("layer 0", np.full(S, 1.0), 8) is None
    kind, text = health_checks.entropy_collapse("layer 0", np.linspace(2, 0.01, S), 8)
    assert kind == "entropy collapse"
    assert "threshold: 10 %" in text


def test_growing_logits():
    # 8 experts: the norm of logits of size 10 is 28.3.
    assert health_checks.growing_logits("layer 0", np.full(S, 60.0), 8) is None  # large
    assert (
        health_checks.growing_logits("layer 0", np.linspace(0.1, 25, S), 8) is None
    )  # grows
    kind, text = health_checks.growing_logits("layer 0", np.linspace(1, 100, S), 8)
    assert kind == "growing logits"
    # The mean of the last ten of 1 .. 100, over that of the 10th to the 20th.
    assert "logits is 95.5, 33.8 per root of an expert, and grew 5.97-fold" in text


def test_lost_slots():
    zeros = np.zeros(S)
    assert health_checks.lost_slots("layer 0", zeros, zeros) is None
    assert health_checks.lost_slots("layer 0", np.full(S, 0.04)) is None
    kind, text = health_checks.lost_slots("layer 0", np.full(S, 0.25), zeros)
    assert kind == "dropped tokens"
    assert "25 % of the slots" in text and "threshold: 5 %" in text
    unknown = np.full(S, np.nan)  # of lines from before it was logged
    assert health_checks.lost_slots("layer 0", zeros, unknown) is None
    lost = zeros.copy()
    lost[30] = 0.002
    kind, text = health_checks.lost_slots("layer 0", zeros, lost)
    assert kind == "lost tokens"
    assert "up to 0.2 % of the slots" in text and "exchange_buffer" in text


def test_unrouted_tokens():
    assert health_checks.unrouted("layer 0", np.full(S, 0.05)) is None
    assert (
        "30 % of the tokens" in health_checks.unrouted("layer 0", np.full(S, 0.3)).text
    )


def test_uneven_devices():
    assert health_checks.uneven_devices("layer 0", np.full(S, 0.2)) is None
    _, text = health_checks.uneven_devices("layer 0", np.full(S, 1.0))
    assert "2 times the mean load" in text and "threshold: 1.5" in text


def test_skipped_updates():
    skipped = np.zeros(S)
    assert health_checks.skipped_updates(STEP, skipped) is None
    assert health_checks.skipped_updates([], []) is None
    skipped[50:] = 2
    _, text = health_checks.skipped_updates(STEP, skipped)
    assert text.startswith("2 skipped in all, the first at or before step 510")


def test_not_finite(loss):
    assert health_checks.not_finite("training nll", STEP, loss) is None
    loss[[40, 41]] = np.nan, np.inf
    _, text = health_checks.not_finite("training nll", STEP, loss)
    assert "training nll is NaN or infinite in 2 of 100 logged steps" in text
    assert "first at step 410" in text


def test_spikes(loss):
    assert health_checks.spikes(STEP, loss) is None
    loss[60], loss[70] = 5.0, 6.0
    kind, text = health_checks.spikes(STEP, loss)
    assert kind == "loss spikes"
    assert text.startswith("2 logged training losses are far above the 20 before")
    assert "largest, at step 710: 6 after a median of 3." in text


def test_divergence(loss):
    assert health_checks.divergence(STEP, loss) is None
    assert health_checks.divergence(STEP[:2], loss[:2]) is None
    loss[70:] += np.linspace(0, 2, 30)
    kind, text = health_checks.divergence(STEP, loss)
    assert kind == "divergence"
    assert "threshold: 10 % above" in text


def test_overfitting():
    step, tokens = [10, 20, 30, 40], [100, 100, 100, 900]
    # The last evaluation scores more than the others: not compared with them.
    assert health_checks.overfitting(step, [4.0, 3.0, 3.02, 3.5], tokens) is None
    kind, text = health_checks.overfitting(step, [4.0, 3.0, 3.2, 2.0], tokens)
    assert kind == "held-out loss rises"
    assert "3.2000 at step 30 and was 3.0000 at step 20" in text
    assert health_checks.overfitting([], [], []) is None
