"""Stores of patterns: which experts each task needs, and how to tell tasks apart.

A key of a task is the mean over its tokens of the router logits of a layer, where only
those of the token's pool count (TCESS). The same mean over a prompt is a query, and the
task whose key is nearest is that of the prompt.

Source: PreMoe, arXiv:2505.17639, version 1 (pattern storage and retrieval).

N tokens · E experts (zero-computation ones too)
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from moex.analysis.scores import SCORES, score_sums
from moex.analysis.sums import LayerSums, Sums
from moex.config.base import ConfigError, nearest, require
from moex.convert.plans import Keep, Plan, layer_plan
from moex.data.files import atomic_write
from moex.json_files import check_names, dump_json, field, read_object
from moex.model.layers import routers

MOST = float(np.finfo(np.float32).max)  # of a key: means of float32 logits
WORDS = ("auto", "all")  # what `--experts` says in place of the name of a task


class Found(NamedTuple):
    """The task whose key is nearest to a query."""

    task: str
    distance: float  # squared
    others: dict[str, float]  # the squared distances of all tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """A task: its keys, and the experts that it needs."""

    task: str
    keys: dict[str, list[float]]  # by label of a router, in the order of the model
    layers: tuple[Keep, ...]

    def key(self, labels) -> np.ndarray:
        """The keys of these routers, one after another."""
        return np.concatenate([np.asarray(self.keys[name]) for name in labels])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """The patterns of a model."""

    VERSION: ClassVar[int] = 1

    run: str  # as in `Plan`
    step: int
    base: str
    pool: int  # experts of a token that keys look at, those of greatest logits
    patterns: tuple[Pattern, ...]
    how: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Names it in errors: the file that it was read from.
    where: str = dataclasses.field(default="the store", compare=False)

    def check(self, model) -> None:
        """Check that its keys are of the routers of a `Model` config.

        Raises:
          ConfigError: naming the keys of the first task.
        """
        sizes = {own.label: own.moe.num_choices() for own in routers(model)}
        keys = {name: len(key) for name, key in self.patterns[0].keys.items()}
        told = f"{self.where}: task {self.patterns[0].task}: keys"
        wanted = f"of these routers, with as many numbers: {sizes}"
        require(keys == sizes, told, keys, wanted)
        most = min(sizes.values())
        allowed = f"at most {most}, the choices of a router"
        require(self.pool <= most, f"{self.where}: pool", self.pool, allowed)

    def plan(self, task: str) -> Plan:
        """The plan of a task.

        Raises:
          ConfigError: if the store has no such task.
        """
        known = {own.task: own for own in self.patterns}
        if task not in known:
            raise ConfigError(
                f"{self.where}: no task {short_list([task])}; the store has "
                f"{short_list(known)}.{nearest(task, known)}"
            )
        return Plan(
            kind="keep",
            run=self.run,
            step=self.step,
            base=self.base,
            layers=known[task].layers,
            how=self.how | {"task": task},
            where=f"{self.where}: task {task}",
        )

    def find(self, query: Mapping[str, np.ndarray]) -> Found:
        """The task nearest to a query; of equally near ones the first.

        Args:
          query: from `marked_mean`, by label of some routers of the model.
        """
        asked = np.concatenate([np.asarray(query[name], float) for name in query])
        distances = {
            own.task: float(np.sum((own.key(query) - asked) ** 2))
            for own in self.patterns
        }
        task = min(distances, key=distances.__getitem__)
        return Found(task, distances[task], distances)

    def save(self, file) -> None:
        """Write it as JSON: each key, and each layer of a task, has its own line."""
        head = {"version": self.VERSION, "kind": "store"}
        head |= {n: getattr(self, n) for n in ("run", "step", "base", "pool", "how")}
        lines = [f" {json.dumps(k)}: {dump_json(v)}," for k, v in head.items()]
        tasks = []
        for own in self.patterns:
            keys = [f"   {json.dumps(k)}: {dump_json(v)}" for k, v in own.keys.items()]
            layers = [f"   {dump_json(dataclasses.asdict(x))}" for x in own.layers]
            tasks.append(
                f'  {{"task": {json.dumps(own.task)}, "keys": {{\n'
                + ",\n".join(keys)
                + '},\n   "layers": [\n'
                + ",\n".join(layers)
                + "]}"
            )
        text = "\n".join(["{", *lines, ' "tasks": [', ",\n".join(tasks), " ]", "}"])
        atomic_write(Path(file), text + "\n")

    @classmethod
    def read(cls, file) -> Self:
        """Read what `save` wrote, or a person edited.

        Raises:
          ConfigError: naming the file, the task and the value that is wrong.
        """
        data, where = read_object(file), str(file)
        kind = field(data, "kind", str, where)
        require(kind == "store", f"{where}: kind", kind, "'store'")
        names = ("version", "kind", "run", "step", "base", "pool", "how", "tasks")
        check_names(data, names, where)
        version = field(data, "version", int, where)
        require(version == cls.VERSION, f"{where}: version", version, str(cls.VERSION))
        pool = field(data, "pool", int, where)
        require(pool >= 1, f"{where}: pool", pool, "at least 1")
        patterns: dict[str, Pattern] = {}
        for row in field(data, "tasks", list[dict], where):
            own = _pattern(row, where)
            if own.task in patterns:
                raise ConfigError(f"{where}: task {own.task} stands there twice.")
            patterns[own.task] = own
        require(len(patterns) > 0, f"{where}: tasks", [], "not empty")
        first, *rest = patterns.values()
        sizes = {name: len(key) for name, key in first.keys.items()}
        for own in rest:
            same = {name: len(key) for name, key in own.keys.items()} == sizes
            told = f"{where}: task {own.task}: keys"
            require(same, told, sorted(own.keys), f"of the sizes of {first.task}")
        return cls(
            run=field(data, "run", str, where),
            step=field(data, "step", int, where),
            base=field(data, "base", str, where),
            pool=pool,
            patterns=tuple(patterns.values()),
            how=field(data, "how", dict, where, {}),
            where=where,
        )


def short_list(names) -> str:
    """Names for people."""
    return ", ".join(map(repr, names))


def _pattern(row: dict[str, Any], where: str) -> Pattern:
    task = field(row, "task", str, where)
    told = f"{where}: task {task}"
    require(task not in WORDS, told, task, f"another name than {short_list(WORDS)}")
    check_names(row, ("task", "keys", "layers"), told)
    keys = field(row, "keys", dict[str, list[float]], told)
    require(len(keys) > 0, f"{told}: keys", [], "not empty")
    for name, key in keys.items():
        fits = len(key) > 0 and bool((np.abs(key) <= MOST).all())
        require(fits, f"{told}: keys[{name}]", key[:3], f"up to {MOST:.1e} in size")
    rows = field(row, "layers", list[dict], told)
    layers: tuple[Any, ...] = tuple(layer_plan(own, "keep", told) for own in rows)
    require(len(layers) > 0, f"{told}: layers", [], "not empty")
    numbers = [own.layer for own in layers]
    once = len(set(numbers)) == len(numbers)
    require(once, f"{told}: layers", numbers, "each layer once")
    return Pattern(task=task, keys=keys, layers=layers)


def make_store(sums: Sums, plans: Mapping[str, Plan]) -> Store:
    """The store of the tasks that have plans.

    Args:
      sums: by domain; a task is a domain.
      plans: by task, of one run.

    Raises:
      ConfigError: if the sums have no one size of the pool.
    """
    if sums.pool is None:
        raise ConfigError(
            "--sums: record them with --pool=N, such as 1: a query looks at as many "
            "experts of a token as the keys do."
        )
    first = next(iter(plans.values()))
    for task in plans:
        require(task not in WORDS, "--domains", task, f"none of {short_list(WORDS)}")
    patterns = tuple(
        Pattern(
            task=task, keys=keys(sums.of(task)), layers=tuple(own.by_layer().values())
        )
        for task, own in plans.items()
    )
    return Store(
        run=first.run,
        step=first.step,
        base=first.base,
        pool=sums.pool,
        patterns=patterns,
        how={k: v for k, v in first.how.items() if k != "domains"},
    )


def keys(sums: Mapping[str, LayerSums]) -> dict[str, list[float]]:
    """The key of each router."""
    return {name: SCORES["tcess"](own).tolist() for name, own in sums.items()}


def marked_mean(logits_NE, pool: int) -> np.ndarray:
    """float64[E]: the mean over tokens of the logits, 0 outside of a token's pool.

    Among equal logits the lowest expert is first.
    """
    logits_NE = np.asarray(logits_NE, np.float64)
    N, E = logits_NE.shape
    order_NP = np.argsort(-logits_NE, axis=1, kind="stable")[:, :pool]
    logit_NP = np.take_along_axis(logits_NE, order_NP, 1)
    valid_NP = np.ones(order_NP.shape, bool)
    group_N = np.zeros(N, int)
    return score_sums(order_NP, logit_NP, valid_NP, group_N, 1, E)[0] / N
