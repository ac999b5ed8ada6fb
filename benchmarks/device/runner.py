"""Runs steps in processes with time limits, and writes what they leave.

`FOLDER/STEP.json` is written anew after every process: runs that are done, with their
figures, those that failed or were cut, with the reason, and the end of the output. It
is what the next start goes by.
"""

import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

from benchmarks.commit import commit
from benchmarks.device import child
from benchmarks.device.steps import STEPS, Process, Step, processes

TAIL = 6000  # characters of a process's output that are kept
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy"),
    *("torch", "triton", "transformers", "tokamax"),
)
SPARE_S = 5.0  # left before the deadline to write and to pack
BAD = ("failed", "timed out", "cut")


class Stopped(Exception):
    """A signal asks this script to end."""


class OtherKind(ValueError):
    """The folder holds a dry run and this is none, or the other way round."""


def device() -> dict:
    """The GPU and the versions, without JAX, which would take the GPU's memory."""
    query = "--query-gpu=name,driver_version,memory.total"
    try:
        said = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=30,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "device": said or "cpu",
        "cores": os.cpu_count(),
        "commit": commit(),
        "versions": {"python": python, **versions},
    }


def write_json(file: pathlib.Path, data) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def with_parent() -> None:
    """Asks Linux to end this process when the one that started it ends in any way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def isolated(
    out: pathlib.Path, step: Step, process: Process, runs: list[str], *,
    limit: float, dry_run: bool,
) -> tuple[str, str]:  # fmt: skip
    """Runs a process of a step; whatever it has started ends with it.

    Returns:
      `(outcome, end of the output)`; outcome is "ended", "timed out" or "failed".
    """
    command = [sys.executable, "-u", "-m", "benchmarks.device.child", f"--out={out}"]
    command += [f"--step={step.name}", f"--process={process.name}"]
    command += ["--dry-run"] * dry_run + runs
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(out / "cache"),
        "MOEX_CACHE": str(out / "cache" / "data"),
        **os.environ,
        **process.env,
    }
    log = out / "logs" / f"{step.name}.{process.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as f:
        began = subprocess.Popen(
            command, stdout=f, stderr=subprocess.STDOUT, env=environment,
            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=with_parent,
        )  # fmt: skip
        try:
            code = began.wait(timeout=limit)
            outcome = "ended" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "timed out"
        finally:  # also after a Stopped
            with contextlib.suppress(ProcessLookupError):
                os.killpg(began.pid, signal.SIGKILL)
            began.wait()
    text = log.read_bytes()[-4 * TAIL :].decode("utf-8", "replace")
    return outcome, text[-TAIL:]


def here(out, step, process, runs, *, limit, dry_run) -> tuple[str, str]:
    """Does the same as `isolated` in this process, without a limit: for a debugger."""
    del limit, dry_run
    for run in process.runs:
        if run.name in runs:
            child.execute(run, out, step.name)
    return "ended", ""


class Results:
    """The results of one step in a folder."""

    def __init__(self, out: pathlib.Path, step: Step, about: dict, dry_run: bool):
        self.out, self.step, self.about, self.dry_run = out, step, about, dry_run
        self.file = out / f"{step.name}.json"
        there = self.file.exists()
        data = json.loads(self.file.read_text(encoding="utf-8")) if there else {}
        if there and data["dry_run"] != dry_run:
            kinds = ("figures", "a dry run") if dry_run else ("a dry run", "figures")
            text = "--out={}: has {} in {}, and is to have {}; take another folder."
            raise OtherKind(text.format(out, kinds[0], self.file.name, kinds[1]))
        self.runs: dict = data.get("runs", {})
        self.output: dict = data.get("output", {})

    def collect(self, outcome: str, runs: list[str] = ()) -> None:
        """Takes in the files that runs left in `partial`.

        Args:
          outcome: the outcome of a run that has no end.
          runs: the runs asked for; one that never began is "skipped" where the time
            was over, and else has `outcome`.
        """
        events = child.events_file(self.out, self.step.name)
        text = events.read_text(encoding="utf-8") if events.exists() else ""
        last: dict = {}
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that was cut
                event = json.loads(line)
                last[event["run"]] = event
        files = []
        for name, event in last.items():
            file = child.figures_file(self.out, self.step.name, name)
            record = {"status": event["event"], "seconds": event.get("seconds")}
            if event["event"] == "started":
                record["status"] = outcome
            if event.get("error"):
                record["error"] = event["error"]
            if file.exists():
                with contextlib.suppress(json.JSONDecodeError):  # a file that was cut
                    record["figures"] = json.loads(file.read_text(encoding="utf-8"))
                files.append(file)
            self.runs[name] = record | {"when": now()} | self.about
        for name in runs:
            if name not in last and outcome == "timed out":
                reason = "no time was left for it in its process"
                self.runs.setdefault(name, {"status": "skipped", "reason": reason})
            elif name not in last:
                self.runs[name] = {"status": outcome, "when": now()} | self.about
        if last or runs:
            self.write()
        for file in (*files, events):  # after `write`: a kill loses nothing
            file.unlink(missing_ok=True)

    def status(self) -> str:
        """One word for all runs."""
        parts = processes(self.step, self.dry_run)
        wanted = [run.name for process in parts for run in process.runs]
        found = [self.runs.get(name, {}).get("status", "skipped") for name in wanted]
        return next((word for word in (*BAD, "skipped") if word in found), "done")

    def write(self) -> None:
        seconds = [run.get("seconds") or 0 for run in self.runs.values()]
        data = {
            "step": self.step.name,
            "title": self.step.title,
            "dry_run": self.dry_run,
            "status": self.status(),
            "seconds": round(sum(seconds), 1),
            **self.about,
            "runs": self.runs,
            "output": self.output,
        }
        write_json(self.file, data)

    def left(self, process: Process, retry: bool) -> list[str]:
        """The runs of a process that were never tried; to retry, those that failed."""
        states = {r.name: self.runs.get(r.name, {}).get("status") for r in process.runs}
        if retry:
            return [name for name, status in states.items() if status in BAD]
        return [name for name, status in states.items() if status in (None, "skipped")]


def now() -> str:
    """The time, for people."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def pack(out: pathlib.Path, archive: pathlib.Path | None) -> None:
    """Writes all JSON files of a folder to one archive."""
    if archive is None:
        return
    temporary = archive.with_name(archive.name + ".tmp")
    with tarfile.open(temporary, "w:gz") as tar:
        for file in sorted(out.glob("*.json")):
            tar.add(file, file.name)
    temporary.replace(archive)


def run_all(
    out: pathlib.Path, steps: list[str], *, seconds: float, dry_run: bool = False,
    launch=isolated, archive: pathlib.Path | None = None,
) -> dict[str, str]:  # fmt: skip
    """Runs the steps that the folder does not have yet, then those that had failed.

    Args:
      out: the folder of results.
      steps: names.
      seconds: time in which all must end.
      dry_run: whether the tiny runs are meant; steps without one are passed over.
      launch: `isolated` or `here`.
      archive: written after every process; see `pack`.

    Returns:
      `{step: status}`.
    """
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    about = device()
    wanted = [s for s in STEPS if s.name in steps and processes(s, dry_run)]
    results = {step.name: Results(out, step, about, dry_run) for step in wanted}
    for found in results.values():
        found.collect("cut")
    # Runs that failed before this start come last; those that fail now are not retried.
    plan = [
        (step, process, runs)
        for retry in (False, True)
        for step in wanted
        for process in processes(step, dry_run)
        if (runs := results[step.name].left(process, retry))
    ]
    for step, process, runs in plan:
        found = results[step.name]
        left = deadline - time.monotonic() - SPARE_S
        if left < process.least:
            for name in runs:
                reason = f"{max(left, 0):.0f} s left, {process.least} s needed"
                found.runs.setdefault(name, {"status": "skipped", "reason": reason})
            print(f"{step.name}: {process.name}: skipped", flush=True)
        else:
            print(f"{step.name}: {process.name}: {', '.join(runs)}", flush=True)
            outcome, text = "cut", ""
            try:
                outcome, text = launch(
                    out, step, process, runs, limit=min(process.limit, left),
                    dry_run=dry_run,
                )  # fmt: skip
            finally:
                found.output[process.name] = text
                found.collect("failed" if outcome == "ended" else outcome, runs)
            if outcome != "ended":
                print(f"{step.name}: {process.name}: {outcome}", flush=True)
        found.write()
        pack(out, archive)
    return {name: found.status() for name, found in results.items()}
