"""Verdicts on claims, from results alone: what each word means is decided here."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable

from moex.analysis.compare import Estimate
from moex.experiment.results import NotDone, Results

HOLDS = "holds"
IN_DIRECTION = "holds in direction"
NOT_HERE = "does not hold here"
NOT_TESTED = "not tested at this size"
VERDICTS = (HOLDS, IN_DIRECTION, NOT_HERE, NOT_TESTED)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A verdict, one of `VERDICTS`, and the numbers that it rests on."""

    verdict: str
    numbers: str


Criterion = Callable[[Results], Finding]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and what was found.

    Attributes:
      text: what is claimed: the first line of the criterion's docstring.
      finding: the verdict.
      gates: whether it is a mechanism, which must hold, and no claim of a paper.
    """

    text: str
    finding: Finding
    gates: bool

    def __str__(self) -> str:
        return f"{self.text} {self.finding.verdict}: {self.finding.numbers}"

    @property
    def failed(self) -> bool:
        """Tell whether it is a mechanism that does not hold, so that `check` fails."""
        return self.gates and self.finding.verdict == NOT_HERE


def judge(results: Results, mechanisms: Iterable[Criterion], claims) -> list[Claim]:
    """Judge all claims. One whose arms were not done is not tested."""
    found = []
    for gates, criteria in ((True, mechanisms), (False, claims)):
        for criterion in criteria:
            try:
                finding = criterion(results)
            except NotDone as e:
                finding = Finding(NOT_TESTED, f"{e} is missing")
            text = (inspect.getdoc(criterion) or "").split("\n")[0]
            found.append(Claim(text, finding, gates))
    return found


def smaller(
    effect: Estimate, *, at_most: float = 0.0, nothing: float = 0.0, form="{:+.3f}"
) -> Finding:
    """The verdict on the claim that an effect is smaller than nothing.

    It holds if all of the 95 % interval is below `nothing` and the mean is `at_most` or
    less; it holds in direction if only the first is true. With one seed there is no
    interval, and a claim holds in direction at most.

    Args:
      effect: over seeds, such as `Results.difference`.
      at_most: what was claimed.
      nothing: the value of no effect: 0 of a difference, 1 of a ratio.
      form: how its numbers are written.
    """
    return _judged(effect, effect.mean <= at_most, nothing, form, sign=-1)


def larger(
    effect: Estimate, *, at_least: float = 0.0, nothing: float = 0.0, form="{:+.3f}"
) -> Finding:
    """The verdict on the claim that an effect is larger than nothing; see `smaller`."""
    return _judged(effect, effect.mean >= at_least, nothing, form, sign=1)


def _judged(effect: Estimate, reached: bool, nothing, form: str, sign: int) -> Finding:
    beyond = sign * (effect.mean - nothing)
    if effect.half_width is None:
        verdict = IN_DIRECTION if beyond > 0 else NOT_HERE
        return Finding(verdict, f"{form.format(effect.mean)}, one seed")
    numbers = (
        f"{form.format(effect.mean)} ± {form.format(effect.half_width).lstrip('+')}"
    )
    if not abs(beyond) > effect.half_width:  # NaN is not
        return Finding(NOT_HERE, f"{numbers}: within what seeds differ")
    if beyond < 0:
        return Finding(NOT_HERE, f"{numbers}: the other way")
    return Finding(HOLDS if reached else IN_DIRECTION, numbers)


def true(ok: bool, numbers: str) -> Finding:
    """The verdict on a statement that is true or false."""
    return Finding(HOLDS if ok else NOT_HERE, numbers)
