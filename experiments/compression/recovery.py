"""Recovery by a few steps of distillation: losses and stable ranks, by method.

    python -m experiments.compression.recovery --out=/tmp/compression --seeds=0,1,2

Each method makes the model of `testbed.py` smaller by half; then it is trained 250
steps with frozen routers, with the uncut model as its teacher. `router only` trains
routers and nothing else. Results go to recovery.json beside this file.
"""

import argparse
import dataclasses
import pathlib
import shutil

import numpy as np

from experiments.compression import testbed
from moex.config.arguments import path
from moex.convert.apply import convert_run
from moex.convert.base import asked_for, kinds
from moex.convert.lowrank import stable_rank
from moex.json_files import dump_json, read_object
from moex.model.optim import AdamW, Optim
from moex.model.paths import flat_paths
from moex.model.pruning import PruneRows
from moex.runs.directory import RunDir
from moex.runs.keys import Eval
from moex.runs.open import load_run
from moex.runs.score import score_run
from moex.tasks.distillation import Distillation
from moex.train.training import train

STEPS, SEQUENCES = 250, 512
FROZEN = (("*router*", 0.0),)
ROUTERS = (("*", 0.0), ("*router*", 1.0))
MERGED = {"to": "merged", "groups": 8}
UNIFORM = MERGED | {"budget": "uniform"}
PRUNED = {"to": "pruned", "keep": "8"}
# Flags of each method; () leaves the model as it is.
METHODS = {
    "not compressed": (),
    "M-SMoE, uniform budget": (UNIFORM,),
    "M-SMoE, as in its code": (MERGED | {"align": "first"},),
    "random groups": (UNIFORM | {"similarity": "random"},),
    "plain average, not aligned": (UNIFORM | {"align": "none", "average": "uniform"},),
    "REAM": (MERGED | {"method": "ream"},),
    "pruned by frequency": (PRUNED | {"score": "frequency"},),
    "pruned by REAP": (PRUNED | {"score": "reap"},),
    "MC-SMoE, rank 8": (UNIFORM, {"to": "lowrank", "factor_rank": 8}),
}
ROUTER_ONLY = ("M-SMoE, uniform budget", "pruned by REAP")


def convert(source, target, flags) -> None:
    """Convert a run by flags of `moex convert`, unless it is there."""
    if RunDir(target).is_run():
        return
    every = {flag for kind in kinds().values() for flag in kind.flags}
    given = dict.fromkeys(every) | {k: v for k, v in flags.items() if k != "to"}
    convert_run(
        source, target, asked_for(flags["to"], given), sequences=0, say=lambda _: None
    )


def loss(run) -> float:
    """The held-out loss, nats per token."""
    return score_run(RunDir(run), RunDir(run).config(), sequences=SEQUENCES)["nll"]


def recovered(run, target, teacher, factors, prune=None) -> pathlib.Path:
    """Train a run by distillation, unless it is there."""
    cfg = RunDir(run).config()
    cfg.init_from, cfg.steps = str(run), STEPS
    cfg.task = Distillation(teacher=str(teacher), weight=0.2, temperature=2.0)
    cfg.optim = Optim(
        rule=AdamW(), lr=1e-3, final_lr_frac=0.0, lr_factors=factors, prune=prune
    )
    cfg.eval = Eval(every=0, sequences=SEQUENCES)
    cfg.log = dataclasses.replace(cfg.log, every=50)
    done = RunDir(target)
    if not done.is_run() or STEPS not in done.saved_steps():
        shutil.rmtree(target, ignore_errors=True)
        train(cfg, target, say=lambda _: None)
    return target


def mean_stable_rank(run) -> float:
    """The mean over all matrices of the experts; U V + S counts as one matrix."""
    params = {
        k: np.asarray(v)
        for k, v in flat_paths(load_run(run, warn=lambda _: None).params).items()
    }
    found = []
    for name, array in params.items():
        if name.endswith("w_in_ED2F"):
            found += list(np.moveaxis(array, 3, 2).reshape(-1, *array.shape[2::2]))
        elif name.endswith("w_out_EFD"):
            found += list(array.reshape(-1, *array.shape[2:]))
    return float(np.mean([stable_rank(w) for w in found])) if found else float("nan")


def one_seed(folder: pathlib.Path, seed: int) -> dict:
    """The figures of all methods for one seed."""
    full = testbed.trained(folder, seed)
    found = {}
    for number, (name, flags) in enumerate(METHODS.items()):
        run = full
        for part, own in enumerate(flags):
            target = folder / f"recovery{seed}" / f"{number}-{part}"
            convert(run, target, own | ({"seed": seed} if "similarity" in own else {}))
            run = target
        prune = PruneRows(keep=0.1, warmup=10) if name.startswith("MC") else None
        after = recovered(run, folder / f"recovery{seed}" / f"{number}-after", full,
                          FROZEN, prune)  # fmt: skip
        if prune is not None:
            small = folder / f"recovery{seed}" / f"{number}-compact"
            convert(after, small, {"to": "lowrank", "compact": True})
            after = small
        found[name] = {
            "before": loss(run),
            "after": loss(after),
            "parameters": sum(
                a.size for a in flat_paths(load_run(after).params).values()
            ),
            "stable_rank": [mean_stable_rank(r) for r in (run, after)],
        }
        if name in ROUTER_ONLY:
            target = folder / f"recovery{seed}" / f"{number}-router"
            found[name]["router only"] = loss(recovered(run, target, full, ROUTERS))
        print(seed, name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    results = pathlib.Path(__file__).with_name("recovery.json")
    found = read_object(results) if results.exists() else {}
    for seed in args.seeds.split(","):
        found[seed] = one_seed(pathlib.Path(args.out), int(seed))
        results.write_text(dump_json(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
