"""Memory and time of `moex import-hf` and `moex export-hf`, whole, on CPU devices.

  python -m benchmarks.import_hf [--gigabytes=1] [--json=FILE]

A Mixtral-type folder of random bfloat16 weights is written, shard by shard, imported
onto one device and onto eight, and exported again, each in a process of its own. On a
CPU the arrays are host memory, so what counts is the peak beyond the parameters.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from benchmarks.common import write_json

D, F, V, E = 1024, 3584, 32_000, 8
DEVICES = (1, 8)


def write_folder(folder: pathlib.Path, gigabytes: float) -> None:
    """Write a folder of about `gigabytes` GB, in shards of 256 MiB."""
    from moex.data.tokenizer import DOC_TOKEN, train_bpe
    from moex.interop.families import FAMILIES, read_model
    from moex.interop.names import pieces
    from moex.interop.writing import Tensor, write

    layer = 2 * (3 * D * F * E + 4 * D * D)
    config = {
        "model_type": "mixtral",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": max(1, round(gigabytes * 1e9 / layer)),
        "num_attention_heads": 16,
        "num_local_experts": E,
        "num_experts_per_tok": 2,
        "vocab_size": V,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    }
    rng = np.random.default_rng(0)

    def tensor(piece):
        def read():
            values = rng.standard_normal(piece.shape, np.float32)
            return values.astype(ml_dtypes.bfloat16)

        return Tensor(piece.name, piece.shape, np.dtype(ml_dtypes.bfloat16), read)

    model = read_model("config.json", config)
    tensors = [tensor(p) for p in pieces(model, FAMILIES["mixtral"].names)]
    files = {
        "config.json": json.dumps(config),
        "tokenizer.json": train_bpe(["the cat sees the dog. " * 20], 272).to_str(),
        "tokenizer_config.json": json.dumps({"eos_token": DOC_TOKEN}),
    }
    write(folder, tensors, max_shard_bytes=1 << 28, files=files)


def peak(reset: bool = False) -> int:
    """The most memory of this process since the last reset, in bytes (Linux only)."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(action: str, source: pathlib.Path, out: pathlib.Path) -> dict:
    """Run one import or export here: bytes of the parameters and of the peak beyond."""
    import jax

    from moex import process
    from moex.interop.export import export_hf
    from moex.interop.hf import import_hf
    from moex.model import spec as states
    from moex.runs.directory import RunDir

    process.quiet()
    count = jax.device_count()
    before, began = peak(reset=True), time.time()
    if action == "import":
        import_hf(source, out, [f"--config.mesh.fsdp={count}"], say=lambda line: None)
    else:
        export_hf(source, out, say=lambda line: None)
    seconds, most = time.time() - began, peak()
    run = out if action == "import" else source
    cfg = RunDir(run).config()
    spec = states.model_spec(cfg.model)
    mesh = cfg.mesh.make()
    sizes, parts = [], []
    for leaf, at in zip(
        jax.tree.leaves(spec.params),
        jax.tree.leaves(states.shardings(spec, mesh)[0]),
        strict=True,
    ):
        sizes.append(leaf.size * leaf.dtype.itemsize)
        parts.append(int(np.prod(at.shard_shape(leaf.shape))) * leaf.dtype.itemsize)
    return {
        "action": action,
        "devices": count,
        "array_bytes": sum(sizes),
        "largest_array_bytes": max(sizes),
        "largest_device_part_bytes": max(parts),
        "peak_beyond_arrays_bytes": most - before - sum(sizes),
        "run_bytes": sum(f.stat().st_size for f in run.rglob("*") if f.is_file()),
        "seconds": seconds,
    }


def start(*args, devices: int) -> dict:
    """Run `measure` in a process with this many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.import_hf", "--measure", *map(str, args)],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"XLA_FLAGS": flags},
        encoding="utf-8",
        errors="replace",
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--measure", nargs=3, help="action, from, to: measure it here")
    args = parser.parse_args()
    if args.measure:
        action, source, out = args.measure
        print(json.dumps(measure(action, pathlib.Path(source), pathlib.Path(out))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        write_folder(root / "folder", args.gigabytes)
        for n in DEVICES:
            run = root / f"run{n}"
            rows.append(start("import", root / "folder", run, devices=n))
            rows.append(start("export", run, root / f"back{n}", devices=n))
            for file in (root / "folder").glob("*.safetensors"):
                assert file.read_bytes() == (root / f"back{n}" / file.name).read_bytes()
    columns = ("array", "largest_device_part", "peak_beyond_arrays", "run")
    print(f"{'':<8} {'devices':>8}" + "".join(f"{c:>21}" for c in columns) + " seconds")
    for row in rows:
        sizes = (f"{row[f'{c}_bytes'] / 1e6:>18.0f} MB" for c in columns)
        line = f"{row['action']:<8} {row['devices']:>8}{''.join(sizes)}"
        print(f"{line} {row['seconds']:>7.1f}")
    write_json(args.json, {"gigabytes": args.gigabytes, "rows": rows})


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
