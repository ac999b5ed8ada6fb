"""Subsets: the experts that one task needs, as a store of patterns says."""

import dataclasses

from moex.config.arguments import path
from moex.config.base import ConfigError
from moex.convert.kinds.pruned import KEEP_FLAGS, RANDOM, Pruned
from moex.convert.planned import PLAN_FLAGS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset(Pruned):
    """The experts of a task stay; or a store is made, with each domain as a task."""

    kind = "subset"
    about = (
        "the experts of one task of a store stay; with --write-store a store is made, "
        "in which every domain of the data is a task"
    )
    flags = (
        KEEP_FLAGS
        | {
            "store": dict(type=path, metavar="FILE", help="the store; see --task"),
            "task": dict(metavar="NAME", help="a task of the store"),
        }
        | {name: how for name, how in PLAN_FLAGS.items() if name != "plan"}
    )

    score: str = "peu"
    task: str | None = None  # of the store; None: a store is made

    @classmethod
    def from_flags(cls, given):
        from moex.convert.store import Store

        given = dict(given)
        if "store" not in given:
            if "task" in given:
                raise ConfigError("--task: is a task of --store; give both.")
            if "keep" not in given:
                raise ConfigError("--store: missing, or --keep with --write-store.")
            return super().from_flags(given)
        for flag in sorted(given.keys() - {"store", "task"}):
            raise ConfigError(f"--{flag}: is for making a store; --store is one.")
        if "task" not in given:
            raise ConfigError("--task: missing; whose experts stay?")
        file, task = given["store"], given["task"]
        plan = Store.read(file).plan(task)
        return cls(plan=plan, task=task)

    def check_used(self, given):
        """All that is given is used: keys look at the pool too."""

    def recorded(self, source):
        from moex.analysis.record_sums import Recorded

        recorded = Recorded(by_domain=True, pool=self.pool or 1)
        return source.sums(self.calibration, recorded)

    def ready(self, source):
        if self.plan is None:
            raise ConfigError(
                "--to=subset: needs --store and --task, or --write-store to make one."
            )
        return super().ready(source)

    def read(self, source):
        from moex.convert.load_kept import load_kept

        kept = load_kept(source.folder, self.made_plan())
        found = self.found(kept.clipped, source.say)
        return kept.run, found | {"bytes_read": kept.bytes_read}

    def lines(self, report):
        lines = super().lines(report)
        if "bytes_read" in report:
            lines.append(f"read {report['bytes_read']:,} bytes of the checkpoint")
        return lines

    def make_store(self, source):
        """A `Store` with the domains of sums as tasks; `source` is a `Source`."""
        from moex.convert.store import make_store

        self.check()
        sums = self.fitting(source)
        assert sums is not None
        tasks = sums.domains if sums.by_domain else ()
        if not tasks:
            raise ConfigError("--sums: must be by domain (moex trace --by-domain).")
        if self.score == RANDOM:
            raise ConfigError("--score = 'random': has nothing to do with tasks.")
        pruned = {
            task: Pruned(keep=self.keep, score=self.score, domains=(task,))
            for task in tasks
        }
        plans = {task: own.make_plan(source, sums) for task, own in pruned.items()}
        return make_store(sums, plans)
