"""A training step on meshes of eight forced CPU devices over the same step on one.

  python -m benchmarks.sharded_step [--config=FILE] [--meshes=PART] [--repeats=5]
      [--json=FILE]

All devices share this machine's cores, so the best that a mesh can reach is about 1:
the rest is the price of splitting and of communication. All meshes and the one
device take turns, so that every row is over the same baseline, under the same load; all
programs and their arrays are held at once. The bytes that each kind
of collective brings to one device per step are read off the compiled program (layers
unrolled, so that every one is in its text): they are exact and the same on every
machine, and show a regression in communication that a time on shared cores would not.
"""

import argparse
import collections
import os
import pathlib
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.common import measure, summary, write_json  # noqa: E402
from moex.cli import split_config_args  # noqa: E402
from moex.config.flags import load_config  # noqa: E402
from moex.model.spec import model_spec  # noqa: E402
from moex.sharding import MeshConfig, shard_batch  # noqa: E402
from moex.train.job import Training  # noqa: E402

MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "expert 8, gather": MeshConfig(data=1, expert=8, exchange="gather"),
    "expert 8, all_to_all": MeshConfig(data=1, expert=8, exchange="all_to_all"),
    "expert 8, all_to_all, room for 1.5 times the mean": MeshConfig(
        data=1, expert=8, exchange="all_to_all", exchange_buffer=1.5
    ),
    "data 2, expert 2, tensor 2": MeshConfig(data=2, expert=2, tensor=2),
    "expert 4, tensor 2": MeshConfig(data=1, expert=4, tensor=2),
    "fsdp 2, expert 2, seq 2": MeshConfig(data=1, fsdp=2, expert=2, seq=2),
}
ONE = "one device"
COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\(.*?(?:replica_groups|source_target_pairs)=(\S+)"
)
ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}


def compiled_step(cfg, mesh_cfg, devices):
    """(function without arguments that does one step, text of its program)."""
    cfg.mesh = mesh_cfg
    mesh = mesh_cfg.make(devices)
    job = Training(cfg=cfg, mesh=mesh, spec=model_spec(cfg.model, mesh))
    held = {"state": job.init_state()}
    rest = np.int32(0), jax.random.key(0), shard_batch(random_batch(cfg), mesh)
    with jax.set_mesh(mesh):
        program = job.train_step().lower(held["state"], *rest).compile()

    def run():
        held["state"], metrics = program(held["state"], *rest)
        return metrics["loss"]

    return run, program.as_text()


def random_batch(cfg) -> dict:
    """Random tokens, one document a row."""
    rng = np.random.default_rng(0)
    shape = (cfg.batch_size, cfg.seq_len)
    tokens = rng.integers(0, cfg.model.vocab, shape).astype(np.int32)
    position = np.broadcast_to(np.arange(cfg.seq_len, dtype=np.int32), shape)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment": np.ones(shape, np.int32),
        "position": position,
        "loss_mask": np.ones(shape, np.float32),
        "num_bytes": np.ones(shape, np.int32),
        "domain": np.zeros(cfg.batch_size, np.int32),
        "example_id": np.arange(cfg.batch_size, dtype=np.int32),
    }


def collective_bytes(text: str) -> dict[str, int]:
    """{kind: bytes of the results on one device}; groups of one device send nothing."""
    sums: dict[str, int] = collections.Counter()
    for shapes, kind, groups in COLLECTIVE.findall(text):
        if re.match(r"\{\{\d+\}|\[\d+,1\]", groups):
            continue
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            numbers = int(np.prod([int(n) for n in dims.split(",") if n]))
            sums[kind] += numbers * ITEM_BYTES[dtype]
    return dict(sums)


def line(name: str, row: dict) -> str:
    """The figures of one mesh for people."""
    sent = ", ".join(f"{k} {v / 1e6:.2f}" for k, v in row["collective_bytes"].items())
    return (
        f"{name:<52}{row['median_s'] * 1e3:>8.0f} ms{row['ratio']:>7.2f}"
        f"{row['compile_s']:>8.0f} s   {sent or 'nothing'}"
    )


def rows_of(seconds: dict, compiled: dict[str, dict]) -> dict[str, dict]:
    """The figures of every mesh, each divided by the one baseline."""
    times = summary(seconds)
    one = times[ONE]["median_s"]
    return {
        name: times[name] | {"ratio": times[name]["median_s"] / one} | found
        for name, found in compiled.items()
    }


def main() -> None:
    rest, config_args = split_config_args(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--meshes", default="", help="only those with this in the name")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(rest)
    jax.config.update("jax_num_cpu_devices", 8)
    cfg = load_config(config_args or ["--config=configs/quickstart.py"])
    cfg.model.vocab = cfg.model.vocab or cfg.data.tokenizer.vocab
    cfg.scan_layers = False
    meshes = {name: mesh for name, mesh in MESHES.items() if args.meshes in name}
    jobs = {ONE: compiled_step(cfg, MeshConfig(data=1), jax.devices()[:1])[0]}
    compiled = {}
    for name, mesh_cfg in meshes.items():
        began = time.perf_counter()
        jobs[name], text = compiled_step(cfg, mesh_cfg, jax.devices())
        compiled[name] = {
            "compile_s": time.perf_counter() - began,
            "collective_bytes": collective_bytes(text),
        }
        print(f"compiled {name}", file=sys.stderr, flush=True)
    seconds = measure(jobs, args.repeats)
    rows, one = rows_of(seconds, compiled), summary(seconds)[ONE]
    print(f"{ONE}: {one['median_s'] * 1e3:.0f} ms")
    head = ("mesh", "step", "ratio", "compile")
    print("{:<52}{:>11}{:>7}{:>10}   MB that reach one device".format(*head))
    for name, row in rows.items():
        print(line(name, row))
    write_json(args.json, {"one_device": one, "meshes": rows})


if __name__ == "__main__":
    main()
