"""Is a training step the same on every mesh, for every kind of layer?

  python -m experiments.sharding.run [--layers=NAME ...] [--meshes=NAME ...] [--out=DIR]

All pairs of `matrix.LAYERS` and `matrix.MESHES`: three clipped steps of SGD in float32
on eight forced CPU devices against the same on one. Writes results.json next to this
file after every layer, so that a run that is cut off goes on (`--resume`); exit code 1
if any pair is further than `LIMIT` or two replicas differ.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys

# These are set before JAX is imported, for quick compilation: it takes nearly all of
# the time. Later versions do not have the second flag.
FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])

import jax  # noqa: E402

from benchmarks.common import environment  # noqa: E402
from experiments.sharding import matrix  # noqa: E402
from moex.sharding import MeshConfig  # noqa: E402

HERE = pathlib.Path(__file__).absolute().parent
LIMIT = 1e-5


def row(layer: str, meshes: list[str]) -> dict:
    """{mesh: distances} of one layer."""
    expected = matrix.outcome(layer, MeshConfig(data=1), jax.devices()[:1])
    distances = {}
    for name in meshes:
        actual = matrix.outcome(layer, matrix.MESHES[name], jax.devices())
        distances[name] = matrix.distance(actual, expected)
        print(f"{layer} on {name}: {_text(distances[name])}", flush=True)
    jax.clear_caches()
    return distances


def _text(distance: dict) -> str:
    return ", ".join(f"{k} {v:.1e}" for k, v in distance.items())


def is_good(distance: dict) -> bool:
    """Whether a sharded run is equal to the unsharded one within `LIMIT`."""
    return distance["replicas_differ"] == 0 and max(distance.values()) <= LIMIT


def main(argv=None) -> int:
    """Run the pairs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="*", default=list(matrix.LAYERS))
    parser.add_argument("--meshes", nargs="*", default=list(matrix.MESHES))
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    parser.add_argument("--resume", action="store_true", help="keep finished layers")
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", 8)
    path = args.out / "results.json"
    done = (
        json.loads(path.read_text(encoding="utf-8"))["distances"] if args.resume else {}
    )
    for layer in args.layers:
        if layer in done:
            continue
        done[layer] = row(layer, args.meshes)
        result = {"environment": environment(), "limit": LIMIT, "distances": done}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    pairs = [(a, b, d) for a, of_mesh in done.items() for b, d in of_mesh.items()]
    bad = [f"{a} on {b}" for a, b, d in pairs if not is_good(d)]
    worst = max(max(d.values()) for _, _, d in pairs)
    print(f"{len(pairs) - len(bad)} of {len(pairs)} pairs agree; worst {worst:.1e}")
    print("\n".join(bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
