"""Which experts to keep, to prefetch and to leave to the host, in replays of a trace?

    python -m experiments.offload.run [--seeds=0,1,2]

The model of `experiments/compression/testbed.py` (4 layers of 16 experts, 2 a token) is
trained for each seed. Its held-out texts are traced: 96 of them are replayed, mixed, as
decoding would go, after a predictor was trained on the others. Writes results.json and
plot.png next to this file, and prints the tables of the README.

L layers · E experts
"""

import dataclasses
import itertools
import pathlib
import statistics

import numpy as np

from experiments.compression.testbed import trained
from experiments.seeds import run_seeds
from moex.analysis.record import trace_run
from moex.analysis.trace import Trace
from moex.offload.cache import ExpertCache
from moex.offload.costs import Costs
from moex.offload.fit import Training, fit, recalls
from moex.offload.forecasts import affinity, known, recorded
from moex.offload.policies import Belady, Lfu, Lru, Mrs, Predicted, Random, Static
from moex.offload.predictor import windows
from moex.offload.routes import Routes, in_step, read_routes
from moex.offload.schedule import SCHEDULERS
from moex.offload.simulate import needs_of, simulate
from moex.offload.tokens import distinct, divide
from moex.runs.directory import RunDir

HERE = pathlib.Path(__file__).parent
RUNS = pathlib.Path("runs/compression")
REPLAYED, FEW = 96, 8  # texts, of all replays and of those with many costs
SLOTS = (4, 8, 12)  # of 16 experts of a layer
# The constants of HybriMoE's code, without the rest of a layer.
REPO = Costs(cpu_first=0.79, cpu_row=1.0, device=0.5, move=0.41791011235117914)
DRAWS = 60  # of sequences, for the token scheduler
TIMES = tuple(itertools.product((0.1, 0.4, 1.6, 6.4), (0.2, 1.0, 5.0)))  # (move, cpu)


class Misassigned(Mrs):
    """MRS as released: the top scores, largest first, go to experts in their order."""

    def routed(self, layer, score_E):
        score_E = np.asarray(score_E, np.float64)
        self._sum_LE[layer] *= 1 - self._alpha
        best = np.argsort(-score_E, kind="stable")[: self._top]
        self._sum_LE[layer, np.sort(best)] += self._alpha * score_E[best]


def mixed(routes: Routes, seed: int) -> tuple[Routes, Routes]:
    """Texts to learn from, and `REPLAYED` texts in a random order."""
    order = np.random.default_rng(seed).permutation(routes.num_examples)
    starts = np.flatnonzero(routes.index_N == 0)
    ends = [*starts[1:], len(routes)]
    rows = np.concatenate([np.arange(starts[e], ends[e]) for e in order[:REPLAYED]])
    arrays = {
        f.name: getattr(routes, f.name)[rows]
        for f in dataclasses.fields(routes)
        if isinstance(getattr(routes, f.name), np.ndarray)
    }
    arrays["example_N"] = np.cumsum(arrays["index_N"] == 0) - 1
    others_N = ~np.isin(routes.example_N, order[:REPLAYED])
    return routes.tokens(others_N), dataclasses.replace(routes, **arrays)


def replay(routes, slots: int, policy, costs=REPO, *, batch=1, **options):
    """Replay with as many slots for every layer."""
    L, E = routes.num_layers, routes.num_experts
    cache = ExpertCache(L, E, slots * L, policy, per_layer=[slots] * L)
    return simulate(routes, in_step(routes, batch), cache, costs, **options)


def policies(profile: Routes, routes: Routes) -> dict:
    """Makers of every policy."""
    shape = routes.num_layers, routes.num_experts
    top = 2 * routes.expert_NRK.shape[2]
    needs = needs_of(routes, in_step(routes))
    return {
        "random": lambda: Random(*shape),
        "LRU": lambda: Lru(*shape),
        "LFU": lambda: Lfu(*shape),
        "static": lambda: Static(profile.counts()),
        "MRS 0.25": lambda: Mrs(*shape, top=top, alpha=0.25),
        "MRS 0.5": lambda: Mrs(*shape, top=top, alpha=0.5),
        "MRS as released": lambda: Misassigned(*shape, top=top, alpha=0.5),
        "Belady": lambda: Belady(*shape, needs),
    }


def hit_rates(profile, routes) -> dict:
    """Demand loading: {policy: {slots: share of hits}}."""
    return {
        name: {str(s): replay(routes, s, make()).hit_rate for s in SLOTS}
        for name, make in policies(profile, routes).items()
    }


def predictors(trace: Trace, profile, routes, seed: int) -> tuple[dict, np.ndarray]:
    """Recall of windows of 1, 2 and 4 tokens, and what the last one names."""
    found = {}
    for last in (1, 2, 4):
        predictor = fit(trace, Training(seed=seed), last=last, routes=profile)
        found[str(last)] = recalls(predictor, profile, routes)
    return found, predictor.experts(windows(routes, predictor.about))


def grouping(routes: Routes, named_NRK, seed: int) -> dict:
    """Distinct experts of two batches, divided anew, beside the order of arrival."""
    predicted = dataclasses.replace(routes, expert_NRK=named_NRK)
    first = routes.expert_NRK[:, :, :1], named_NRK[:, :, :1]
    cases = {
        f"{k} a token, batch {batch}": (k, batch)
        for k, batch in ((1, 4), (1, 8), (2, 4), (2, 8), (2, 16))
    }
    starts, found = np.flatnonzero(routes.index_N == 0), {}
    for name, (k, batch) in cases.items():
        real, guess = routes, predicted
        if k == 1:
            real, guess = (dataclasses.replace(routes, expert_NRK=i) for i in first)
        rng, sums = np.random.default_rng(seed), np.zeros(3)
        for _ in range(DRAWS):
            texts = rng.choice(starts, 2 * batch, replace=False)
            rows = texts + rng.integers(4, 44)
            true_TLE = real.patterns(rows)
            arrival = np.arange(batch), np.arange(batch, 2 * batch)
            parts = arrival, divide(true_TLE), divide(guess.patterns(rows))
            sums += [sum(distinct(true_TLE, part) for part in pair) for pair in parts]
        found[name] = {
            "arrival": sums[0] / DRAWS,
            "true": sums[1] / sums[0],
            "predicted": sums[2] / sums[0],
        }
    return found


def prefetching(profile, routes, named_NRK) -> dict:
    """Hit rates and times at 4 slots with forecasts, for a fast and a slow link."""
    shape, E = (routes.num_layers, routes.num_experts), routes.num_experts
    top, found = 2 * routes.expert_NRK.shape[2], {}
    few = routes.examples(0, FEW)
    forecasts = {
        "none": None,
        "affinity": affinity(profile, few),
        "next routers' logits": recorded(few),
        "predictor": known(named_NRK[: len(few)], E),
        "perfect": known(few.expert_NRK, E),
    }
    # A layer without its experts takes 1, an expert on the device 0.1.
    for move in (0.05, 0.5, 5.0):
        costs = Costs(device=0.1, move=move, layer=1.0)
        rows = {}
        for name, forecast in forecasts.items():
            makers = {"LRU": lambda: Lru(*shape), "MRS": lambda: Mrs(*shape, top=top)}
            if forecast is not None:
                makers["predicted"] = lambda: Predicted(*shape)
            for policy, make in makers.items():
                result = replay(few, 4, make(), costs, forecast=forecast)
                rows[f"{name}, {policy}"] = {
                    "hits": result.hit_rate,
                    "moves": result.moves_per_token,
                    "time": result.time / result.tokens,
                }
        found[str(move)] = rows
    return found


def schedules(seed: int) -> dict:
    """Makespans of random layers, mean and worst over the best, by costs."""
    rng, layers = np.random.default_rng(seed), []
    for size, most in [(8, 1)] * 100 + [(10, 20)] * 100:
        experts = rng.permutation(size).tolist()
        here = round(size / 4)
        load = rng.integers(1, most + 1, size).tolist()
        layers.append((experts[:here], experts[here:], load))
    cases = {
        "8 experts, 1 token": layers[:100],
        "10 experts, 1-20 tokens": layers[100:],
    }
    found = {}
    every = {"HybriMoE's constants": REPO}
    for move, cpu in TIMES:
        every[f"move {move:g}, cpu {cpu:g}"] = Costs(
            cpu_first=0.79 * cpu, cpu_row=cpu, device=0.5, move=move
        )
    for name, costs in every.items():
        for case, own in cases.items():
            times = {
                kind: np.array([f(*layer, costs).time for layer in own])
                for kind, f in SCHEDULERS.items()
            }
            found[f"{name}; {case}"] = {
                kind: [float(t.mean()), float((t / times["best"]).max())]
                for kind, t in times.items()
            }
    return found


def hybrid(profile, routes) -> dict:
    """Time per token at 4 slots by scheduler, with MRS, for a sweep of costs."""
    shape = routes.num_layers, routes.num_experts
    top, found = 2 * routes.expert_NRK.shape[2], {}
    few = routes.examples(0, FEW)
    for move, cpu in TIMES:
        costs = Costs(cpu_first=0.0, cpu_row=cpu, device=0.1, move=move, layer=0.2)
        found[f"{move:g}, {cpu:g}"] = {
            name: replay(few, 4, Mrs(*shape, top=top), costs, scheduler=f).time
            / len(few)
            for name, f in SCHEDULERS.items()
        }
    return found


def one_seed(seed: int) -> dict:
    """All results of a seed."""
    run = trained(RUNS, seed)
    file = RUNS / f"held{seed}.parquet"
    if not file.exists():
        trace_run(run, RunDir(run).config(), file, logits=True)
    with Trace.open(file) as trace:
        profile, routes = mixed(read_routes(trace, logits=True), seed)
        recall, named_NRK = predictors(trace, profile, routes, seed)
    found = {
        "tokens": len(routes),
        "profile_tokens": len(profile),
        "hits": hit_rates(profile, routes),
        "recall": recall,
        "grouping": grouping(routes, named_NRK, seed),
        "prefetching": prefetching(profile, routes, named_NRK),
        "schedules": schedules(seed),
        "hybrid": hybrid(profile, routes),
    }
    met = {name: bool(value) for name, value in verdicts(found).items()}
    return found | {"verdicts": met}


def verdicts(found: dict) -> dict[str, bool]:
    """The criteria, each met or not."""
    hits, recall = found["hits"], found["recall"]["4"]
    mean = {n: statistics.mean(r[n] for r in recall) for n in ("predicted", "popular")}
    fast = found["prefetching"]["0.05"]
    own = [v for k, v in found["schedules"].items() if k.startswith("HybriMoE")]
    mrs = hits["MRS 0.25"]
    return {
        "MRS is 1 point above LRU at 4 and 8 slots": all(
            mrs[s] >= hits["LRU"][s] + 0.01 for s in ("4", "8")
        ),
        "MRS at 0.5 is not below the released one": all(
            hits["MRS 0.5"][s] >= hits["MRS as released"][s] for s in ("4", "8")
        ),
        "no policy is above Belady": all(
            row[s] <= hits["Belady"][s] for row in hits.values() for s in row
        ),
        "recall is 0.8 and 3 times popularity": (
            mean["predicted"] >= max(0.8, 3 * mean["popular"])
        ),
        "regrouping is at most 0.96 at 1 a token, batch 8": (
            found["grouping"]["1 a token, batch 8"]["true"] <= 0.96
        ),
        "regrouping never needs more on average": all(
            row["true"] <= 1 for row in found["grouping"].values()
        ),
        "predicted has 10 points more than LRU at 4 slots": (
            fast["predictor, predicted"]["hits"] >= fast["none, LRU"]["hits"] + 0.1
        ),
        "HSS is at most 1.15 times the best": all(r["hss"][1] <= 1.15 for r in own),
        "HSS is below static and device on average": all(
            r["hss"][0] <= min(r["static"][0], r["device"][0]) for r in own
        ),
    }


def cell(values, form="{:.3f}") -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


def table(results: dict) -> str:
    """All tables, in Markdown."""
    seeds = list(results["seeds"].values())
    told = [
        "Hit rates, demand loading:",
        "",
        "| policy | 4 | 8 | 12 |",
        "|---|---|---|---|",
    ]
    for name in seeds[0]["hits"]:
        row = [cell([s["hits"][name][str(n)] for s in seeds]) for n in SLOTS]
        told.append(f"| {name} | {' | '.join(row)} |")
    told += ["", "Recall at 2:", "", "| | 0 | 1 | 2 | 3 | mean |", "|---|" + "---|" * 5]
    ways = [(f"predictor, last {h}", h, "predicted") for h in ("1", "2", "4")]
    ways += [(name, "4", name) for name in ("popular", "previous")]
    for title, last, name in ways:
        by_layer = [[r[name] for r in s["recall"][last]] for s in seeds]
        row = [cell(v) for v in zip(*by_layer, strict=True)]
        row.append(cell([statistics.mean(v) for v in by_layer]))
        told.append(f"| {title} | {' | '.join(row)} |")
    told += ["", "Distinct experts of two batches:", ""]
    told += ["| | arrival | true patterns | predicted |", "|---|---|---|---|"]
    for name in seeds[0]["grouping"]:
        own = [s["grouping"][name] for s in seeds]
        row = [cell([o["arrival"] for o in own], "{:.1f}")]
        row += [cell([o[k] for o in own]) for k in ("true", "predicted")]
        told.append(f"| {name} | {' | '.join(row)} |")
    moves = list(seeds[0]["prefetching"])
    told += [
        "",
        "Prefetching at 4 slots (hits; moves and time per token), by t_move:",
        "",
    ]
    told += [
        f"| forecast, policy | {' | '.join(moves)} |",
        "|---|" + "---|" * len(moves),
    ]
    for name in seeds[0]["prefetching"][moves[0]]:
        row = []
        for move in moves:
            own = [s["prefetching"][move][name] for s in seeds]
            mean = {k: statistics.mean(o[k] for o in own) for k in own[0]}
            row.append(f"{mean['hits']:.3f}; {mean['moves']:.2f}; {mean['time']:.2f}")
        told.append(f"| {name} | {' | '.join(row)} |")
    kinds = list(SCHEDULERS)
    head = [f"| | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    told += ["", "Makespans, mean (most times the best):", "", *head]
    for name in seeds[0]["schedules"]:
        own = [s["schedules"][name] for s in seeds]
        mean = {k: statistics.mean(o[k][0] for o in own) for k in kinds}
        worst = {k: max(o[k][1] for o in own) for k in kinds}
        row = [f"{mean[k]:.2f} ({worst[k]:.2f})" for k in kinds]
        told.append(f"| {name} | {' | '.join(row)} |")
    told += ["", "Time per token at 4 slots, MRS (t_move, t_cpu):", "", *head]
    for name in seeds[0]["hybrid"]:
        own = [s["hybrid"][name] for s in seeds]
        row = [f"{statistics.mean(o[k] for o in own):.2f}" for k in kinds]
        told.append(f"| {name} | {' | '.join(row)} |")
    told += ["", "Criteria:", ""]
    for name in seeds[0]["verdicts"]:
        met = [s["verdicts"][name] for s in seeds]
        told.append(f"- {name}: {sum(met)} of {len(met)} seeds")
    return "\n".join(told)


def plot(results: dict) -> None:
    """Hit rates over slots, the mean of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds = list(results["seeds"].values())
    figure, axis = plt.subplots(figsize=(6, 4))
    for name in seeds[0]["hits"]:
        rates = [statistics.mean(s["hits"][name][str(n)] for s in seeds) for n in SLOTS]
        axis.plot(SLOTS, rates, marker="o", label=name)
    axis.set(xlabel="slots of a layer of 16 experts", ylabel="hit rate", xticks=SLOTS)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "plot.png", dpi=100)


if __name__ == "__main__":
    run_seeds(__doc__, HERE, one_seed, table, plot)
