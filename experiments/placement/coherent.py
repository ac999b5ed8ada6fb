"""Rows between devices when tokens stay with their experts, as it is and placed.

    python -m experiments.placement.coherent --out=/tmp/placement --seeds=0,1,2

The trained model of `run.py` decodes with the best of its two experts alone (k = 1), on
8 devices of a CPU: 64 sequences write 40 tokens each. Results go to coherent.json.
"""

import argparse
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from experiments.compression import testbed
from experiments.placement.run import runs_of, stated
from moex.analysis.record import trace_run
from moex.config.arguments import path
from moex.convert.to_placed import placed_arrays
from moex.json_files import dump_json, read_object
from moex.model import decode
from moex.model.spec import shardings
from moex.placement import affinity as counts
from moex.placement import coherent
from moex.placement.plan import make_plan
from moex.placement.solve import How, place
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from moex.runs.write import write_run
from moex.sharding import MeshConfig
from moex.train.job import make_job

DEVICES, SEQUENCES, PROMPT, NEW, TOKENS = 8, 64, 8, 40, 9216


def single(folder: pathlib.Path, seed: int) -> RunDir:
    """The run of a seed with the best expert of a token alone, as a run of its own."""
    run = RunDir(folder / f"single{seed}")
    if not run.is_run():
        opened = load_run(runs_of(folder, seed)[1], warn=lambda line: None)
        cfg = opened.cfg
        cfg.model.layers[0].pattern[0].router.k = 1
        job = make_job(cfg, log=lambda line: None)
        arrays = {"params": opened.params, "state": opened.state}
        write_run(run, job.cfg, job, job.tx, job.data, arrays)
    return run


def one_seed(folder: pathlib.Path, seed: int) -> dict:
    """The figures of a seed."""
    mesh_cfg = MeshConfig(data=1, expert=DEVICES)
    file, run = folder / f"single{seed}.parquet", single(folder, seed)
    if not file.exists():
        trace_run(run, run.config(), file, tokens=TOKENS)
    own, other = counts.read(file, every=2)
    placed = place(own, How(devices=DEVICES))
    plan = make_plan(placed, own, {})
    opened = load_run(run, mesh_cfg, warn=lambda line: None)
    given = opened.tokenizer
    texts = [
        text[:PROMPT]
        for name in testbed.DOMAINS
        for text in (folder / f"texts{seed}" / f"{name}.txt")
        .read_text(encoding="utf-8")
        .split("\n")[-SEQUENCES // 4 :]
    ]
    prompts = [[given.doc_id, *given.encode(text)] for text in texts]
    model, spec = opened.cfg.model, opened.spec
    arrays = {
        "as it is": (opened.params, opened.state),
        "placed": tuple(
            jax.device_put(placed_arrays(tree, model, plan), where)
            for tree, where in zip(
                (opened.params, opened.state), shardings(spec, opened.mesh), strict=True
            )
        ),
    }
    with jax.set_mesh(opened.mesh):
        plain = decode.generate(
            spec, model, *arrays["as it is"], prompts, max_new_tokens=NEW, temperature=0
        )
    found: dict = {"crossings": {}}
    for name, trees in arrays.items():
        out = coherent.generate(
            spec, model, *trees, prompts, mesh=opened.mesh, max_new_tokens=NEW
        )
        same = [a == b for a, b in zip(out.tokens, plain, strict=True)]
        found[name] = {
            "moved": [n / out.rows for n in out.moved],
            "ordinary": [2 * n / out.rows for n in out.ordinary],
            "gathered": out.gathered,
            "reruns": out.reruns,
            "steps": out.steps,
            "same_texts": float(np.mean(same)),
        }
    found["crossings"] = {
        "placed": placed.crossings(own).all,
        "held_out": placed.crossings(other).all,
    }
    found["width"] = model.dim
    return found


def table(seeds: list[dict]) -> str:
    """The rows of a token that changed devices, as Markdown."""
    layers = range(len(seeds[0]["placed"]["moved"]))
    names = ["layer 0", *map(str, layers[1:]), "all"]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for title, name, kind in (
        ("ordinary, there and back", "as it is", "ordinary"),
        ("ordinary, placed", "placed", "ordinary"),
        ("coherent, as it is", "as it is", "moved"),
        ("coherent, placed", "placed", "moved"),
    ):
        own = [s[name][kind] for s in seeds]
        cells = [stated(v, 2) for v in (*zip(*own, strict=True), [*map(sum, own)])]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    results = pathlib.Path(__file__).with_name("coherent.json")
    found = read_object(results) if results.exists() else {}
    for seed in args.seeds.split(","):
        found[seed] = one_seed(pathlib.Path(args.out), int(seed))
        print(seed, found[seed], flush=True)
        text = dump_json(dict(sorted(found.items())), indent=1)
        results.write_text(text + "\n", encoding="utf-8")
    print(table(list(found.values())))


if __name__ == "__main__":
    main()
