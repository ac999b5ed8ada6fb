"""An idea beside a ladder of baselines: how much compute and time it saves.

A ladder is a baseline at several sizes. Its held-out loss follows
L(C) = L_inf + A * C^-alpha in what it spent, C: training FLOPs, or seconds. The
speed-up of an idea that reached L for C is the C that the ladder needs for L, over that
C: above 1 the idea is cheaper.

Sources: irreducible loss and power law: Hoffmann et al., arXiv:2203.15556; the two
speed-ups and the rule: the digest of experiments of Marin
(marin-community/marin, docs/reports/agent-moe-experiments.md).

P points, one for each run · G sizes · B samples of the law
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

from moex.config.base import ConfigError

FEWEST = 4  # sizes of a ladder: the law has three parameters
SAMPLES = 300
FIT = 0.95  # the share of samples that must have a law
LEVELS = (2.5, 97.5)  # percent: the ends of intervals


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclasses.dataclass(frozen=True)
class Rung:
    """The runs of one size of a ladder, or of an idea: one entry for each seed.

    Attributes:
      flops, seconds: training FLOPs, and wall time of training steps, of each run.
      losses: final held-out loss of each run.
    """

    name: str
    flops: tuple[float, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    def spent(self, axis: str) -> float:
        """The mean over runs of "flops" or "seconds"."""
        return float(np.mean(getattr(self, axis)))


def law(spent_P, log_gap, log_scale, alpha, *, least):
    """The loss floor + exp(log_scale) * spent^-alpha; floor = least - exp(log_gap).

    Args:
      spent_P: in units of the geometric mean of the ladder.
      least: the smallest loss of the ladder, below which the floor is.
    """
    floor = least - np.exp(log_gap)
    return floor + np.exp(log_scale - alpha * np.log(spent_P))


class Law:
    """The law of a ladder over one axis, with samples of its parameters.

    The samples refit the law to losses with Gaussian noise of the deviation that seeds
    have within a size (pooled over sizes), so that they tell what the seeds leave open.

    Attributes:
      floor, scale, alpha: of the law, over what is spent in units of `unit`.
      samples_B3: the same three of each sample.
      unit: the geometric mean of what the sizes spent.
      residual: root of the mean square of what the law misses at the sizes' means.
    """

    def __init__(self, rungs: Sequence[Rung], axis: str, samples: int = SAMPLES):
        """Fit the law over "flops" or "seconds".

        Raises:
          ConfigError: for fewer than `FEWEST` sizes, one seed a size, losses that do
            not fall, or such that no law fits.
        """
        self.axis = axis
        rungs = sorted(rungs, key=lambda rung: rung.spent(axis))
        if len(rungs) < FEWEST:
            raise ConfigError(
                f"a law with an irreducible loss needs {FEWEST} sizes or more; the "
                f"ladder has {len(rungs)}."
            )
        spent_G = np.array([rung.spent(axis) for rung in rungs])
        mean_G = np.array([np.mean(rung.losses) for rung in rungs])
        if not np.all(np.diff(mean_G) < 0):
            worst = rungs[int(np.argmax(np.diff(mean_G))) + 1].name
            raise ConfigError(
                f"the ladder's loss does not fall with {axis}: {worst} is no better "
                "than a smaller size."
            )
        self.unit = float(np.exp(np.mean(np.log(spent_G))))
        self.low, self.high = float(mean_G[-1]), float(mean_G[0])
        self._spent_G = spent_G / self.unit
        count_G = np.array([len(rung.losses) for rung in rungs])
        freedom = int(np.sum(count_G - 1))
        if freedom < 1:
            raise ConfigError(
                "the ladder has one run of each size; seeds tell how sure its law is."
            )
        squares = [np.var(r.losses) * len(r.losses) for r in rungs]
        self.deviation = float(np.sqrt(sum(squares) / freedom))
        starts = [(np.log(gap * self.low), 0.0, 0.3) for gap in (0.5, 0.1)]
        found = [self._fit(mean_G, start) for start in starts]
        fits = [fit for fit in found if fit is not None]
        if not fits:
            raise ConfigError(f"the ladder's loss follows no power law of {axis}.")
        missed = [float(np.mean((self._at(fit) - mean_G) ** 2)) for fit in fits]
        best = fits[int(np.argmin(missed))]
        self.residual = float(np.sqrt(min(missed)))
        self.floor, self.scale, self.alpha = self._plain(best)
        noise_BG = np.random.default_rng(0).standard_normal((samples, len(rungs)))
        noise_BG *= self.deviation / np.sqrt(count_G)
        found = [self._fit(mean_G + noise_G, best) for noise_G in noise_BG]
        fits = [fit for fit in found if fit is not None]
        if len(fits) < FIT * samples:
            raise ConfigError(
                f"the ladder's seeds differ too much for a power law of {axis}: "
                f"{samples - len(fits)} of {samples} fits with their noise had no end."
            )
        self.samples_B3 = np.array([self._plain(fit) for fit in fits])

    def _fit(self, mean_G, start) -> np.ndarray | None:
        """The parameters of `law` by least squares; None if the search had no end."""
        curve = functools.partial(law, least=self.low)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizeWarning)
                found, _ = curve_fit(curve, self._spent_G, mean_G, start, maxfev=2000)
        except RuntimeError:  # the library's word for it
            return None
        return found

    def _at(self, params_3) -> np.ndarray:
        return law(self._spent_G, *params_3, least=self.low)

    def _plain(self, params_3) -> tuple[float, float, float]:
        log_gap, log_scale, alpha = map(float, params_3)
        return self.low - np.exp(log_gap), np.exp(log_scale), alpha

    def needed(self, loss) -> float:
        """The cost of a loss on the ladder; infinite at its floor and below."""
        return float(self._needed(loss, self.floor, self.scale, self.alpha))

    def _needed(self, loss, floor, scale, alpha):
        with np.errstate(divide="ignore", over="ignore"):
            above = np.maximum(np.asarray(loss) - floor, 0.0)
            return self.unit * (scale / above) ** (1 / alpha)

    def interval(self, name: str) -> Interval:
        """The "floor", "scale" or "alpha" with its interval."""
        number = ("floor", "scale", "alpha").index(name)
        low, high = np.percentile(self.samples_B3[:, number], LEVELS)
        return Interval(getattr(self, name), float(low), float(high))

    def covers(self, loss: float) -> bool:
        """Tell whether a loss lies between those of the smallest and largest size."""
        return self.low <= loss <= self.high

    def speedup(self, idea: Rung) -> Interval:
        """The cost of the idea's loss on the ladder, over what the idea spent.

        The interval has the law's samples, and noise of the idea's mean loss: the
        deviation of the ladder's seeds, or of its own where that is larger.
        """
        loss, spent = float(np.mean(idea.losses)), idea.spent(self.axis)
        own = np.std(idea.losses, ddof=1) if len(idea.losses) > 1 else 0.0
        scale = max(self.deviation, float(own)) / np.sqrt(len(idea.losses))
        count = len(self.samples_B3)
        noise_B = scale * np.random.default_rng(1).standard_normal(count)
        return self._saved(loss, loss + noise_B, spent)

    def _saved(self, loss: float, loss_B, spent: float) -> Interval:
        """The cost of a loss over what was spent, with its samples."""
        sample_B = self._needed(loss_B, *self.samples_B3.T) / spent
        low, high = np.percentile(sample_B, LEVELS)
        return Interval(self.needed(loss) / spent, float(low), float(high))

    def paired(self, baseline: Rung, difference_S, spent: float) -> Interval:
        """The speed-up of an idea whose seeds are those of the ladder's runs.

        What seeds share is no noise: the idea's loss is that of the law at the
        baseline's size plus the difference.

        Args:
          baseline: the size of the ladder that the idea changes.
          difference_S: loss of the idea less that of the baseline, of each seed.
          spent: by the idea.
        """
        at, count = baseline.spent(self.axis) / self.unit, len(difference_S)
        mean, error = np.mean(difference_S), np.std(difference_S, ddof=1)
        draws = np.random.default_rng(1).standard_t(count - 1, len(self.samples_B3))
        floor_B, scale_B, alpha_B = self.samples_B3.T
        loss = self.floor + self.scale * at**-self.alpha + float(mean)
        noise_B = mean + error / np.sqrt(count) * draws
        return self._saved(loss, floor_B + scale_B * at**-alpha_B + noise_B, spent)


class Judgement(NamedTuple):
    """An idea at one size, judged.

    Attributes:
      name: of the idea's runs.
      loss: mean final held-out loss.
      compute, time: speed-ups in training FLOPs and in wall time.
      extrapolated: its loss is outside of the ladder's.
    """

    name: str
    loss: float
    compute: Interval
    time: Interval
    extrapolated: bool


def judge(
    ladder: Sequence[Rung], ideas: Sequence[Rung]
) -> tuple[Law, Law, list[Judgement]]:
    """Fit both laws of a ladder, and find the speed-ups of an idea at its sizes."""
    compute, time = Law(ladder, "flops"), Law(ladder, "seconds")
    found = []
    for idea in ideas:
        loss = float(np.mean(idea.losses))
        speedups = compute.speedup(idea), time.speedup(idea)
        found.append(Judgement(idea.name, loss, *speedups, not compute.covers(loss)))
    return compute, time, found


def decision(found: Sequence[Judgement]) -> str:
    """The rule, in words: what the idea's sizes say together.

    An idea is worth more when it is cheaper in compute and in time at every size, and
    not less so at its larger sizes. One that only saves FLOPs waits for a faster
    implementation.
    """
    both = [[each.compute for each in found], [each.time for each in found]]
    better = [all(each.low > 1 for each in own) for own in both]
    worse = [all(each.high < 1 for each in own) for own in both]
    if all(better):
        text = "keep: the same loss for less compute and in less time"
    elif better[0]:
        slower = "more" if worse[1] else "no less"
        text = f"fewer FLOPs for the same loss, but {slower} time"
    elif better[1]:
        text = "less time for the same loss, but no fewer FLOPs"
    elif all(worse):
        text = "drop: the baseline reaches its loss with less compute and in less time"
    elif any(worse):
        what = "FLOPs" if worse[0] else "time"
        text = f"drop: it costs more {what} for the same loss"
    else:
        text = "undecided: seeds and sizes do not agree on a gain"
    if len(found) < 2:
        return f"{text} (one size: nothing is known of larger ones)"
    first, last = found[0].compute, found[-1].compute
    if last.high < first.low:
        text += "; the gain shrinks with size"
    elif last.low > first.high:
        text += "; the gain grows with size"
    if any(each.extrapolated for each in found):
        text += "; partly extrapolated beyond the ladder"
    return text
