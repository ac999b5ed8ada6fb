"""Compile the kernels without the device that they are for, and report the figures.

  python -m benchmarks.aot [--platform=tpu] [--topologies=v5e:1x1,v5p:1x1x1,v6e:1x1]
      [--shapes=H1,H2] [--dtypes=bfloat16] [--implementations=tpu] [--json=FILE]

Compiles one layer for a described chip and reports the bytes that it needs there and
the seconds that compiling took here. For TPUs it needs libtpu: 0.0.42.* for JAX 0.10,
0.0.50.* for JAX 0.12. Nothing is run: that a program compiles does not say that it is
right or fast. Records of other versions in FILE are kept.

T tokens · K slots per token · D model width · F expert width · E experts · N rows
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from kernels_pallas import make_plan
from kernels_pallas.grouped_glu import tpu as glu_tpu
from kernels_pallas.grouped_glu import xla as glu_xla
from kernels_pallas.grouped_glu.vjp import differentiable as differentiable_glu
from kernels_pallas.grouped_matmul import tpu as matmul_tpu
from kernels_pallas.grouped_matmul import xla as matmul_xla
from kernels_pallas.grouped_matmul.shapes import AWKWARD, REAL
from kernels_pallas.grouped_matmul.vjp import differentiable

BACKENDS = {"tpu": (matmul_tpu, glu_tpu), "xla": (matmul_xla, glu_xla)}

# libtpu reads these before it describes a topology. Without them it waits for a
# metadata server. The values do not limit the topologies.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second process ends
}


class Unavailable(Exception):
    """The compiler of a platform is not installed."""


def tpu_device(topology: str):
    """One chip of a topology such as "v5e:1x1"; raises Unavailable without libtpu."""
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError as error:
        raise Unavailable(
            "libtpu is not installed: pip install 'libtpu==0.0.42.*' for JAX 0.10, "
            "'libtpu==0.0.50.*' for JAX 0.12"
        ) from error
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=(1, 1, 1)
    )
    return description.devices[0]


# Platform -> (topology -> device, package of its compiler).
PLATFORMS = {"tpu": (tpu_device, "libtpu")}


def programs(implementation: str, shape, dtype):
    """`{name: (function, shapes of its arguments)}` of one layer."""
    T, K, D, F, E = shape
    matmul_module, glu_module = BACKENDS[implementation]
    matmul = differentiable(matmul_module.product, matmul_module.weight_product)
    glu = differentiable_glu(glu_module.forward, glu_module.backward)
    S = jax.ShapeDtypeStruct

    def matmul_gradients(lhs, rhs, bounds, dout):
        call = lambda a, b: matmul(a, b, bounds, False, dtype)  # noqa: E731
        out, pull = jax.vjp(call, lhs, rhs)
        return out, *pull(dout)

    def glu_forward(x, w_in, w_out, gate, expert_TK):
        plan = make_plan(expert_TK, expert_TK >= 0, E)
        return glu(x, w_in, w_out, gate, plan, "silu", None)

    def glu_gradients(x, w_in, w_out, gate, expert_TK, dy):
        call = lambda *a: glu_forward(*a, expert_TK)  # noqa: E731
        y, pull = jax.vjp(call, x, w_in, w_out, gate)
        return y, *pull(dy)

    rows, bounds = S((T * K, D), dtype), S((E + 1,), jnp.int32)
    x, gate, expert = S((T, D), dtype), S((T, K), jnp.float32), S((T, K), jnp.int32)
    weights = (S((E, D, 2, F), dtype), S((E, F, D), dtype))
    return {
        "grouped_matmul fwd+bwd": (
            matmul_gradients,
            (rows, S((E, D, 2 * F), dtype), bounds, S((T * K, 2 * F), dtype)),
        ),
        "grouped_glu fwd": (glu_forward, (x, *weights, gate, expert)),
        "grouped_glu fwd+bwd": (glu_gradients, (x, *weights, gate, expert, x)),
    }


def compile_for(device, function, arguments) -> dict:
    """Bytes on one device and seconds of compilation, or the compiler's error."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments
    ]
    start = time.perf_counter()
    try:
        compiled = jax.jit(function).lower(*placed).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).strip().splitlines()[0][:300]}
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return {
        "peak_bytes": memory.peak_memory_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "compile_s": round(seconds, 2),
    }


def identity(record: dict) -> tuple:
    """The key of a record: records with the same key replace each other."""
    names = ("topology", "jax", "implementation", "program", "shape", "dtype")
    return tuple(record[name] for name in names)


def save(path: pathlib.Path, records: list[dict]) -> None:
    """Adds records to a file; they replace older ones of the same key."""
    kept = (
        {identity(r): r for r in json.loads(path.read_text(encoding="utf-8"))}
        if path.exists()
        else {}
    )
    kept |= {identity(r): r for r in records}
    ordered = [kept[key] for key in sorted(kept)]
    lines = ",\n".join(" " + json.dumps(record) for record in ordered)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=PLATFORMS, default="tpu")
    parser.add_argument("--topologies", default="v5e:1x1,v5p:1x1x1,v6e:1x1")
    parser.add_argument("--shapes", default="H1,H2,H5,H7,H10")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--implementations", default="tpu")
    parser.add_argument("--programs", default="", help="substring of their names")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    device_of, package = PLATFORMS[args.platform]
    shapes = {**AWKWARD, **REAL}
    for topology in args.topologies.split(","):
        device = device_of(topology)
        for implementation in args.implementations.split(","):
            for shape in args.shapes.split(","):
                for dtype in args.dtypes.split(","):
                    made = programs(implementation, shapes[shape], jnp.dtype(dtype))
                    for program, (function, arguments) in made.items():
                        if args.programs not in program:
                            continue
                        record = {
                            "topology": topology,
                            "device": device.device_kind,
                            "jax": jax.__version__,
                            package: importlib.metadata.version(package),
                            "implementation": implementation,
                            "program": program,
                            "shape": shape,
                            "shape_TKDFE": list(shapes[shape]),
                            "dtype": dtype,
                            **compile_for(device, function, arguments),
                        }
                        print(line(record), flush=True)
                        if args.json:
                            save(args.json, [record])


def line(record: dict) -> str:
    """One record for people."""
    names = ("topology", "implementation", "program", "shape", "dtype")
    start = "  ".join(str(record[name]) for name in names)
    if "error" in record:
        return f"{start}  {record['error']}"
    peak, temp = (record[f"{name}_bytes"] / 2**20 for name in ("peak", "temp"))
    seconds = record["compile_s"]
    return f"{start}  peak {peak:,.0f} MiB  temp {temp:,.0f} MiB  {seconds:.1f} s"


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
