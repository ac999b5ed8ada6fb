"""Placement as an integer program, solved by HiGHS.

x[l, u, p] = 1 where unit u of layer l is on device p; y[a, b] >= |x[a, p] - x[b, p]|
for all p is 1 where tokens from a to b change devices. The y may be fractions between:
at integer x they are not. Equal transitions are summed, so the program does not grow
with tokens.

Source: ExFlow, arXiv:2401.08383, whose program has variables for every token.

U units of a layer · P devices
"""

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from moex.config.base import ConfigError
from moex.placement import lsa
from moex.placement.problem import NoPlacement, Problem, Solution, canonical

TIME_LIMIT = 60.0  # seconds of one problem
MOST_ROWS = 4_000_000
INFEASIBLE = 2  # status of scipy


def solve(
    problem: Problem, *, time_limit: float = TIME_LIMIT, restarts: int, seed: int
) -> Solution:
    """The placement of the solver, with its bound.

    If the time is up, coordinate descent (`lsa.py`) is tried too, and the better one is
    taken.

    Raises:
      NoPlacement: if the limits of load allow none.
    """
    program = _Program(problem)
    found = program.run(time_limit)
    if found.status == INFEASIBLE:
        raise NoPlacement("no placement keeps to the load")
    bound = 0.0 if found.mip_dual_bound is None else max(found.mip_dual_bound, 0.0)
    if found.x is not None:
        device = canonical(program.devices(found.x), problem.devices)
        cost = problem.cost(device)
        if found.status == 0:
            # Counts are whole numbers: what is left of a gap is rounding.
            return Solution(device, cost, float(min(cost, np.ceil(bound - 1e-6))))
        own = Solution(device, cost, bound)
    other = lsa.solve(problem, restarts=restarts, seed=seed)
    if found.x is None:
        notes = (f"milp found no placement in {time_limit:g} s; this one is of lsa",)
        return Solution(other.device, other.cost, bound, notes)
    if other.cost < own.cost:
        notes = (f"milp stopped after {time_limit:g} s; lsa found a better placement",)
        return Solution(other.device, other.cost, bound, notes)
    return Solution(own.device, own.cost, bound, (f"stopped after {time_limit:g} s",))


class _Program:
    """The variables and rows of a problem."""

    def __init__(self, problem: Problem):
        self.problem, P = problem, problem.devices
        sizes = np.array(problem.sizes)
        self.first_L = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.units = int(sizes.sum())
        pairs = []
        for a, b, count_AB in problem.terms:
            for i, j in np.argwhere(count_AB):
                if a != b or i != j:
                    ends = (self.first_L[a] + i, self.first_L[b] + j)
                    pairs.append((*ends, count_AB[i, j]))
        if 2 * len(pairs) * P > MOST_ROWS:
            raise ConfigError(
                f"--method=milp: {2 * len(pairs) * P:,} inequalities are too many (at "
                f"most {MOST_ROWS:,}); use --method=lsa."
            )
        self.pair_Y3 = np.array(pairs, np.int64).reshape(-1, 3)

    def run(self, time_limit: float):
        """The result of scipy."""
        problem, P = self.problem, self.problem.devices
        X, Y = self.units * P, len(self.pair_Y3)
        cost = np.concatenate([np.zeros(X), self.pair_Y3[:, 2]])
        whole = np.concatenate([np.ones(X), np.zeros(Y)])
        most = np.ones(X + Y)
        # Devices are alike: unit u of the first layer is on one of the first u + 1.
        for u in range(problem.sizes[0]):
            most[u * P + u + 1 : (u + 1) * P] = 0
        options = {"time_limit": time_limit, "mip_rel_gap": 0.0}
        return milp(
            cost,
            integrality=whole,
            bounds=Bounds(0, most),
            constraints=[*self._assigned(X + Y), self._apart(X, Y)],
            options=options,
        )

    def devices(self, x) -> list[np.ndarray]:
        """The device of every unit in a solution."""
        P = self.problem.devices
        device_U = np.argmax(x[: self.units * P].reshape(-1, P), axis=1)
        return np.split(device_U, self.first_L[1:])

    def _assigned(self, columns: int) -> list[LinearConstraint]:
        """Each unit on one device, as many on each, and not too much load."""
        problem, P = self.problem, self.problem.devices
        X = self.units * P
        one = sparse.csr_array(
            (np.ones(X), (np.arange(X) // P, np.arange(X))), (self.units, columns)
        )
        layer_U = np.repeat(np.arange(len(problem.sizes)), problem.sizes)
        row_X = np.repeat(layer_U, P) * P + np.tile(np.arange(P), self.units)
        rows = (len(problem.sizes) * P, columns)

        def by_device(weight_U):
            weight_X = np.repeat(weight_U, P)
            return sparse.csr_array((weight_X, (row_X, np.arange(X))), rows)

        share = np.repeat(np.array(problem.sizes) // P, P)
        found = [
            LinearConstraint(one, 1, 1),
            LinearConstraint(by_device(np.ones(self.units)), share, share),
        ]
        if problem.load is not None:
            limit = np.repeat(problem.most, P)
            load = by_device(np.concatenate(problem.load))
            found.append(LinearConstraint(load, -np.inf, limit))
        return found

    def _apart(self, X: int, Y: int) -> LinearConstraint:
        """y >= x_a - x_b and y >= x_b - x_a, on every device."""
        P = self.problem.devices
        a_Y, b_Y, _ = self.pair_Y3.T
        row_N = np.arange(2 * Y * P)
        y_N, p_N = row_N // (2 * P), row_N % P
        sign_N = np.where(row_N // P % 2 == 0, 1.0, -1.0)
        columns = [X + y_N, a_Y[y_N] * P + p_N, b_Y[y_N] * P + p_N]
        values = [np.ones(len(row_N)), -sign_N, sign_N]
        entries = (np.concatenate(values), (np.tile(row_N, 3), np.concatenate(columns)))
        matrix = sparse.csr_array(entries, (len(row_N), X + Y))
        return LinearConstraint(matrix, 0, np.inf)
