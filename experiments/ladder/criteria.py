"""Is an MoE worth its time? Verdicts from the ladders of both models."""

import numpy as np

from moex.analysis.ladder import FEWEST, Interval, Law, Rung
from moex.experiment.claims import HOLDS, IN_DIRECTION, NOT_HERE, Finding, true
from moex.experiment.results import NotDone, Results


def rungs(results: Results, kind: str) -> list[Rung]:
    """The sizes of the "moe" or "dense" ladder.

    Seconds are steps times the median step of the arms `time_N`, in which both models
    train in turn in one process: runs are trained beside other work.

    Raises:
      NotDone: if a size has no results.
    """
    found = []
    for number in range(FEWEST):
        arm = f"{kind}_{number}"
        losses = results.values(arm, "nll")
        if len(losses) < 2:
            raise NotDone(f"a second seed of {arm}")
        step_s = results.mean(f"time_{number}", f"{kind}_ms").mean / 1e3
        seconds = [step_s * steps for steps in results.values(arm, "steps").values()]
        flops = results.values(arm, "train_flops").values()
        found.append(Rung(arm, tuple(flops), tuple(seconds), tuple(losses.values())))
    return found


def speedups(results: Results, axis: str) -> list[Interval]:
    """The cost of a mixture's loss on the dense ladder, over what that spent."""
    law = Law(rungs(results, "dense"), axis)
    return [law.speedup(rung) for rung in rungs(results, "moe")]


def _verdict(found) -> Finding:
    numbers = ", ".join(map(str, found))
    if all(each.low > 1 for each in found):
        return Finding(HOLDS, numbers)
    if np.mean([each.value for each in found]) > 1:
        return Finding(IN_DIRECTION, numbers)
    return Finding(NOT_HERE, numbers)


def loss_falls_as_a_law(results):
    """The losses of both ladders follow a power law within twice what seeds differ."""
    laws = [Law(rungs(results, kind), "flops") for kind in ("moe", "dense")]
    ok = all(law.residual <= 2 * law.deviation for law in laws)
    numbers = ", ".join(f"{law.residual:.4f} of {law.deviation:.4f}" for law in laws)
    return true(ok, numbers)


def less_compute(results):
    """A mixture reaches a dense model's loss with less compute, at all sizes."""
    return _verdict(speedups(results, "flops"))


def less_time(results):
    """A mixture reaches a dense model's loss in less time, at all sizes."""
    return _verdict(speedups(results, "seconds"))


MECHANISMS = ()
CLAIMS = (loss_falls_as_a_law, less_compute, less_time)
