"""Figures of a sequence of tasks, computed by hand."""

import numpy as np
import pytest

from moex.analysis.continual import figures

# Rows: after task 0, 1, 2; columns: scores on tasks 0, 1, 2.
SCORES = [
    [0.9, 0.2, 0.1],
    [0.5, 0.8, 0.3],
    [0.6, 0.9, 0.7],
]


def test_figures_of_three_tasks():
    found = figures(SCORES)
    assert found == pytest.approx(
        {
            "transfer": (0.2 + (0.1 + 0.3) / 2) / 2,
            "average": 5.0 / 9,
            "last": (0.6 + 0.9 + 0.7) / 3,
            "learned": (0.9 + 0.8 + 0.7) / 3,
            "forgetting": (0.3 - 0.1) / 2,  # task 1 gained 0.1
            "bwt": (0.3 + 0 + 0) / 3,  # gains count as 0, the last task counts
        }
    )


def test_nothing_is_forgotten_where_scores_stay():
    same = figures(np.full((4, 4), 0.5))
    assert same["forgetting"] == same["bwt"] == 0
    assert {same[n] for n in ("transfer", "average", "last", "learned")} == {0.5}


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4,)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="square matrix"):
        figures(np.zeros(shape))
