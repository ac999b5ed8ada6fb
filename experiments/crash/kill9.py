"""Does a run that is killed again and again end like one that was left alone?

  python experiments/crash/kill9.py --kills 20 [--steps N] [--seed S] [--out DIR]

Trains experiments/crash/config.py twice: undisturbed, and with `kill -9` at random
moments, each followed by the same command. Compares every logged loss. Writes
results.json next to this file; exit code 0 if all are equal.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).absolute().parent
ROOT = HERE.parents[1]


def train_command(config, workdir, *overrides) -> list[str]:
    """The command `moex train` in this interpreter."""
    return [
        *(sys.executable, "-m", "moex.cli", "train"),
        *(f"--config={config}", f"--workdir={workdir}"),
        *(f"--config.{o}" for o in overrides),
    ]


def start(command, env) -> subprocess.Popen:
    """Start the command; its lines of progress come through a pipe."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        encoding="utf-8",
        errors="replace",
    )


def step_of(line: str) -> int | None:
    """The step that a line of progress tells of."""
    head = line.split("/")[0].split()
    return int(head[1]) if head[:1] == ["step"] and "/" in line else None


def kill_once(command, env, rng, target: int, startup_s: float | None) -> dict:
    """Start the command and kill it; returns what was killed and where.

    One kill in four comes at any moment of the start; the others come at any moment of
    the step after `target`.
    """
    process = start(command, env)
    began, step, step_s = time.monotonic(), 0, 0.0
    early = startup_s is not None and rng.random() < 0.25
    if early:
        time.sleep(rng.uniform(0, startup_s))
    else:
        for line in process.stdout:
            now = time.monotonic()
            if step_of(line) is not None:
                startup_s = startup_s if step else now - began
                step, step_s, began = step_of(line), now - began, now
            if step >= target:
                time.sleep(rng.uniform(0, 2 * step_s))
                break
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    if not alive and process.returncode != 0:
        raise RuntimeError(f"the run failed by itself:\n{err}")
    place = {"while": "starting" if early else "training", "step": step, "hit": alive}
    return place | {"startup_s": None if startup_s is None else round(startup_s, 1)}


def kill_and_resume(command, env, *, steps, kills, rng) -> list[dict]:
    """Kill the run `kills` times, restart it each time, let the last one finish.

    Fewer kills are made if the run ends before; the steps are spread so that it lasts.
    """
    made, reached, startup_s = [], 0, None
    for left in range(kills + 1, 1, -1):
        share = max(3 * (steps - reached) // (2 * left), 1)
        target = min(reached + rng.randint(1, share), steps - 1)
        made.append(kill_once(command, env, rng, target, startup_s))
        reached = max(reached, made[-1]["step"])
        startup_s = made[-1]["startup_s"]
        print(f"kill {len(made)}: {made[-1]}", flush=True)
        if not made[-1]["hit"]:
            break
    finish(command, env)
    return made


def finish(command, env) -> None:
    """Run the command to its end."""
    process = start(command, env)
    _, err = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}:\n{err}")


def logged(workdir) -> dict:
    """`{(kind, step): figures}` of metrics.jsonl, without times and memory."""
    lines = (
        (pathlib.Path(workdir) / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    found: dict[tuple, dict] = {}
    for line in map(json.loads, lines):
        key = line.pop("kind"), line.pop("step")
        if key[0] == "compile":
            continue
        if key in found:
            raise RuntimeError(f"{workdir}: {key} is logged twice")
        found[key] = {k: v for k, v in line.items() if not k.startswith("perf/")}
    return found


def environment(out) -> dict:
    """Environment variables: one CPU, programs kept, so that restarts are cheap."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": f"{out}/programs",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
        "MOEX_CACHE": f"{out}/data",
        "PYTHONPATH": path,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="folder of the two runs")
    args = parser.parse_args()
    out = pathlib.Path(args.out or tempfile.mkdtemp(prefix="kill9-"))
    env, began = environment(out), time.monotonic()
    commands = [
        train_command(HERE / "config.py", out / name, f"steps={args.steps}")
        for name in ("undisturbed", "killed")
    ]
    finish(commands[0], env)
    print("the undisturbed run is complete", flush=True)
    kills = kill_and_resume(
        commands[1],
        env,
        steps=args.steps,
        kills=args.kills,
        rng=random.Random(args.seed),
    )
    expected, actual = logged(out / "undisturbed"), logged(out / "killed")
    different = sorted(k for k in expected if actual.get(k) != expected[k])
    results = {
        "kills": sum(kill["hit"] for kill in kills),
        "steps": args.steps,
        "records_compared": len(expected),
        "records_different": len(different) + len(actual.keys() - expected.keys()),
        "final_loss_undisturbed": expected["eval", args.steps]["nll"],
        "final_loss_killed": actual["eval", args.steps]["nll"],
        "seconds": round(time.monotonic() - began),
        "python": platform.python_version(),
        "moments": kills,
    }
    (HERE / "results.json").write_text(
        json.dumps(results, indent=1) + "\n", encoding="utf-8"
    )
    print(json.dumps({k: v for k, v in results.items() if k != "moments"}, indent=1))
    sys.exit(results["records_different"] != 0)


if __name__ == "__main__":
    main()
