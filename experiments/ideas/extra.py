"""The digest: a row for each idea, with its speed-ups by the ladder."""

import numpy as np

from experiments.ideas.config import IDEAS, RUNGS
from experiments.ladder.criteria import rungs
from moex.analysis.ladder import Interval, Judgement, Law, Rung, decision
from moex.experiment.find import find
from moex.experiment.page import markdown
from moex.experiment.results import NotDone, Results


def judged(results: Results, ladder: Results) -> dict[str, list[Judgement]]:
    """The judgements of each idea at its sizes; those that were done.

    The loss of an idea is that of the ladder's law plus its difference to the baseline,
    seed by seed, so that what seeds share is no noise. Time is compute times the ratio
    of steps that were run in turn.
    """
    own = rungs(ladder, "moe")
    law, found = Law(own, "flops"), {}
    for idea in IDEAS:
        try:
            found[idea] = [_one(results, ladder, law, idea, rung) for rung in RUNGS]
        except NotDone:
            continue
    return found


def _one(results, ladder, law: Law, idea: str, rung: int) -> Judgement:
    mine = results.values(f"{idea}_{rung}", "nll")
    theirs = ladder.values(f"moe_{rung}", "nll")
    both = sorted(mine.keys() & theirs.keys())
    if len(both) < 2:
        raise NotDone(f"two seeds of {idea}_{rung} that the ladder has")
    known = [ladder.values(f"moe_{rung}", name) for name in FIGURES]
    baseline = Rung("", *(tuple(values.values()) for values in known))
    spent = np.mean(list(results.values(f"{idea}_{rung}", "train_flops").values()))
    difference_S = np.array([mine[s] - theirs[s] for s in both])
    compute = law.paired(baseline, difference_S, float(spent))
    # The idea's time for the same FLOPs, over the baseline's.
    slower = results.mean(f"time_{idea}_{rung}", "ratio").mean
    slower *= baseline.spent("flops") / spent
    time = Interval(*(value / slower for value in compute))
    loss = float(np.mean(list(mine.values())))
    return Judgement(f"{idea}_{rung}", loss, compute, time, not law.covers(loss))


FIGURES = ("train_flops", "train_s", "nll")


def markdown_lines(results: Results, size: str) -> list[str]:
    """The digest as Markdown."""
    ladder = find("ladder")
    try:
        found = judged(results, ladder.results(size))
    except NotDone as e:
        return [f"The ladder is not done: {e}.", ""]
    heads = ["idea", "what changes"]
    for rung in RUNGS:
        heads += [f"compute, rung {rung}", f"time, rung {rung}"]
    rows = [[*heads, "judgement"]]
    for idea, own in found.items():
        cells = [str(value) for each in own for value in (each.compute, each.time)]
        rows.append([idea, IDEAS[idea][0], *cells, decision(own)])
    return ["Speed-ups over the ladder's mixture:", "", *markdown(rows), ""]
