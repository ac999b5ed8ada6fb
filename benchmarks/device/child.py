"""The process of a step: runs its benchmarks one after the other.

  python -m benchmarks.device.child --out=FOLDER --step=NAME --process=NAME
      [--dry-run] RUN ...

Each run leaves two lines in `FOLDER/partial/STEP.jsonl`, when it starts and when it has
ended, and its figures in a file next to it: `runner` reads what is there when the
process is killed. A run that fails does not keep the next from its turn.
"""

import argparse
import importlib
import json
import pathlib
import sys
import time
import traceback

from benchmarks.device.steps import STEPS, Run, processes


def figures_file(out: pathlib.Path, step: str, run: str) -> pathlib.Path:
    """Where a run leaves its figures."""
    return out / "partial" / f"{step}.{run.replace(' ', '_')}.json"


def events_file(out: pathlib.Path, step: str) -> pathlib.Path:
    """Where the runs of a step say that they start and that they have ended."""
    return out / "partial" / f"{step}.jsonl"


def arguments(run: Run, out: pathlib.Path) -> list[str]:
    """The arguments of a run."""
    return [arg.replace("{out}", str(out)) for arg in run.args]


def use_tilings(out: pathlib.Path) -> None:
    """Lets kernels take the tiles that the step "tiles" found before."""
    from kernels_pallas import tuned

    if (file := out / "tilings.json").exists():
        tuned.PATH = file
        tuned.table.cache_clear()


def execute(run: Run, out: pathlib.Path, step: str) -> None:
    """Runs one benchmark in this process, as its command line would."""
    file = figures_file(out, step, run.name)
    file.parent.mkdir(parents=True, exist_ok=True)

    def tell(**event) -> None:
        with open(events_file(out, step), "a", encoding="utf-8") as f:
            f.write(json.dumps({"run": run.name, **event}) + "\n")

    tell(event="started")
    print(f"== {step}: {run.name}", flush=True)
    began, before = time.monotonic(), sys.argv
    sys.argv = [run.module, *arguments(run, out), f"--json={file}"]
    error = None
    try:
        module = importlib.import_module(run.module)
        if step != "tiles":
            use_tilings(out)
        module.main()
    except Exception as e:
        traceback.print_exc()
        error = f"{type(e).__name__}: {e}"[:1000]
    except SystemExit as e:
        error = None if e.code in (0, None) else f"exit: {e.code}"
    finally:
        sys.argv = before
    seconds = round(time.monotonic() - began, 2)
    tell(event="done" if error is None else "failed", seconds=seconds, error=error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--step", required=True)
    parser.add_argument("--process", required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("runs", nargs="+")
    args = parser.parse_args()
    step = next(step for step in STEPS if step.name == args.step)
    found = {process.name: process for process in processes(step, args.dry_run)}
    known = {run.name: run for run in found[args.process].runs}
    for name in args.runs:
        execute(known[name], args.out, args.step)


if __name__ == "__main__":
    main()
