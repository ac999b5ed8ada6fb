"""Low-rank experts with a residual, and the same without the rows that are 0."""

import dataclasses

from moex.config.arguments import positive
from moex.config.base import ConfigError, require
from moex.convert.base import Conversion


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToLowRank(Conversion):
    """`LowRankGlu` in place of `Glu`, or compact residuals in place of whole ones."""

    kind = "lowrank"
    about = (
        "the matrices of the experts of every MoE layer become U V + S, exactly, and "
        "S is pruned in training (optim.prune); with --compact the rows of S that are "
        "0 go, and are no longer computed"
    )
    flags = {
        "factor_rank": dict(
            type=positive, metavar="RANK", help="rank of U V; default: 32"
        ),
        "compact": dict(
            action="store_const", const=True, help="drop the rows that are 0"
        ),
    }

    factor_rank: int = 32
    compact: bool = False
    # {site: (rows of gate and up, rows of down)} that are stored, with `compact`.
    rows: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_flags(cls, given):
        if "factor_rank" in given and given.get("compact"):
            raise ConfigError(
                "--factor-rank: is for experts that have no U V + S yet; --compact is "
                "for those that have."
            )
        return cls(**given)

    def check(self):
        require(self.factor_rank >= 1, "--factor-rank", self.factor_rank, "at least 1")

    def ready(self, source):
        from moex.convert.lowrank import check_experts, stored_rows

        check_experts(source.model, compact=self.compact)
        if not self.compact:
            return self
        rows = stored_rows(source.loaded.params, source.model)
        return dataclasses.replace(self, rows=rows)

    def options(self):
        if self.compact:
            return {"compact": True, "rows": self.rows}
        return {"factor_rank": self.factor_rank, "compact": False}

    def model(self, model):
        from moex.convert.lowrank import compact_model, lowrank_model

        if self.compact:
            return compact_model(model, self.rows)
        return lowrank_model(model, self.factor_rank)

    def arrays(self, run, job, say):
        from moex.convert.lowrank import compact_arrays, factored

        made = self.model(run.cfg.model)
        if self.compact:
            params, state = compact_arrays(run.params, run.state, made)
            return params, state, {}
        params, errors = factored(run.params, made)
        return params, run.state, {"errors": errors}

    def lines(self, report):
        if self.compact:
            return [
                f"{where}: {i} rows of gate and up, {o} of down are stored"
                for where, (i, o) in report["rows"].items()
            ]
        lines = [f"{'layer':>5} {'op':<5} {'|S|/|W|':>8} {'stable rank':>11}"]
        return lines + [
            "{layer:>5} {op:<5} {error:>8.4f} {stable_rank:>11.2f}".format(**row)
            for row in report["errors"]
        ]
