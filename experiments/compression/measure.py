"""Sizes, memory and speed of a model before and after its experts are halved.

  python -m experiments.compression.measure [--runs=DIR]

Writes a run with random weights (width 256, 4 layers of 16 experts of width 512, 2 a
token), merges and prunes it, and makes a store. Each row is measured in a process of
its own, which reads the run and writes 64 tokens three times. Writes sizes.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import jax

from experiments.compression.testbed import config, write_texts
from moex.convert.apply import convert_run, store_run
from moex.convert.kinds.merged import Merged
from moex.convert.kinds.pruned import Pruned
from moex.convert.kinds.subset import Subset
from moex.json_files import dump_json
from moex.moe.experts.glu import Glu
from moex.nn.attention import Attention
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from moex.runs.rows import bytes_read
from moex.runs.write import write_run
from moex.serve.experts import load_experts
from moex.tasks.lm import continue_texts
from moex.train.job import make_job

HERE = pathlib.Path(__file__).parent
NEW = 64  # tokens that are written
PROMPT = "Aab"


def made(folder: pathlib.Path) -> pathlib.Path:
    """The run with random weights, and what it is converted to."""
    full = folder / "full"
    if RunDir(folder / "merged").is_run():
        return full
    cfg = config(write_texts((folder / "texts").absolute(), 0), 0)
    moe = cfg.model.layers[0].pattern[0]
    moe.experts = Glu(hidden=512)
    cfg.model.dim, cfg.model.attention = 256, Attention(heads=4)
    job = make_job(cfg, log=lambda line: None)
    write_run(RunDir(full), job.cfg, job, job.tx, job.data, job.init_state())
    store = Subset(keep=(8,), calibration=48)
    store_run(full, [store]).save(folder / "store.json")
    options = {"sequences": 0, "say": lambda line: None}
    convert_run(full, folder / "pruned", [Pruned(keep=(8,), score="random")], **options)
    merged = Merged(groups=8, budget="uniform", calibration=48)
    convert_run(full, folder / "merged", [merged], **options)
    return full


def peak_bytes() -> int:
    """The most memory that this process had (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def one(folder: pathlib.Path, row: str) -> dict:
    """Measure a row in this process."""
    before = bytes_read()
    if row in ("full", "pruned", "merged"):
        run = load_run(folder / row)
        home = RunDir(folder / row)
    else:
        home = RunDir(folder / "full")
        ids = home.tokenizer().prompt(PROMPT)
        run = load_experts(home, f"{row}:{folder / 'store.json'}", ids, say=print).run
    read = bytes_read() - before
    loaded = peak_bytes()
    arrays = {"params": run.params, "state": run.state}
    seconds = []
    with jax.set_mesh(run.mesh):
        for _ in range(3):
            start = time.perf_counter()
            continue_texts(
                run,
                arrays,
                run.tokenizer,
                [PROMPT],
                max_new_tokens=NEW,
                temperature=0.0,
                top_k=0,
                top_p=1.0,
                seed=0,
            )
            seconds.append(time.perf_counter() - start)
    files = (home.path / "checkpoints" / str(run.step) / "params").rglob("*")
    return {
        "row": row,
        "parameters": sum(a.size for a in jax.tree.leaves(run.params)),
        "array_bytes": sum(a.nbytes for a in jax.tree.leaves(arrays)),
        "file_bytes": sum(f.stat().st_size for f in files if f.is_file()),
        "bytes_read": read,
        "peak_bytes_read": loaded,
        "peak_bytes": peak_bytes(),
        "tokens_per_second": NEW / min(seconds[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=pathlib.Path, default="runs/compression/large")
    parser.add_argument("--row", help="measure this one here, and print it")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(one(args.runs, args.row)))
        return
    made(args.runs)
    command = [sys.executable, "-m", "experiments.compression.measure"]
    rows = []
    for row in ("full", "pruned", "merged", "A", "auto", "all"):
        own = [*command, f"--runs={args.runs}", f"--row={row}"]
        done = subprocess.run(
            own, check=True, capture_output=True, text=True, encoding="utf-8"
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    text = dump_json({"device": jax.devices()[0].device_kind, "rows": rows}, indent=1)
    (HERE / "sizes.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
