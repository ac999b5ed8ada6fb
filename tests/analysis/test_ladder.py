"""The law of a ladder and the speed-ups of ideas, on planted laws."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moex.analysis.ladder import Interval, Judgement, Law, Rung, decision, judge
from moex.config.base import ConfigError


def planted(spent, floor=2.0, scale=1.5, alpha=0.3):
    return floor + scale * spent**-alpha


def ladder(sizes=(1.0, 4.0, 16.0, 64.0), noise=0.0, seeds=3, **law):
    rng = np.random.default_rng(0)
    made = []
    for spent in sizes:
        losses = planted(spent, **law) + noise * rng.standard_normal(seeds)
        costs = (1e12 * spent,) * seeds, (10 * spent,) * seeds
        made.append(Rung(f"{spent}", *costs, tuple(losses)))
    return made


def rung(spent, saved, seeds=3, slower=1.0):
    """An idea that reaches for `spent` what the baseline has for `saved` times that."""
    losses = (planted(spent * saved),) * seeds
    return Rung("idea", (1e12 * spent,) * seeds, (10 * spent * slower,) * seeds, losses)


@given(
    st.floats(0.5, 3.0), st.floats(0.3, 3.0), st.floats(0.1, 0.9), st.floats(0.6, 1.8)
)
def test_a_planted_law_is_found_and_inverted(floor, scale, alpha, saved):
    law = {"floor": floor, "scale": scale, "alpha": alpha}
    rungs = ladder(sizes=(1.0, 3.0, 10.0, 30.0, 100.0), noise=1e-9, **law)
    found = Law(rungs, "flops", samples=2)
    spent = 10.0
    loss = planted(spent * saved, **law)
    assert found.needed(loss) / (1e12 * spent) == pytest.approx(saved, rel=0.02)
    assert found.residual < 1e-3


def test_the_speed_up_of_the_baseline_itself_is_one():
    rungs = ladder(noise=0.01)
    _, _, (same,) = judge(rungs, rungs[1:2])
    assert same.compute.low < 1 < same.compute.high
    assert same.compute.value == pytest.approx(1, abs=0.1)


def test_compute_and_time_are_two_speed_ups():
    _, _, (found,) = judge(ladder(noise=1e-4), [rung(8.0, 1.3, slower=1.3)])
    assert found.compute.value == pytest.approx(1.3, rel=0.02)
    assert found.time.value == pytest.approx(1.0, rel=0.02)
    assert not found.extrapolated


def test_intervals_cover_what_was_planted():
    """Of 40 ladders with noise, about 95 % of the intervals hold the truth."""
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rungs = [
            Rung(
                str(spent),
                (spent,) * 3,
                (spent,) * 3,
                tuple(planted(spent) + 0.02 * rng.standard_normal(3)),
            )
            for spent in (1.0, 4.0, 16.0, 64.0)
        ]
        losses = planted(8.0 * 1.2) + 0.02 * rng.standard_normal(3)
        idea = Rung("idea", (8.0,) * 3, (8.0,) * 3, tuple(losses))
        low_high = Law(rungs, "flops", samples=100).speedup(idea)
        held += low_high.low <= 1.2 <= low_high.high
    assert 33 <= held <= 40


def test_paired_seeds_are_no_noise():
    """Seeds that share what they differ by leave the law's own doubt alone."""
    rungs = ladder(noise=0.02, seeds=5)
    law, baseline = Law(rungs, "flops"), rungs[2]
    spent = baseline.spent("flops")
    same = law.paired(baseline, np.zeros(5), spent)
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    unit = 16.0
    saved = planted(unit * 1.3) - planted(unit)
    exact = Law(ladder(noise=1e-6), "flops")
    found = exact.paired(baseline, np.full(3, saved), spent)
    assert found.value == pytest.approx(1.3, rel=0.01)
    noisy = law.paired(baseline, saved + np.array([-0.01, 0, 0.01]), spent)
    assert noisy.low < noisy.value < noisy.high


def test_a_fit_without_an_end_is_told(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("Optimal parameters not found")

    monkeypatch.setattr("moex.analysis.ladder.curve_fit", fails)
    with pytest.raises(ConfigError, match="follows no power law of flops"):
        Law(ladder(), "flops")


def test_a_loss_beyond_the_ladder_is_marked():
    _, _, found = judge(ladder(noise=1e-3), [rung(64.0, 2.0), rung(0.5, 1.0)])
    assert [each.extrapolated for each in found] == [True, True]
    assert "extrapolated" in decision(found)


@pytest.mark.parametrize(
    ("rungs", "told"),
    [
        (ladder()[:3], "the ladder has 3"),
        (ladder(seeds=1), "one run of each size"),
        (ladder(scale=-0.5), "does not fall with flops: 4.0"),
    ],
)
def test_ladders_that_hold_no_law(rungs, told):
    with pytest.raises(ConfigError, match=told):
        Law(rungs, "flops")


BETTER, WORSE, SAME = (
    Interval(1.2, 1.1, 1.3),
    Interval(0.8, 0.7, 0.9),
    Interval(1, 0.9, 1.1),
)
MORE = Interval(1.6, 1.5, 1.7)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(BETTER, BETTER), (BETTER, BETTER)], "keep: the same loss for less compute"),
        ([(BETTER, SAME), (BETTER, BETTER)], "fewer FLOPs .* but no less time"),
        ([(BETTER, WORSE), (BETTER, WORSE)], "fewer FLOPs .* but more time"),
        ([(SAME, BETTER), (WORSE, BETTER)], "less time .* no fewer FLOPs"),
        ([(WORSE, WORSE), (WORSE, WORSE)], "drop: the baseline"),
        ([(SAME, WORSE), (SAME, WORSE)], "drop: it costs more time"),
        ([(BETTER, BETTER), (WORSE, WORSE)], "undecided.*shrinks with size"),
        ([(BETTER, BETTER), (MORE, MORE)], "keep.*grows with size"),
        ([(BETTER, BETTER)], "one size"),
    ],
)
def test_the_rule_in_words(pairs, words):
    found = [Judgement("idea", 3.0, *pair, False) for pair in pairs]
    assert re.search(words, decision(found))
