"""Memory and time of reading a checkpoint folder into a model on one device.

  python -m benchmarks.import_hf [--gigabytes=1] [--json=FILE]

A Mixtral-type folder of random bfloat16 weights is written, shard by shard, and read
in a process of its own. On a CPU the arrays are host memory, so what counts is the peak
beyond them.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from benchmarks.common import write_json

D, F, V, E = 1024, 3584, 32_000, 8


def write_folder(folder: pathlib.Path, gigabytes: float) -> None:
    """A folder of about so many GB, shards of 256 MiB."""
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
    files = {"config.json": json.dumps(config)}
    write(folder, tensors, max_shard_bytes=1 << 28, files=files)


def measure(folder: pathlib.Path) -> dict:
    """Bytes of the arrays, most memory of this process beyond them, seconds."""
    import jax

    from moex.interop.families import FAMILIES, read_model
    from moex.interop.folder import Folder
    from moex.interop.hf import load_model
    from moex.interop.names import pieces
    from moex.sharding import MeshConfig
    from moex.train import state as states

    with Folder.open(folder) as opened:
        model = read_model("config.json", opened.config)
        spec = states.model_spec(model)
        mesh = MeshConfig().make(jax.devices()[:1])
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
        wanted = pieces(model, FAMILIES["mixtral"].names)
        arrays = load_model(spec, mesh, wanted, opened)
        jax.block_until_ready(arrays)
    seconds = time.time() - start
    leaves = jax.tree.leaves(arrays)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(a.nbytes for a in leaves)
    return {
        "folder_bytes": sum(f.stat().st_size for f in folder.iterdir()),
        "array_bytes": size,
        "largest_array_bytes": max(a.nbytes for a in leaves),
        "peak_beyond_arrays_bytes": peak * 1024 - size,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--folder", type=pathlib.Path, help="measure this, here")
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(measure(args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "folder"
        write_folder(folder, args.gigabytes)
        command = [sys.executable, "-m", "benchmarks.import_hf", f"--folder={folder}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    for name, value in result.items():
        if name.endswith("bytes"):
            print(f"{name:<26} {value / 1e6:10.1f} MB")
    print(f"{'seconds':<26} {result['seconds']:10.1f}")
    write_json(args.json, result)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
