"""Forecasts for a replay: which experts later layers will need.

A forecast is called with the rows of a step and a router: -1 before the first layer of
the step, and then every router once its experts are known. It gives the number of
tokens that each expert of some later routers will probably have.

N tokens · R routers · K slots · E experts
"""

from collections.abc import Callable, Iterable

import numpy as np

from moex.config.base import ConfigError, require
from moex.offload.routes import Routes

# (rows, router) -> [(later router, count_E)]
Forecast = Callable[[np.ndarray, int], Iterable[tuple[int, np.ndarray]]]


def known(expert_NRK, num_experts: int) -> Forecast:
    """A forecast of whole steps: predictions for all layers, before the first one.

    Args:
      expert_NRK: predicted experts of every token; -1: none. With the real ones it is
        the bound of all such forecasts.
      num_experts: E.
    """

    def forecast(rows, router):
        if router >= 0:
            return
        for later in range(expert_NRK.shape[1]):
            yield later, _counts(expert_NRK[rows, later], num_experts)

    return forecast


def recorded(routes: Routes, ahead: int = 1) -> Forecast:
    """The next routers' own recorded logits: the bound of running routers early.

    Real decoding runs the later routers on the present state; a trace has only their
    logits on their own one.

    Args:
      routes: with logits.
      ahead: how many routers ahead.
    """
    require(ahead >= 1, "ahead", ahead, "1 or more")
    if routes.logits_NRE is None:
        raise ConfigError(
            "forecast: the trace has no logits of all experts; `moex trace --logits` "
            "records them."
        )
    logits_NRE, slots = routes.logits_NRE, routes.expert_NRK.shape[2]

    def forecast(rows, router):
        for later in _later(router, ahead, routes):
            best_NK = np.argsort(-logits_NRE[rows, later], axis=1, kind="stable")
            yield later, _counts(best_NK[:, :slots], routes.num_experts)

    return forecast


def affinity(profile: Routes, replayed: Routes, ahead: int = 1) -> Forecast:
    """The experts that most often follow those of a router, in a profile.

    Args:
      profile: routes to learn from, of the same model.
      replayed: routes of the replay; of its tokens only the past is used.
      ahead: how many routers ahead.
    """
    require(ahead >= 1, "ahead", ahead, "1 or more")
    num_routers, E = len(profile.layer_R), profile.num_experts
    follows: dict[tuple[int, int], np.ndarray] = {}
    for router in range(num_routers):
        for later in _later(router, ahead, profile):
            count_EE = np.zeros((E, E))
            for one in profile.expert_NRK[:, router].T:
                for two in profile.expert_NRK[:, later].T:
                    both = (one >= 0) & (two >= 0)
                    np.add.at(count_EE, (one[both], two[both]), 1)
            total_E1 = np.maximum(count_EE.sum(1, keepdims=True), 1)
            follows[router, later] = count_EE / total_E1

    def forecast(rows, router):
        for later in _later(router, ahead, replayed):
            ids_TK = replayed.expert_NRK[rows, router]
            # The row of a missing expert is 0.
            chance_TE = np.where(
                (ids_TK >= 0)[:, :, None], follows[router, later][ids_TK], 0
            ).sum(1)
            best_TK = np.argsort(-chance_TE, axis=1, kind="stable")
            yield later, _counts(best_TK[:, : ids_TK.shape[1]], E)

    return forecast


def _later(router: int, ahead: int, routes: Routes) -> range:
    if router < 0:
        return range(0)
    return range(router + 1, min(router + 1 + ahead, len(routes.layer_R)))


def _counts(ids, num_experts: int) -> np.ndarray:
    return np.bincount(ids[ids >= 0], minlength=num_experts).astype(np.float64)
