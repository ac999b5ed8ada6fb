"""Can each way in which routing fails be seen at a glance?

  python -m experiments.monitoring.run [--only=CASE ...] [--out=DIR] [--steps=N]

Trains a healthy model and three unhealthy ones (config.py) on the embedded data, and
checks that the figures of the last step tell them apart and that `moex report` warns of
what is wrong and of nothing else. Writes results.json next to this file; exit code 1 if
a failure does not show. Look: tensorboard --logdir DIR, DIR/CASE/report.html
"""

import argparse
import json
import pathlib
import shutil
import sys
from unittest import mock

import jax

from benchmarks.common import environment
from experiments.monitoring.config import ROUTERS, get_config
from moex.report.health import examine
from moex.report.material import read
from moex.report.write import write_report
from moex.runs.directory import RunDir
from moex.train import training
from moex.train.job import Job

HERE = pathlib.Path(__file__).absolute().parent
LAYER, EXPERT = 2, 5  # the expert that is dead
NAMES = ("max_violation_worst", "dead_frac_worst", "effective_frac_worst", "confidence")
NAMES += ("entropy", "experts_per_token", "dead_frac_worst_layer")


def without_one_expert(job: Job) -> dict:
    """A fresh train state in which no token chooses one expert of one layer.

    Its selection bias is so low that no score makes up for it.
    """
    state = INIT_STATE(job)
    low = -1e3
    state["state"] = jax.tree.map(
        lambda bias_RE: bias_RE.at[LAYER, EXPERT].set(low), state["state"]
    )
    return state


INIT_STATE = Job.init_state


def train(case: str, workdir: pathlib.Path, steps: int | None) -> dict:
    """Train one case; returns the figures of its last logged step."""
    cfg = get_config(case)
    cfg.steps = cfg.steps if steps is None else steps
    forced = without_one_expert if case == "dead" else INIT_STATE
    with mock.patch.object(Job, "init_state", forced):
        result = training.train(cfg, workdir, say=lambda line: None)
    return {name: result[f"moe/{name}"] for name in NAMES} | {"nll": result["eval_nll"]}


# The warnings that a report must have, and others that may follow from them.
KINDS: dict[str, tuple[set, set]] = {
    "healthy": (set(), set()),
    "dead": ({"dead experts"}, set()),
    "collapse": ({"collapse"}, {"dead experts", "entropy collapse"}),
    "saturation": ({"saturated router"}, set()),
}


def warnings(workdir: pathlib.Path) -> dict[str, list[str]]:
    """Write the report of a run; returns its warnings."""
    write_report(workdir)
    return examine(read(RunDir(workdir))).groups


def shows(case: str, figures: dict) -> bool:
    """Whether figures and warnings say what is wrong, or that nothing is."""
    collapsed = figures["effective_frac_worst"] < 0.5
    signs = {
        "dead": figures["dead_frac_worst"] > 0 and not collapsed,
        "collapse": collapsed,
        "saturation": figures["experts_per_token"] > 7.5,
    }
    seen = [name for name, there in signs.items() if there]
    told, (must, may) = set(figures["warnings"]), KINDS[case]
    right = must <= told <= must | may
    return right and seen == ([] if case == "healthy" else [case])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=tuple(ROUTERS))
    parser.add_argument("--out", type=pathlib.Path, default="runs/monitoring")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    found = {}
    for case in args.only or ROUTERS:
        shutil.rmtree(args.out / case, ignore_errors=True)
        found[case] = train(case, args.out / case, args.steps)
        found[case]["warnings"] = warnings(args.out / case)
        found[case]["shows"] = shows(case, found[case])
        print(case, json.dumps(found[case]), flush=True)
    if args.only is None and args.steps is None:
        results = {"cases": found, "environment": environment()}
        (HERE / "results.json").write_text(
            json.dumps(results, indent=1) + "\n", encoding="utf-8"
        )
    sys.exit(0 if all(row["shows"] for row in found.values()) else 1)


if __name__ == "__main__":
    main()
