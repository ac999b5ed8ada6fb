"""Does a job of four processes survive the loss of one, and go on with fewer?

  python experiments/elastic/run.py [--steps N] [--out DIR]

Trains experiments/crash/config.py on four devices: undisturbed by four processes; then
with `kill -9` of one of the four, and from there on with four, two and one process,
also on other meshes; then with one process stopped (silent, as a host without power).
Writes results.json next to this file; exit code 0 if all is as the README says.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax

HERE = pathlib.Path(__file__).absolute().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from experiments.crash.kill9 import environment, logged, step_of  # noqa: E402

VICTIM = 2
HEARTBEAT_S = 10
# (processes, devices of each): three times the same mesh of four devices, then one.
RESTARTS = ((4, 1), (2, 2), (1, 4), (1, 1))


def start(workdir, env, processes: int, devices: int, *train) -> subprocess.Popen:
    """Start the local launcher with `moex train`; all output comes through one pipe."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launch.local", f"--processes={processes}"),
            *(f"--devices-per-process={devices}", "--grace=60", "--"),
            *(f"--config={HERE.parent / 'crash' / 'config.py'}",),
            *(f"--workdir={workdir}", *train),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        cwd=ROOT,
        encoding="utf-8",
        errors="replace",
    )


def finish(workdir, env, processes, devices, *train) -> list[str]:
    """Run to the end; returns the lines that were shown."""
    process = start(workdir, env, processes, devices, *train)
    lines = process.communicate()[0].splitlines()
    if process.returncode != 0:
        raise RuntimeError("\n".join(lines))
    return lines


def child(launcher: subprocess.Popen, index: int) -> int:
    """The process id of one process of a launcher."""
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = (
                (entry / "stat")
                .read_text(encoding="utf-8")
                .rsplit(")", 1)[1]
                .split()[1]
            )
            words = (
                (entry / "cmdline")
                .read_text(encoding="utf-8", errors="replace")
                .split("\0")
            )
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == launcher.pid and f"--process-id={index}" in words:
            return int(entry.name)
    raise RuntimeError(f"process {index} is not there")


def disturb(workdir, env, at: int, number: int, *train) -> dict:
    """Run four processes and signal one from step `at` on; returns the outcome."""
    launcher = start(workdir, env, 4, 1, *train)
    lines, sent, step = [], None, 0
    for line in launcher.stdout:
        lines.append(line.strip())
        step = step_of(line) or step
        if sent is None and step >= at:
            os.kill(child(launcher, VICTIM), number)
            sent, killed_at = time.monotonic(), step
        if sent is not None and line.startswith("launch: the others after"):
            break
        if sent is not None and line.startswith("launch: process"):
            down = time.monotonic() - sent
    launcher.communicate()
    if sent is None or launcher.returncode == 0:
        raise RuntimeError("\n".join(lines))
    said = [line for line in lines if line.startswith(("moex: error", "launch:"))]
    return {
        "signal": signal.Signals(number).name,
        "after_step": killed_at,
        "seconds_until_first_end": round(down, 2),
        "seconds_until_all_ended": round(time.monotonic() - sent, 2),
        "said": said,
    }


def resumed(out, env, processes, devices, steps, expected) -> dict:
    """Go on with a copy of the killed run; returns how its end compares."""
    workdir = out / f"restart_{processes}x{devices}"
    shutil.copytree(out / "killed", workdir)
    lines = finish(workdir, env, processes, devices, f"--config.steps={steps}")
    at = [re.search(r"resuming .* after step (\d+)", line) for line in lines]
    found = logged(workdir)
    nll = found["eval", steps]["nll"]
    best = expected["eval", steps]["nll"]
    same = sum(found.get(key) == figures for key, figures in expected.items())
    return {
        "processes": processes,
        "devices_per_process": devices,
        "resumed_after_step": int(next(m[1] for m in at if m)),
        "records_equal": f"{same} of {len(expected)}",
        "final_loss": nll,
        "relative_difference": abs(nll - best) / best,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default=None, help="folder of the runs")
    args = parser.parse_args()
    out = pathlib.Path(args.out or tempfile.mkdtemp(prefix="elastic-"))
    env, began, steps = (
        environment(out),
        time.monotonic(),
        f"--config.steps={args.steps}",
    )
    finish(out / "undisturbed", env, 4, 1, steps)
    expected = logged(out / "undisturbed")
    print("the undisturbed run is complete", flush=True)
    kill = disturb(out / "killed", env, args.steps // 2, signal.SIGKILL, steps)
    print(json.dumps(kill, indent=1), flush=True)
    restarts = []
    for processes, devices in RESTARTS:
        restarts.append(resumed(out, env, processes, devices, args.steps, expected))
        print(json.dumps(restarts[-1]), flush=True)
    heartbeat = f"--heartbeat-timeout={HEARTBEAT_S}"
    silent = disturb(
        out / "silent", env, args.steps // 2, signal.SIGSTOP, steps, heartbeat
    )
    results = {
        "steps": args.steps,
        "final_loss_undisturbed": expected["eval", args.steps]["nll"],
        "kill": kill,
        "restarts": restarts,
        "silent": silent | {"heartbeat_timeout": HEARTBEAT_S},
        "seconds": round(time.monotonic() - began),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    (HERE / "results.json").write_text(
        json.dumps(results, indent=1) + "\n", encoding="utf-8"
    )
    exact = restarts[0]["final_loss"] == results["final_loss_undisturbed"]
    close = all(r["relative_difference"] < 1e-3 for r in restarts)
    sys.exit(not (exact and close))


if __name__ == "__main__":
    main()
