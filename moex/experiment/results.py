"""results.json of an experiment: figures by size, arm and seed, and sums over seeds.

S seeds
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moex.analysis.compare import Estimate, estimate
from moex.config.base import nearest
from moex.data.files import atomic_write, locked
from moex.experiment.contract import SIZES, Experiment
from moex.json_files import check_names, digest, dump_json, field, read_object


class NotDone(Exception):
    """A figure is asked for that no seed has; the message names it."""


@dataclasses.dataclass(frozen=True)
class Results:
    """The figures of the arms at one size.

    Attributes:
      arms: figures by name of the arm and seed.
    """

    arms: Mapping[str, Mapping[int, Mapping[str, Any]]]

    def values(self, arm: str, figure: str) -> dict[int, float]:
        """A figure by seed; NaN for one that was not finite.

        Raises:
          NotDone: if no seed has it as a number.
        """
        found = {}
        for seed, own in self.arms.get(arm, {}).items():
            value = own.get(figure, "")
            value = math.nan if value is None else value  # JSON has no NaN
            if isinstance(value, (int, float)):
                found[seed] = float(value)
        if not found:
            raise NotDone(f"{figure} of {arm}")
        return found

    def mean(self, arm: str, figure: str) -> Estimate:
        """The mean over seeds, and half of its 95 % interval."""
        return estimate(np.array(list(self.values(arm, figure).values()), float))

    def pairs(self, arm: str, against: str, figure: str) -> np.ndarray:
        """A figure of two arms of equal seeds, float64[S, 2].

        Raises:
          NotDone: if they have no seed in common.
        """
        mine, theirs = self.values(arm, figure), self.values(against, figure)
        both = sorted(mine.keys() & theirs.keys())
        if not both:
            raise NotDone(f"{figure} of {arm} and {against} with equal seeds")
        return np.array([[mine[s], theirs[s]] for s in both], float)

    def difference(self, arm: str, against: str, figure: str) -> Estimate:
        """`arm` - `against`, seed by seed: the mean and half of its 95 % interval."""
        pair_S2 = self.pairs(arm, against, figure)
        return estimate(pair_S2[:, 0] - pair_S2[:, 1])

    def ratio(self, arm: str, against: str, figure: str) -> Estimate:
        """`arm` / `against`, seed by seed: the mean and half of its 95 % interval."""
        pair_S2 = self.pairs(arm, against, figure)
        return estimate(pair_S2[:, 0] / pair_S2[:, 1])


class File:
    """results.json of an experiment.

    It holds, by size and arm, what the results depend on (`Arm.identity`) and the
    figures of each seed. Results of an arm that is another one today are void.
    """

    def __init__(self, folder: pathlib.Path):
        self.path = folder / "results.json"

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All that is there; {} if there is no file.

        Raises:
          ConfigError: if moex cannot have written it.
        """
        if not self.path.exists():
            return {}
        data = read_object(self.path)
        check_names(data, SIZES, str(self.path))
        for size, arms in data.items():
            for arm in field(data, size, dict[str, Any], str(self.path)):
                where = f"{self.path}, {size}, {arm}"
                own = field(arms, arm, dict[str, Any], f"{self.path}, {size}")
                field(own, "identity", dict[str, Any], where)
                seeds = field(own, "seeds", dict[str, Any], where)
                for seed in seeds:
                    field(seeds, seed, dict[str, Any], f"{where}, seeds")
        return data

    def of(self, experiment: Experiment, size: str) -> Results:
        """The results of arms that are still the same; of those that are not, none."""
        known, found = self.read().get(size, {}), {}
        for name, arm in experiment.arms.items():
            own = known.get(name)
            valid = own and digest(own["identity"]) == digest(arm.identity())
            seeds = own["seeds"] if own and valid else {}
            found[name] = dict(sorted((int(s), f) for s, f in seeds.items()))
        return Results(found)

    def stale(self, experiment: Experiment, size: str) -> list[str]:
        """A line for each arm whose results are of another arm than today's."""
        arms, lines = self.read().get(size, {}), []
        for name, own in arms.items():
            if name not in experiment.arms:
                lines.append(
                    f"{self.path}: {size}: there is no arm {name!r} (any more)."
                    f"{nearest(name, experiment.arms)}"
                )
                continue
            new = experiment.arms[name].identity()
            if digest(own["identity"]) != digest(new):
                at = next(iter(_differences(own["identity"], new, "")), "")
                lines.append(f"{self.path}: {size}: {name} is another arm today: {at}")
        return lines

    def add(
        self, experiment: Experiment, size: str, arm: str, seed: int, found: dict
    ) -> None:
        """Write the figures of a seed of an arm; those of other ones stay."""
        identity = experiment.arms[arm].identity()
        with locked(self.path.with_name(".results.lock")):
            data = self.read()
            arms = data.setdefault(size, {})
            own = arms.get(arm)
            if own is None or digest(own["identity"]) != digest(identity):
                own = arms[arm] = {"identity": identity, "seeds": {}}
            own["seeds"][str(seed)] = found
            own["seeds"] = dict(sorted(own["seeds"].items(), key=lambda kv: int(kv[0])))
            order = [name for name in experiment.arms if name in arms]
            data[size] = {name: arms[name] for name in [*order, *(arms.keys() - order)]}
            atomic_write(self.path, dump_json(data, indent=1) + "\n")


def _differences(old: Any, new: Any, where: str):
    """Yield a text for each plain value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(k for k in new if k not in old)]:
            at = f"{where}.{name}" if where else name
            yield from _differences(old.get(name), new.get(name), at)
    elif isinstance(old, list) and isinstance(new, (list, tuple)):
        longest = max(len(old), len(new))
        for i in range(longest):
            was, now = (side[i] if i < len(side) else None for side in (old, new))
            yield from _differences(was, now, f"{where}[{i}]")
    elif old != new:
        yield f"{where} was {old!r} and is {new!r}."
