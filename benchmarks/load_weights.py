"""Memory of opening a run with its weights in fewer bytes: after it, and at its peak.

  python -m benchmarks.load_weights [--gigabytes=1] [--json=FILE]

A folder of Mixtral's kind is imported (import_hf.py); each form of weights opens the
run in a process of its own, on one CPU device. Sizes are those beyond what the process
has with JAX at work: the arrays themselves, what the process has afterwards, and the
most that it had.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from benchmarks.common import write_json
from benchmarks.import_hf import peak, write_folder

FORMS = ("float32", "bfloat16", "int8", "int4")


def resident() -> int:
    """The memory that this process has now, in bytes; files that it maps are not."""
    text = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+)", text)
    assert found is not None
    return 1024 * int(found[1])


def measure(run: str, weights: str) -> dict:
    """Open a run here."""
    import jax

    from moex import allocator, process
    from moex.model.accounting import num_bytes
    from moex.runs.open import load_run
    from moex.runs.weights import load_lowered

    allocator.keep_memory()
    process.quiet()
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64))))
    before, now, began = peak(reset=True), resident(), time.perf_counter()
    if weights == "float32":
        opened = load_run(run)
    else:
        opened = load_lowered(run, weights)
    jax.block_until_ready(opened.params)
    return {
        "weights": weights,
        "array_bytes": num_bytes(opened.params),
        "after_bytes": resident() - now,
        "peak_bytes": peak() - before,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="in bfloat16")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--measure", nargs=2, help="run, weights: measure it here")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    rows = []
    this = [sys.executable, "-m", "benchmarks.load_weights", "--measure"]
    with tempfile.TemporaryDirectory() as temporary:
        folder, run = (str(pathlib.Path(temporary) / n) for n in ("folder", "run"))
        write_folder(pathlib.Path(folder), args.gigabytes)
        command = [sys.executable, "-m", "moex.cli", "import-hf", folder, "--out", run]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for weights in FORMS:
            done = subprocess.run(
                [*this, run, weights],
                check=True,
                stdout=subprocess.PIPE,
                encoding="utf-8",
            )
            row = json.loads(done.stdout.splitlines()[-1])
            sizes = (row[f"{n}_bytes"] / 1e6 for n in ("array", "after", "peak"))
            text = "{:<9} arrays {:>6,.0f} MB, afterwards {:>6,.0f} MB, at most "
            text += "{:>6,.0f} MB; {:.1f} s"
            print(text.format(weights, *sizes, row["seconds"]), flush=True)
            rows.append(row)
    write_json(args.json, {"gigabytes": args.gigabytes, "rows": rows})


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
