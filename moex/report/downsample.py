"""Long series as few points, so that a page is small however long the run was.

S logged steps
"""

import numpy as np

POINTS = 1000  # the most points of a curve


def spaced(count: int, most: int) -> np.ndarray:
    """At most `most` evenly spaced indices below `count`, with the first and last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def curve(step_S, value_S, most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points of a curve that keep its spikes.

    A long curve is cut into equal stretches, of which the lowest and the highest point
    are kept, and its first and last point.

    Args:
      step_S: ascending.
      value_S: float[S]; NaN is kept only in curves that are not thinned.
      most: 4 or more.
    """
    step_S, value_S = np.asarray(step_S), np.asarray(value_S)
    if len(step_S) <= most:
        return step_S, value_S
    kept = {0, len(step_S) - 1}
    for part in np.array_split(np.arange(len(step_S)), (most - 2) // 2):
        if np.isfinite(value_S[part]).any():
            kept |= {
                part[np.nanargmin(value_S[part])],
                part[np.nanargmax(value_S[part])],
            }
    indices = np.array(sorted(kept))
    return step_S[indices], value_S[indices]
