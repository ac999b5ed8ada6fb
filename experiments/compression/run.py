"""Is a small model any good when half of its experts, or more, are gone?

  python -m experiments.compression.run [--seeds=0,1,2] [--runs=DIR]

Trains the model of `testbed.py` for each seed, merges and prunes its experts in many
ways, and scores what is left, without any recovery (`recovery.py` has that). Writes
results.json and plot.png next to this file, and prints the tables of the README.

B batch · L length · E experts
"""

import argparse
import dataclasses
import json
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compression.testbed import DOMAINS, EXPERTS, LAYERS, trained
from moex.analysis.record import routed_layers, slots_by_layer
from moex.analysis.record_sums import Recorded, record_sums
from moex.convert.align import merged
from moex.convert.kinds.merged import DEFAULTS, Merged
from moex.convert.kinds.pruned import Pruned
from moex.convert.plans import Plan
from moex.convert.source import Source
from moex.convert.store import Store, keys, make_store, marked_mean
from moex.convert.to_merged import make_plan
from moex.convert.used import Counter
from moex.json_files import read_object
from moex.model.layers import layers
from moex.model.spec import model_spec
from moex.model.steering import Steering
from moex.runs.directory import RunDir

HERE = pathlib.Path(__file__).parent
CALIBRATION, SCORED, QUERIES = 64, 128, 32  # sequences of a domain
SHIFT = 8.0  # what is taken from all logits
KEEPS, DRAWS = (12, 8, 4), 4
UNIFORM = {"budget": "uniform"}
MERGES = {
    "M-SMoE as coded": {"align": "first"},
    "aligned to the dominant": {},
    "not aligned": {"align": "none"},
    "plain average": {"align": "none", "average": "uniform"},
    "random groups": UNIFORM | {"similarity": "random"},
    "M-SMoE, uniform budget": UNIFORM,
    "REAM": {"method": "ream"},
}
PRUNES = {"prune by frequency": "frequency", "prune by REAP": "reap"}
TASKS = {
    "random": ("random", None),
    "global frequency": ("frequency", None),
    "domain frequency": ("frequency", 1),
    "all-logits": ("all_logits", 1),
    "TCESS, pool of 1": ("tcess", 1),
    "PEU, pool of 1": ("peu", 1),
    "PEU, pool of 2": ("peu", 2),
    "REAP": ("reap", 2),
}


class Bed:
    """A trained model, texts to look at and to score, and what scores them."""

    def __init__(self, run: pathlib.Path):
        self.source = Source(RunDir(run), say=lambda line: None)
        self.run, self.job = self.source.loaded, self.source.job(RunDir(run).config())
        # By domain: texts of the training data, and held-out ones.
        self.seen = [self._batch(d, CALIBRATION) for d in self.job.data.train]
        self.held = [self._batch(d, SCORED) for d in self.job.data.eval]
        # Only 21 of the 257 tokens occur; the others do not count.
        self._used_V = np.zeros(self.run.cfg.model.vocab, bool)
        self._used_V[np.unique([batch["targets"] for batch in self.seen])] = True
        task, compute = self.run.cfg.task, self.run.compute(train=False)

        @jax.jit
        def score(params, state, batch, steer):
            ctx = task.context(batch, mode="eval", compute=compute, steer=steer)
            own = self.run.spec.merge(params, state)
            logits_BLV = task.run(own, ctx, batch)[0]
            logits_BLV = jnp.where(self._used_V, logits_BLV, -jnp.inf)
            loss_BL = task.losses(logits_BLV, batch)[0]
            return jnp.sum(loss_BL * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])

        @jax.jit
        def routed(params, state, batch):
            ctx = task.context(batch, mode="eval", collect=True, compute=compute)
            _, aux = self.run.spec.merge(params, state)(ctx)
            return routed_layers(aux, logits=True)

        self._score, self._routed = score, routed
        self.free = self.steer(None)

    @staticmethod
    def _batch(dataset, count: int) -> dict:
        rows = [dataset[i] for i in range(count)]
        return {k: np.stack([row[k] for row in rows]) for k in rows[0]}

    def steer(self, plan: Plan | None) -> dict:
        """The arrays that ban what a plan removes: the same as removing it."""
        model, found = self.run.cfg.model, ()
        if plan is not None:
            file = pathlib.Path(self.run.folder) / "keep.json"
            plan.save(file)
            found = Steering.read(file).layers
        return Steering(layers=tuple(found)).arrays(model)

    def score(self, plan: Plan | None = None, params=None) -> list[float]:
        """The loss in each domain."""
        params, steer = params or self.run.params, self.steer(plan)
        with jax.set_mesh(self.run.mesh):
            return [
                float(self._score(params, self.run.state, batch, steer))
                for batch in self.held
            ]

    def sums(self, pool: int, run=None):
        """The sums of the calibration texts, by domain."""
        return record_sums(
            run or self.run,
            lambda: iter(self.seen),
            domains=DOMAINS,
            data={},
            recorded=Recorded(by_domain=True, pool=pool),
        )

    def queries(self) -> list[tuple[str, dict]]:
        """(domain, query by label) of held-out texts, one each."""
        found = []
        for domain, batch in zip(DOMAINS, self.held, strict=True):
            own = jax.tree.map(lambda a: a[:QUERIES], batch)
            with jax.set_mesh(self.run.mesh):
                arrays = self._routed(self.run.params, self.run.state, own)
            valid_T = np.ones(own["segment"].size, bool)
            slots = slots_by_layer(self.run.cfg.model, jax.device_get(arrays), valid_T)
            for q in range(QUERIES):
                query = {}
                for name, layer in slots.items():
                    logits_BLE = layer.logits_NE.reshape(QUERIES, -1, EXPERTS)
                    valid_L = own["segment"][q] > 0
                    query[name] = marked_mean(logits_BLE[q][valid_L], 1)
                found.append((domain, query))
        return found


def shifted(run):
    """The same model, with every router logit less by `SHIFT`."""
    cfg = dataclasses.replace(run.cfg.model)
    for site, _ in layers(cfg):
        site.sparse.moe.router.logit_bias = True
    blocks = run.params["segments"]["0"]["blocks"]["0"]
    bias_RE = jnp.full((LAYERS, EXPERTS), -SHIFT)
    router = blocks["ffn"]["router"] | {"bias_logits_E": bias_RE}
    ffn = blocks["ffn"] | {"router": router}
    params = run.params | {"segments": {"0": {"blocks": {"0": blocks | {"ffn": ffn}}}}}
    own = dataclasses.replace(run, spec=model_spec(cfg, run.mesh), params=params)
    own.cfg = type(run.cfg)(run.cfg)
    own.cfg.model = cfg
    return own


def expanded(params: dict, plan: Plan, align: str) -> dict:
    """Parameters in which every expert has a copy of the weights of its group."""
    blocks = params["segments"]["0"]["blocks"]["0"]
    experts = {k: np.array(v) for k, v in blocks["ffn"]["experts"].items()}
    for own in plan.layers:
        weights = {k: v[own.layer] for k, v in experts.items()}
        groups = merged(weights, own, align)
        for g, members in enumerate(own.groups):
            for name, value in groups.items():
                experts[name][own.layer, list(members)] = value[g]
    ffn = blocks["ffn"] | {"experts": jax.tree.map(jnp.asarray, experts)}
    return params | {"segments": {"0": {"blocks": {"0": blocks | {"ffn": ffn}}}}}


def one_seed(run: pathlib.Path) -> dict:
    bed = Bed(run)
    full = bed.score()
    print(f"  full: {statistics.mean(full):.3f}", flush=True)
    by_pool = {pool: bed.sums(pool) for pool in (1, 2)}
    results: dict = {"full": full, "merged": {}, "tasks": {}}

    def pruned(**options) -> Plan:
        pool = options.pop("pool", 2)
        return Pruned(**options).make_plan(bed.source, by_pool[pool])

    counter = Counter(bed.run, bed.job, len(DOMAINS) * CALIBRATION)
    used = counter.used(bed.run.params)
    for keep in KEEPS:
        rows = {}
        for title, options in MERGES.items():
            options = DEFAULTS[options.get("method", "msmoe")] | options
            how = Merged(groups=keep, **options)
            plan = make_plan(bed.run, counter, used, how)
            own = expanded(bed.run.params, plan, how.align)
            rows[title] = bed.score(params=own)
        for title, score in PRUNES.items():
            rows[title] = bed.score(pruned(keep=(keep,), score=score))
        results["merged"][str(keep)] = rows
        print(
            f"  {keep}: { {k: round(statistics.mean(v), 3) for k, v in rows.items()} }"
        )
    for keep in KEEPS[1:]:
        rows = {}
        for title, (score, pool) in TASKS.items():
            rows[title] = []
            for d, domain in enumerate(DOMAINS):
                own = {"keep": (keep,), "score": score, "pool": pool or 2}
                own |= {"domains": (domain,)} if pool else {"seed": d}
                rows[title].append(_in_and_out(bed.score(pruned(**own)), d))
        # One plan for two domains, by the mean of their scores.
        own = {"keep": (keep,), "score": "peu", "domains": tuple(DOMAINS[:2])}
        rows["generalist"] = [_two(bed.score(pruned(**own)))]
        results["tasks"][str(keep)] = rows
        print(f"  {keep}: { {k: _mean(v) for k, v in rows.items()} }", flush=True)
    results["shift"] = shift_test(bed, by_pool, results["tasks"]["8"])
    results["retrieval"] = retrieval(bed, by_pool[1])
    results["begin"] = begin_test(bed, by_pool[2])
    print(f"  {results['shift']}\n  {results['retrieval']}", flush=True)
    return results


def _in_and_out(losses: list[float], d: int) -> list[float]:
    """The loss in a domain, and its mean in the others."""
    return [losses[d], statistics.mean(losses[:d] + losses[d + 1 :])]


def _two(losses: list[float]) -> list[float]:
    return [statistics.mean(losses[:2]), statistics.mean(losses[2:])]


def _mean(pairs) -> list[float]:
    return [round(statistics.mean(column), 3) for column in zip(*pairs, strict=True)]


def shift_test(bed: Bed, by_pool, rows) -> dict:
    """Losses in the domain with plans from logits as they are, and shifted."""
    other = shifted(bed.run)
    moved = {pool: bed.sums(pool, other) for pool in by_pool}
    found = {}
    for title in ("TCESS, pool of 1", "PEU, pool of 1", "PEU, pool of 2"):
        score, pool = TASKS[title]
        after = []
        for d, domain in enumerate(DOMAINS):
            sums = dataclasses.replace(moved[pool], base=bed.source.base)
            how = Pruned(keep=(8,), score=score, domains=(domain,))
            after.append(bed.score(how.make_plan(bed.source, sums))[d])
        before = statistics.mean(pair[0] for pair in rows[title])
        found[title] = [before, statistics.mean(after)]
    return found


def retrieval(bed: Bed, sums) -> dict:
    """The share of queries that find their domain, by the first layer and by all."""
    plans = {
        d: Pruned(keep=(8,), score="peu", domains=(d,)).make_plan(bed.source, sums)
        for d in DOMAINS
    }
    store: Store = make_store(sums, plans)
    first = next(iter(keys(sums.layers)))
    queries = bed.queries()
    own = [store.find({first: q[first]}).task == d for d, q in queries]
    every = [store.find(q).task == d for d, q in queries]
    return {"first": statistics.mean(own), "all": statistics.mean(every)}


def begin_test(bed: Bed, sums) -> dict:
    """Losses with plans as they are, and where they keep what the begin token needs.

    Each plan keeps as many experts as before: the worst of them make room.
    """
    own = jax.tree.map(lambda a: a[:1], bed.held[0])
    with jax.set_mesh(bed.run.mesh):
        arrays = bed._routed(bed.run.params, bed.run.state, own)
    valid_T = own["segment"].reshape(-1) > 0
    slots = slots_by_layer(bed.run.cfg.model, jax.device_get(arrays), valid_T)
    needed = [layer.expert_NK[0].tolist() for layer in slots.values()]
    found: dict = {}
    for score in ("frequency", "reap", "random"):
        for keep in KEEPS[1:]:
            plan = Pruned(keep=(keep,), score=score).make_plan(bed.source, sums)
            rows = []
            for layer, first in zip(plan.layers, needed, strict=True):
                rest = [e for e in np.argsort(layer.scores)[::-1] if e not in first]
                kept = map(int, (*first, *rest[: keep - len(first)]))
                rows.append(dataclasses.replace(layer, keep=tuple(sorted(kept))))
            other = dataclasses.replace(plan, layers=tuple(rows))
            pair = [statistics.mean(bed.score(one)) for one in (plan, other)]
            found.setdefault(score, {})[str(keep)] = pair
    return found


def verdicts(seeds: dict) -> list[str]:
    """The criteria of the paper notes, each with what was found."""
    runs = list(seeds.values())

    def merged_at_8(title):
        return [statistics.mean(r["merged"]["8"][title]) for r in runs]

    def tasks_at_8(title, column=0):
        return [_column(r["tasks"]["8"][title], column) for r in runs]

    own, lines = merged_at_8("M-SMoE, uniform budget"), []
    for other in ("plain average", "random groups"):
        gains = [b - a for a, b in zip(own, merged_at_8(other), strict=True)]
        lines.append(_line(f"M-SMoE below {other} by 0.03", gains, 0.03))
    aligned, plain = (
        merged_at_8(t) for t in ("aligned to the dominant", "not aligned")
    )
    gains = [b - a for a, b in zip(aligned, plain, strict=True)]
    lines.append(_line("alignment not worse than none", gains, 0.0))
    peu, out = tasks_at_8("PEU, pool of 2"), tasks_at_8("PEU, pool of 2", 1)
    random, frequency = tasks_at_8("random"), tasks_at_8("global frequency")
    ratios = [0.6 - a / b for a, b in zip(peu, random, strict=True)]
    lines.append(_line("PEU at most 0.6 of random (0.6 - ratio)", ratios, 0.0))
    gains = [b - a for a, b in zip(peu, frequency, strict=True)]
    lines.append(_line("PEU below global frequency by 0.3", gains, 0.3))
    gains = [b - a for a, b in zip(peu, out, strict=True)]
    lines.append(_line("in the domain below others by 0.8", gains, 0.8))
    for title, least in (("TCESS, pool of 1", 0.5), ("PEU, pool of 2", None)):
        moves = [r["shift"][title][1] - r["shift"][title][0] for r in runs]
        if least is None:
            rooms = [0.05 - abs(move) for move in moves]
            lines.append(
                _line("shift: PEU moves by 0.05 at most (0.05 - |move|)", rooms, 0)
            )
        else:
            lines.append(_line("shift: TCESS loses 0.5", moves, least))
    for kind in ("first", "all"):
        shares = [r["retrieval"][kind] for r in runs]
        lines.append(_line(f"retrieval by {kind} at least 0.85", shares, 0.85))
    return lines


def _column(pairs, column: int) -> float:
    return statistics.mean(pair[column] for pair in pairs)


def _line(title: str, values, least: float) -> str:
    holds = sum(v >= least for v in values)
    mean = statistics.mean(values)
    word = "holds" if mean >= least and holds * 3 >= 2 * len(values) else "fails"
    return f"{title}: {mean:.3f} on average, {holds} of {len(values)} seeds: {word}"


def table(seeds: dict) -> str:
    """The tables of the README: means over seeds, ± the deviation."""
    runs, lines = list(seeds.values()), []
    full = _cell([statistics.mean(r["full"]) for r in runs])
    lines += [f"All experts: {full}", "", "| experts or groups | 12 | 8 | 4 |"]
    lines += ["|---|---|---|---|"]
    for title in (*MERGES, *PRUNES):
        cells = [
            _cell([statistics.mean(r["merged"][str(k)][title]) for r in runs])
            for k in KEEPS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    heads = [f"{k} of 16: {w}" for k in KEEPS[1:] for w in ("in", "out")]
    lines += ["", f"| score | {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for title in (*TASKS, "generalist"):
        cells = [
            _cell([_column(r["tasks"][str(k)][title], c) for r in runs])
            for k in KEEPS[1:]
            for c in (0, 1)
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| plan from logits - 8 | before | after |", "|---|---|---|"]
    for title in runs[0]["shift"]:
        cells = [_cell([r["shift"][title][i] for r in runs]) for i in (0, 1)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| score | 8 of 16 | with them | 4 of 16 | with them |"]
    lines += ["|---|---|---|---|---|"]
    for score in runs[0]["begin"]:
        cells = [
            _cell([r["begin"][score][str(k)][i] for r in runs])
            for k in KEEPS[1:]
            for i in (0, 1)
        ]
        lines.append(f"| {score} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *verdicts(seeds)])


def _cell(values, digits=3) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def plot(seeds: dict) -> None:
    """Draw the loss over the number of experts, merged and pruned, as means."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = list(seeds.values())
    full = statistics.mean(statistics.mean(r["full"]) for r in runs)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for title in (*MERGES, *PRUNES):
        means = [
            statistics.mean(statistics.mean(r["merged"][str(k)][title]) for r in runs)
            for k in KEEPS
        ]
        style = "--" if title in PRUNES else "-"
        axes[0].plot([16, *KEEPS], [full, *means], style, marker="o", label=title)
    axes[0].set(title="all domains", xlabel="experts, or groups", ylabel="loss, nats")
    for title in TASKS:
        means = [
            statistics.mean(_column(r["tasks"][str(k)][title], 0) for r in runs)
            for k in KEEPS[1:]
        ]
        axes[1].plot([16, *KEEPS[1:]], [full, *means], marker="o", label=title)
    axes[1].set(title="in the domain that experts are kept for", xlabel="experts")
    for axis in axes:
        axis.invert_xaxis()
        axis.legend(fontsize=6)
    figure.savefig(HERE / "plot.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=pathlib.Path, default="runs/compression")
    parser.add_argument("--cache", default="runs/programs")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", args.cache)
    file = HERE / "results.json"
    for seed in filter(None, args.seeds.split(",")):
        print(f"seed {seed}", flush=True)
        found = {seed: one_seed(trained(args.runs, int(seed)))}
        before = read_object(file) if file.exists() else {}
        seeds = dict(sorted((before.get("seeds", {}) | found).items()))
        device = jax.devices()[0].device_kind
        text = json.dumps(before | {"device": device, "seeds": seeds}, indent=1)
        file.write_text(text + "\n", encoding="utf-8")
    seeds = read_object(file)["seeds"]
    print(table(seeds))
    plot(seeds)


if __name__ == "__main__":
    main()
