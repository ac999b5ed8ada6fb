"""Which kernels are right on this GPU, and the smallest layer on which one is not.

  python -m benchmarks.device.kernels [--seconds=120] [--dry-run] --json=FILE

Runs the tests of `tests/test_gpu.py`. Of the first kernel that gives other results than
the definition, the layer is made smaller as long as it still fails in the same way. A
process of its own tries each size: a kernel that reads where it may not takes the GPU
from its process, and the next size gets a new one. The file is written as it goes.

T tokens · K slots · D model width · F expert width · E experts
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time

from kernels_pallas.grouped_matmul.shapes import AWKWARD, REAL, LayerShape

SHAPES = {"middle": LayerShape(300, 2, 64, 192, 8), "H10": REAL["H10"]} | {
    name: AWKWARD[name] for name in ("prime", "one_token", "more_experts_than_slots")
}
TESTS = "tests/test_gpu.py"
LEAST = LayerShape(1, 1, 1, 1, 1)
MARK = "MOEX_GPU_TEST_EVENTS"  # names the file of `pytest_runtest_logreport`
DRY = "MOEX_GPU_TEST_INTERPRETED"  # kernels by Pallas' interpreter, without a GPU


def pytest_runtest_logstart(nodeid):
    """Notes that a test begins: if it ends the process, nothing reports its end."""
    _note({"test": nodeid, "outcome": "started"})


def pytest_runtest_logreport(report):
    """Notes how a test ended."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr or "")
        _note({"test": report.nodeid, "outcome": report.outcome, "error": message})


def _note(event: dict) -> None:
    with open(os.environ[MARK], "a", encoding="utf-8") as f:
        f.write(json.dumps(event) + "\n")


def run_tests(events: pathlib.Path, seconds: float, dry_run: bool) -> dict:
    """`{test: {"outcome", "error"}}` of the tests of this process's platform."""
    command = [sys.executable, "-m", "pytest", TESTS, "-q", "-m", "gpu", "-ra"]
    command += ["-p", "benchmarks.device.kernels", "-p", "no:cacheprovider"]
    environment = {**os.environ, MARK: str(events), "MOEX_TEST_PLATFORM": "gpu"}
    if dry_run:
        command += ["-k", "definition and triton-float32-one_token"]
        environment |= {DRY: "1", "MOEX_TEST_PLATFORM": "cpu"}
    events.unlink(missing_ok=True)
    try:
        subprocess.run(command, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"the tests took more than {seconds:.0f} s", flush=True)
    outcomes: dict = {}
    if events.exists():
        for line in events.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            outcomes[event.pop("test")] = event
        events.unlink()
    return outcomes


def case_of(test: str) -> tuple[str, str, LayerShape] | None:
    """Implementation, dtype and shape in the name of a test of experts."""
    found = re.search(r"definition.*\[(\w+)-(float32|bfloat16)-(\w+)\]", test)
    if found is None or found[3] not in SHAPES:
        return None
    return found[1], found[2], SHAPES[found[3]]


def smaller(shape: LayerShape):
    """Layers with one size halved, or less by one if it is small."""
    for i, size in enumerate(shape):
        for less in dict.fromkeys((size // 2, size - 1)):
            if less >= LEAST[i] and (less == size // 2 or size < 16):
                yield shape._replace(**{shape._fields[i]: less})


def shrink(shape: LayerShape, fails, note=lambda shape: None) -> LayerShape:
    """The smallest layer on the way down that still fails.

    Args:
      shape: one that fails.
      fails: whether another one fails in the same way.
      note: called with every smaller layer that fails.
    """
    while True:
        for candidate in smaller(shape):
            if candidate.k <= candidate.num_experts and fails(candidate):
                shape = candidate
                note(shape)
                break
        else:
            return shape


def kind_of(error: str | None) -> str | None:
    """The beginning of an error: the same fault in another size begins alike."""
    return None if error is None else error.partition(":")[0]


class Worker:
    """A process that takes one shape after another and answers with its error."""

    def __init__(self, implementation: str, dtype: str):
        self.command = [sys.executable, "-m", "benchmarks.device.kernels", "--worker"]
        self.command += [implementation, dtype]
        self.process = None

    def error_of(self, shape: LayerShape) -> str | None:
        """The error, or None; a new process begins where one was lost."""
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, encoding="utf-8"
            )
        try:
            self.process.stdin.write(",".join(map(str, shape)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        while line := self.process.stdout.readline():
            if line.startswith("answer "):
                answer = json.loads(line.removeprefix("answer "))
                if answer["lost"]:
                    self.close()
                return answer["error"]
        code = self.process.wait()
        self.process = None
        return f"process died: code {code}"

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


def work(implementation: str, dtype: str) -> None:
    """Run the process of a `Worker`: read shapes, write answers."""
    import jax

    from benchmarks.device.definition import error_of

    for line in sys.stdin:
        shape, lost = LayerShape(*map(int, line.split(","))), False
        try:
            error = error_of(implementation, dtype, shape)
        except jax.errors.JaxRuntimeError as e:  # the GPU may be lost
            error, lost = f"{type(e).__name__}: {e}", True
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        answer = {"error": error and error[:500], "lost": lost}
        print("answer " + json.dumps(answer), flush=True)
        if lost:
            return


def reduce(case, deadline: float, note) -> None:
    """Makes the layer of a failing case smaller, and notes each that still fails."""
    implementation, dtype, shape = case
    worker = Worker(implementation, dtype)
    try:
        first = worker.error_of(shape)
        if first is None:
            note({"case": [implementation, dtype, shape], "error": None})
            return

        def fails(candidate):
            if time.monotonic() > deadline:
                return False
            error = worker.error_of(candidate)
            return kind_of(error) == kind_of(first)

        def found(smallest):
            note(
                {
                    "implementation": implementation,
                    "dtype": dtype,
                    "shape_TKDFE": smallest,
                    "error": first,
                }
            )

        found(shape)
        shrink(shape, fails, found)
    finally:
        worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("IMPLEMENTATION", "DTYPE"))
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return
    deadline = time.monotonic() + args.seconds
    events = args.json.with_suffix(".events")
    tests = run_tests(events, 0.7 * args.seconds, args.dry_run)
    if not tests:
        raise SystemExit("error: no test ran.")
    figures: dict = {"tests": tests}

    def note(reduced=None):
        figures["reduced"] = reduced
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    note()
    failing = [t for t, e in tests.items() if e["outcome"] in ("failed", "started")]
    cases = [case for case in map(case_of, failing) if case is not None]
    if cases:
        reduce(cases[0], deadline, note)


if __name__ == "__main__":
    main()
