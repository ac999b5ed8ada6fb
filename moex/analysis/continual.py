"""Figures of learning tasks one after another, from a matrix of scores.

a_TJ[t, j] is the score on task j after training on task t, both in the order in which
they are learned; higher is better. Pure functions on numpy arrays.

T tasks that were learned · J the same tasks, scored
"""

import numpy as np


def figures(a_TJ) -> dict[str, float]:
    """Figures of a sequence of at least two tasks.

    Returns:
      transfer: the mean over tasks, but the first, of their mean score before they are
        learned.
      average: the mean of all scores.
      last: the mean score after the last task; TRACE calls it OP.
      learned: the mean score of each task right after it was learned.
      forgetting: the mean over all tasks but the last of the score lost since then;
        below 0 where later tasks helped.
      bwt: backward transfer as in the code of MoRAM for TRACE: the mean over all
        tasks, the last one too, of the score lost since, where a gain counts as 0. It
        is published with this sign: lower is better. The usual form is minus
        `forgetting`.

    Raises:
      ValueError: if it is no square matrix of two tasks or more.

    Source: transfer, average, last: Zheng et al. 2023, arXiv:2303.06628; bwt: Lopez-Paz
    and Ranzato 2017, arXiv:1706.08840, as changed in arXiv:2506.21035.
    """
    a_TJ = np.asarray(a_TJ, np.float64)
    T = len(a_TJ)
    if a_TJ.shape != (T, T) or T < 2:
        raise ValueError(f"a square matrix of 2 tasks or more, not {a_TJ.shape}.")
    lost_J = np.diagonal(a_TJ) - a_TJ[-1]
    return {
        "transfer": float(np.mean([a_TJ[:j, j].mean() for j in range(1, T)])),
        "average": float(a_TJ.mean()),
        "last": float(a_TJ[-1].mean()),
        "learned": float(np.diagonal(a_TJ).mean()),
        "forgetting": float(lost_J[:-1].mean()),
        "bwt": float(np.maximum(lost_J, 0).mean()),
    }
