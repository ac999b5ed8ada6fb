"""How many tokens stay on their device if experts are placed by affinity?

    python -m experiments.placement.run --out=/tmp/placement --seeds=0,1,2

A model of 4 layers of 16 experts, 2 a token (`experiments/compression/testbed.py`), is
traced at several steps of its training: 4608 held-out tokens to place by, and as many
others to score by. Results go to results.json, and tables to results.md; those of other
steps (--steps=0,100,1000,3000, in another folder) to results-3000.json.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compression import testbed
from moex.analysis.record import trace_run
from moex.analysis.trace import Trace
from moex.config.arguments import path
from moex.convert.to_placed import placed_arrays
from moex.json_files import dump_json, read_object
from moex.model.spec import init_params
from moex.nn.context import Context
from moex.placement import affinity as counts
from moex.placement.affinity import Affinity
from moex.placement.plan import make_plan
from moex.placement.solve import How, contiguous, place
from moex.runs.directory import RunDir
from moex.runs.keys import Checkpoint
from moex.runs.open import load_run
from moex.runs.write import write_run
from moex.train.job import make_job
from moex.train.training import train

STEPS = (0, 100, 1000)
TOKENS = 9216  # of a trace; every second example is held out
PROFILES = (48, 16, 4, 2, 1)  # one of so many examples to place by
DEVICES = (2, 4, 8)
PLAIN = 4  # devices of the main table
MILP_SECONDS = 30.0


def runs_of(
    folder: pathlib.Path, seed: int, steps: tuple[int, ...] = STEPS
) -> tuple[pathlib.Path, pathlib.Path]:
    """The run before training, and the trained one with its checkpoints on the way."""
    files = testbed.write_texts((folder / f"texts{seed}").absolute(), seed)
    cfg = testbed.config(files, seed)
    cfg.steps = steps[-1]
    cfg.checkpoint = Checkpoint(every=100, keep=40, keep_best=0)
    first, last = folder / f"first{seed}", folder / f"run{seed}"
    if not RunDir(first).is_run():
        job = make_job(cfg, log=lambda line: None)
        params, state = jax.jit(lambda key: init_params(cfg.model, key))(
            jax.random.key(seed)
        )
        arrays = {"params": params, "state": state}
        write_run(RunDir(first), job.cfg, job, job.tx, job.data, arrays)
    if not RunDir(last).is_run() or cfg.steps not in RunDir(last).saved_steps():
        train(cfg, last, say=lambda line: None)
    return first, last


def traced(folder, run, seed: int, step: int) -> pathlib.Path:
    """The trace of a checkpoint."""
    file = folder / f"trace{seed}-{step}.parquet"
    if not file.exists():
        opened = RunDir(run)
        trace_run(opened, opened.config(), file, tokens=TOKENS, step=step)
    return file


def top(affinity: Affinity) -> dict[str, float]:
    """How sure the next expert is: means over experts that are used, and layers."""
    given, blind = [], []
    for _, _, count_AB in affinity.terms:
        total_A = count_AB.sum(axis=1)
        given.append(count_AB.max(axis=1).sum() / total_A.sum())
        blind.append(count_AB.sum(axis=0).max() / total_A.sum())
    return {"given": float(np.mean(given)), "blind": float(np.mean(blind))}


def scored(own: Affinity, other: Affinity, devices: int, **fields) -> dict:
    """The crossings of a placement and of the controls."""
    how = How(devices=devices, **fields)
    placed, shuffled = place(own, how), own.shuffled(how.seed)
    null = place(shuffled, how)
    before = contiguous(own.layers, devices)
    return {
        "contiguous": before.crossings(other).all,
        "placed": placed.crossings(own).all,
        "held_out": placed.crossings(other).all,
        "null": null.crossings(shuffled).all,
        # The placement by popularity alone, scored on the real text.
        "null_held_out": null.crossings(other).all,
        "gap": placed.gap,
        "imbalance": [before.imbalance(other), placed.imbalance(other)],
    }


def profiled(file, share: int) -> Affinity:
    """The affinity of every `share`-th example of those that are placed by."""
    with Trace.open(file) as trace:
        part = counts._Counts(list(trace.layers.values()), "transitions")
        for chunk in trace.chunks(values=("gate",)):
            part.add(chunk.layers, chunk.tokens.example_N % (2 * share) == 0)
        return part.affinity(trace.header.run, trace.header.step)


def logits_differ(run, own: Affinity) -> float:
    """The largest change of a logit when experts take their places."""
    opened = load_run(run, warn=lambda line: None)
    plan = make_plan(place(own, How(devices=PLAIN)), own, {})
    trees = (opened.params, opened.state)
    placed = [placed_arrays(tree, opened.cfg.model, plan) for tree in trees]
    size = (8, opened.cfg.seq_len)
    token_BL = np.random.default_rng(0).integers(0, 256, size).astype(np.int32)

    @jax.jit
    def logits(params, state):
        ctx = Context.of(token_BL[..., None], token_BL=jnp.asarray(token_BL))
        return opened.spec.merge(params, state)(ctx)[0]

    return float(jnp.max(jnp.abs(logits(*placed) - logits(*trees))))


def one_seed(folder: pathlib.Path, seed: int, steps: tuple[int, ...]) -> dict:
    """The figures of a seed."""
    first, last = runs_of(folder, seed, steps)
    found: dict = {"steps": {}}
    for step in steps:
        file = traced(folder, last if step else first, seed, step)
        own, other = counts.read(file, every=2)
        found["steps"][str(step)] = scored(own, other, PLAIN) | top(own)
    found["tokens"] = [own.tokens, other.tokens]
    found["devices"] = {str(P): scored(own, other, P) for P in DEVICES}
    nodes = place(own, How(devices=8, nodes=2)).crossings(other)
    flat = contiguous(own.layers, 8, 2).crossings(other)
    found["nodes"] = {
        "contiguous": [flat.between, flat.within],
        "placed": [nodes.between, nodes.within],
    }
    found["profile"] = {
        str(part.tokens): place(part, How(devices=PLAIN)).crossings(other).all
        for part in (profiled(file, share) for share in PROFILES)
    }
    # A plan of an early checkpoint on the traffic of the last one.
    early, _ = counts.read(traced(folder, last, seed, steps[1]), every=2)
    stale = place(early, How(devices=PLAIN))
    found["stale"] = stale.crossings(other).all
    limits = {"method": "milp", "time_limit": MILP_SECONDS}
    exact = place(own, How(devices=PLAIN, **limits))
    found["milp"] = {
        "placed": exact.crossings(own).all,
        "held_out": exact.crossings(other).all,
        "gap": exact.gap,
        "notes": list(exact.notes),
    }
    even = place(own, How(devices=PLAIN, slack=0.1))
    found["slack"] = {
        "held_out": even.crossings(other).all,
        "imbalance": even.imbalance(other),
    }
    together, others = counts.read(file, objective="coactivation", every=2)
    grouped = place(together, How(devices=PLAIN))
    whole = contiguous(together.layers, PLAIN)
    found["devices_per_token"] = {
        name: counts.devices_per_token(
            file,
            {
                layer.number: own_E
                for layer, own_E in zip(p.layers, p.device, strict=True)
            },
            2,
        )[1]
        for name, p in (
            ("contiguous", whole),
            ("transitions", place(own, How(devices=PLAIN))),
            ("coactivation", grouped),
        )
    }
    found["logits"] = logits_differ(last, own)
    return found


def stated(values, digits=3) -> str:
    """The mean of the seeds and their deviation."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def table(found: dict) -> str:
    """The tables of all seeds, as Markdown."""
    seeds = list(found.values())
    _, early, *_, last = seeds[0]["steps"]
    names = {
        "contiguous": "as it is",
        "placed": "placed",
        "held_out": "placed, held out",
        "null": "placed without affinity",
        "null_held_out": "that, on real text",
        "given": "next expert known",
        "blind": "blind",
    }
    lines = ["| step | " + " | ".join(names.values()) + " |", "|---" * 8 + "|"]
    for step in seeds[0]["steps"]:
        cells = [stated([s["steps"][step][k] for s in seeds]) for k in names]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    names = {k: v for k, v in names.items() if k not in ("given", "blind")}
    lines += ["", "| devices | chance | " + " | ".join(names.values()) + " |"]
    lines.append("|---" * 7 + "|")
    for P in seeds[0]["devices"]:
        cells = [stated([s["devices"][P][k] for s in seeds]) for k in names]
        lines.append(f"| {P} | {1 - 1 / int(P):.3f} | " + " | ".join(cells) + " |")
    lines += ["", "| tokens to place by | crossings on held-out text |", "|---|---|"]
    for n in seeds[0]["profile"]:
        lines.append(f"| {n} | {stated([s['profile'][n] for s in seeds])} |")
    rest = {
        "8 devices in 2 nodes: between nodes, as it is": lambda s: s["nodes"][
            "contiguous"
        ][0],
        "the same, placed": lambda s: s["nodes"]["placed"][0],
        "in a node, as it is": lambda s: s["nodes"]["contiguous"][1],
        "the same, placed ": lambda s: s["nodes"]["placed"][1],
        f"plan of step {early} on text of step {last}": lambda s: s["stale"],
        "milp: held out": lambda s: s["milp"]["held_out"],
        "milp: gap": lambda s: s["milp"]["gap"],
        "load 10 % above the mean at most: held out": lambda s: s["slack"]["held_out"],
        "fullest device over the mean, as it is": lambda s: s["devices"][str(PLAIN)][
            "imbalance"
        ][0],
        "placed": lambda s: s["devices"][str(PLAIN)]["imbalance"][1],
        "placed with the limit": lambda s: s["slack"]["imbalance"],
        "devices of a token, as it is": lambda s: s["devices_per_token"]["contiguous"],
        "placed by transitions": lambda s: s["devices_per_token"]["transitions"],
        "placed by coactivation": lambda s: s["devices_per_token"]["coactivation"],
    }
    lines += ["", "| | |", "|---|---|"]
    for name, value in rest.items():
        lines.append(f"| {name} | {stated([value(s) for s in seeds])} |")
    worst = max(s["logits"] for s in seeds)
    lines.append(f"| largest change of a logit | {worst:.1e} |")
    return "\n".join([*lines, "", *verdicts(seeds)]) + "\n"


def verdicts(seeds: list[dict]) -> list[str]:
    """Lines about the criteria of the paper notes, over seeds."""
    _, early, *_, last = seeds[0]["steps"]
    ends = [s["steps"][last] for s in seeds]
    before = [s["steps"][early] for s in seeds]
    drifts = [a["held_out"] / b["held_out"] for a, b in zip(before, ends, strict=True)]
    criteria = {
        "held out / as it is": (0.75, [a["held_out"] / a["contiguous"] for a in ends]),
        "held out / placed without affinity": (
            0.85,
            [a["held_out"] / a["null"] for a in ends],
        ),
        f"held out at step {early} / at step {last}, distance from 1": (
            0.15,
            [abs(drift - 1) for drift in drifts],
        ),
        "largest change of a logit": (1e-5, [s["logits"] for s in seeds]),
    }
    lines = []
    for name, (limit, values) in criteria.items():
        told = ", ".join(f"{v:.3g}" for v in values)
        held = f"{sum(v <= limit for v in values)} of {len(values)} seeds"
        lines.append(f"- {name}: {told}; at most {limit:g}: {held}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)))
    args = parser.parse_args()
    steps = tuple(map(int, args.steps.split(",")))
    name = "results" if steps == STEPS else f"results-{steps[-1]}"
    results = pathlib.Path(__file__).with_name(f"{name}.json")
    found = read_object(results) if results.exists() else {}
    for seed in args.seeds.split(","):
        found[seed] = one_seed(pathlib.Path(args.out), int(seed), steps)
        print(seed, found[seed], flush=True)
        found = dict(sorted(found.items()))
        results.write_text(dump_json(found, indent=1) + "\n", encoding="utf-8")
    text = table(found)
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
