"""Pruning: some experts of every layer stay, and the others are removed.

Which ones stay is decided in `prune.py`; the model and its parameters are in
`to_pruned.py`.
"""

import dataclasses
from typing import Any

from moex.config.arguments import positive
from moex.config.base import ConfigError, require, require_choice
from moex.convert.base import SHARED
from moex.convert.planned import PLAN_FLAGS, Planned

RANDOM = "random"
POOLED = ("peu", "tcess")  # scores that look at the pool of a token
# The flags that say how a plan is made; `--to=subset` has them too.
KEEP_FLAGS: dict[str, dict[str, Any]] = {
    "keep": dict(
        metavar="N[,N...]",
        help="experts that stay in each layer, or in one after the other; needed "
        "unless there is a plan",
    ),
    "score": dict(
        help="reap (gate times norm of the answer), frequency, peu, tcess, all_logits "
        "or random; default: reap, and peu for stores"
    ),
    "pool": dict(
        type=positive,
        metavar="N",
        help="experts of a token that peu and tcess look at; default: its slots",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruned(Planned):
    """The experts of a plan stay; or those of highest scores, equally many of a layer.

    Routers keep the rows of the experts that stay, and choose as many for a token as
    before. Where the gates of the chosen sum to 1 they still do.
    """

    kind = "pruned"
    plan_kind = "keep"
    keeps_family = True
    about = "some experts of every layer stay and the others are removed"
    flags = (
        KEEP_FLAGS
        | {
            "domains": dict(
                metavar="NAME[,NAME...]",
                help="score by these domains of the data: one for a specialist; the "
                "scores of several are averaged; default: all tokens",
            ),
            "seed": SHARED["seed"],
        }
        | PLAN_FLAGS
    )

    keep: tuple[int, ...] = ()  # of every layer, or of each MoE layer in order
    score: str = "reap"  # one of `SCORES`, or "random"
    domains: tuple[str, ...] = ()  # domains of the data; (): all tokens
    pool: int | None = None  # as in `record_sums.Recorded`
    seed: int = 0  # of random scores

    @classmethod
    def from_flags(cls, given):
        given = dict(given)
        if "keep" in given:
            given["keep"] = counts(given["keep"])
        elif "plan" not in given:
            raise ConfigError("--keep: missing; how many experts stay in a layer?")
        if "domains" in given:
            names = given["domains"] = tuple(given["domains"].split(","))
            once = len(set(names)) == len(names)
            require(once, "--domains", ",".join(names), "each domain once")
        if "sums" in given and "pool" in given:
            raise ConfigError("--pool: the sums have one; it is for --calibration.")
        made = super().from_flags(given)
        made.check_used(given)
        return made

    def check_used(self, given) -> None:
        """Raise `ConfigError` for a flag that the score does not look at."""
        if "seed" in given and self.score != RANDOM:
            raise ConfigError(f"--seed: is for --score={RANDOM}.")
        if "calibration" in given and self.score == RANDOM:
            raise ConfigError(f"--calibration: --score={RANDOM} looks at no data.")
        if "pool" in given and self.score not in POOLED:
            raise ConfigError(f"--pool: is for --score={' or '.join(POOLED)}.")

    def check(self):
        from moex.analysis.scores import SCORES

        require_choice("--score", self.score, (*SCORES, RANDOM))
        require(self.seed >= 0, "--seed", self.seed, ">= 0")
        if self.score == RANDOM and (self.domains or self.sums or self.pool):
            raise ConfigError(
                "--score = 'random': looks at no data; leave out --domains, --sums "
                "and --pool."
            )

    def recorded(self, source):
        from moex.analysis.record_sums import Recorded

        if self.score == RANDOM:
            return None
        recorded = Recorded(by_domain=bool(self.domains), pool=self.pool)
        return source.sums(self.calibration, recorded)

    def make_plan(self, source, sums):
        from moex.convert.plans import Keep, Plan
        from moex.convert.prune import by_layer, kept, random_scores, ranked, scores

        parts, used = [], {}
        if sums is not None:
            parts = [by_layer(self._of(sums, d)) for d in self.domains or (None,)]
            used = by_layer(sums.layers)
        layers = []
        for number, (sparse, keep, even) in checked(source.model, self.keep).items():
            E = sparse.moe.num_experts
            if self.score == RANDOM:
                score_E = random_scores(self.seed, number, E)
                count_E = score_E
            else:
                score_E = scores([own[number] for own in parts], self.score)
                count_E = used[number].count_E[:E]
            chosen = kept(ranked(score_E, count_E), keep, even)
            told = tuple(map(float, score_E))
            layers.append(Keep(layer=number, experts=E, keep=chosen, scores=told))
        how: dict[str, Any] = {"score": self.score, "domains": list(self.domains)}
        if sums is not None:
            how |= {"tokens": sums.tokens, "pool": sums.pool}
        if self.score == RANDOM:
            how["seed"] = self.seed
        return Plan(
            kind=self.plan_kind,
            run=str(source.folder),
            step=source.loaded.step,
            base=source.base,
            layers=tuple(layers),
            how=how,
        )

    def _of(self, sums, domain):
        try:
            return sums.of(domain)
        except ConfigError as e:
            raise ConfigError(f"--domains: {e}") from None

    def model(self, model):
        from moex.convert import to_pruned

        return to_pruned.Pruned.of(model, self.made_plan()).model

    def arrays(self, run, job, say):
        from moex.convert import to_pruned

        pruned = to_pruned.Pruned.of(run.cfg.model, self.made_plan())
        found = self.found(pruned.clipped, say)
        return pruned.arrays(run.params), pruned.arrays(run.state), found

    def found(self, clipped: list[str], say) -> dict:
        """The report on layers; `say` gets lines on tokens that get fewer experts."""
        for line in clipped:
            say(line)
        layers = self.made_plan().by_layer().items()
        kept = {str(n): [len(own.keep), own.experts] for n, own in layers}
        return {"kept": kept, "clipped": clipped}

    def lines(self, report):
        return [
            f"layer {layer}: {keep} of {experts} experts stay"
            for layer, (keep, experts) in report["kept"].items()
        ]


def counts(text: str) -> tuple[int, ...]:
    """The numbers of experts of `--keep`."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise ConfigError(
            f"--keep = {text!r}: must be a number of experts, or one for each MoE "
            "layer such as 8,8,4."
        )
    return tuple(map(int, parts))


def checked(model, keep: tuple[int, ...]) -> dict[int, tuple]:
    """{number of a layer: (its `Sparse`, experts that stay, parts that keep alike)}.

    Raises:
      ConfigError: if the numbers of experts do not fit the model.
    """
    from moex.convert.to_pruned import parts_of
    from moex.model.layers import layers

    found = {n: at.sparse for n, (at, _) in enumerate(layers(model)) if at.sparse}
    if not found:
        raise ConfigError("config.model: has no MoE layer; no expert can be removed.")
    many = keep * len(found) if len(keep) == 1 else keep
    if len(many) != len(found):
        raise ConfigError(
            f"--keep: has {len(keep)} numbers; the model has {len(found)} MoE layers."
        )
    made = {}
    for count, (number, sparse) in zip(many, found.items(), strict=True):
        E = sparse.moe.num_experts
        require(1 <= count <= E, "--keep", count, f"from 1 to {E}, for layer {number}")
        parts = 1 if count == E else parts_of(sparse)
        if count % parts:
            raise ConfigError(
                f"--keep = {count}: layer {number} has {parts} groups of experts that "
                f"must keep as many; a multiple of {parts}."
            )
        made[number] = (sparse, count, parts)
    return made
