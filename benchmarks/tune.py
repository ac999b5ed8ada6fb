"""Finds the fastest tiles on this device, for kernels_pallas/tilings.json.

  python -m benchmarks.tune [--implementations=triton,mosaic] [--shapes=H1,H2,...]
      [--operations=up,product,...] [--dtype=bfloat16] [--load=random]
      [--seconds=N] [--out=FILE] [--json=FILE] [--dry-run]
  python -m benchmarks.tune --merge=FILE

Every candidate of every operation of the layer (`candidates` of each backend) is
compiled and timed, interleaved; the fastest by its median becomes the entry, with its
time and that of the default, so that the table says what it gains. Candidates
that do not compile are listed and skipped. Entries of the same operation and sizes are
replaced, all others kept; nothing of this happens when moex is imported.

`--seconds` is shared evenly by what is left to measure; candidates for which no time is
left are not tried, and the default is always among those that are. `--out` takes the
place of tilings.json: what it has for this device is not measured again, and
`--merge=FILE` moves its entries there.

`--dry-run` uses a small shape, the Pallas interpreter and one repeat, compares every
candidate with the reference, and writes nothing but `--out`: it shows that this script
is ready for a device that is not there.

T tokens · K slots per token · D model width · F expert width · E experts
"""

import argparse
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from kernels_pallas import implementations, make_plan, tuned
from kernels_pallas.device import device_kind
from kernels_pallas.grouped_glu import xla as reference
from kernels_pallas.grouped_matmul import xla as matmul_reference
from kernels_pallas.grouped_matmul.shapes import LayerShape
from moex.data.files import atomic_write
from moex.json_files import read_object

OPERATIONS = ("up", "product", "down_vjp", "product_t", "weight")
KEY = ("operation", "M", "K", "N", "G", "dtype")  # fields that identify an entry
SMALL = LayerShape(96, 2, 64, 64, 4)


def arrays(shape, dtype, load):
    """The arguments of the kernels of a layer of this shape."""
    T, K, D, F, E = shape
    expert = jnp.asarray(common.experts_of(load, T, K, E))
    plan = make_plan(expert, jnp.ones((T, K), bool), E)
    keys = jax.random.split(jax.random.key(0), 7)
    sizes = {
        "x": (T, D),
        "dy": (T, D),
        "w_in": (E, D, 2 * F),
        "w_out": (E, F, D),
        "a": (T * K, 2 * F),
        "h": (T * K, F),
        "weight": (T * K,),
    }
    scale = {"w_in": D**-0.5, "w_out": F**-0.5}
    out = {
        name: (scale.get(name, 1.0) * jax.random.normal(key, size)).astype(
            jnp.float32 if name == "weight" else dtype
        )
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    return {**out, "token": plan.token_N, "bounds": plan.bounds}


def sizes_of(shape, operation) -> tuple[int, int, int, int]:
    """The M, K, N, G that `default_tiling` is given for an operation of a layer."""
    T, K, D, F, E = shape
    inner = {
        "up": (D, F),
        "down_vjp": (D, F),
        "weight": (F, 2 * F),
        "product": (F, D),
        "product_t": (2 * F, D),
    }
    return (T * K, *inner[operation], E)


def call(kernels, matmul, operation, a, **options):
    """Runs an operation on `arrays`; `options` are `tiling` and `interpret`."""
    token, bounds = a["token"], a["bounds"]
    if operation == "up":
        return kernels.up(a["x"], a["w_in"], token, bounds, "silu", True, **options)
    if operation == "down_vjp":
        rows = (a["pre"], a["weight"], token, bounds)
        return kernels.down_vjp(a["dy"], a["w_out"], *rows, "silu", **options)
    if operation == "weight":
        return matmul.weight_product(a["h"], a["a"], bounds, a["h"].dtype, **options)
    transposed = operation == "product_t"
    lhs, rhs = (a["a"], a["w_in"]) if transposed else (a["h"], a["w_out"])
    return matmul.product(lhs, rhs, bounds, transposed, lhs.dtype, **options)


def with_pre(kernels, operation, a, **options) -> dict:
    """`arrays` with the pre-activations that a backend's "down_vjp" reads."""
    if operation != "down_vjp":
        return a
    up = jax.jit(lambda a: call(kernels, None, "up", a, **options)[0])
    return a | {"pre": up(a)}


def compiled(candidates, function, a, until) -> dict:
    """`{tiling: program of a}`; prints what does not compile, stops at `until`.

    Compilers work in parallel, in threads: a GPU's machine has cores for it.
    """
    jobs: dict = {}
    width = min(8, os.cpu_count() or 1)

    def compile_one(tiling):
        return jax.jit(functools.partial(function, tiling=tiling)).lower(a).compile()

    with futures.ThreadPoolExecutor(width) as pool:
        for start in range(0, len(candidates), width):
            if jobs and time.monotonic() > until:
                print(f"    no time for {len(candidates) - start}", file=sys.stderr)
                break
            some = candidates[start : start + width]
            made = [pool.submit(compile_one, tiling) for tiling in some]
            for tiling, program in zip(some, made, strict=True):
                try:
                    job = functools.partial(program.result(), a)
                    jax.block_until_ready(job())
                except Exception as e:  # a compiler may raise anything
                    reason = (str(e).splitlines() or [repr(e)])[0][:100]
                    print(f"    {tiling}: {reason}", file=sys.stderr)
                else:
                    jobs[tiling] = job
    return jobs


def timed(jobs, repeats) -> list:
    """`[(tiling, median seconds)]`, fastest first."""
    seconds = common.measure(jobs, repeats, sample_s=common.sample_seconds())
    medians = {t: statistics.median(s["wall"]) for t, s in seconds.items()}
    return sorted(medians.items(), key=lambda item: item[1])


def check(actual, expected, tolerance) -> None:
    """Fails unless the results of a candidate are those of the reference."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if a.shape != b.shape:  # residuals have other layouts
            continue
        a, b = (np.asarray(value, np.float32) for value in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


def tune(name, shape, operation, args, until=math.inf) -> dict | None:
    """The entry of one operation of one shape; None if no candidate compiles."""
    backend = implementations.PALLAS[name]
    dtype = jnp.dtype(args.dtype)
    a = arrays(shape, dtype, args.load)
    interpret = {"interpret": backend.interpreter()} if args.dry_run else {}
    kernels, matmul = backend.glu.KERNELS, backend.matmul
    sizes = sizes_of(shape, operation)

    def function(a, tiling):
        return call(kernels, matmul, operation, a, tiling=tiling, **interpret)

    found = matmul.candidates(operation, *sizes, dtype)
    found = found[:2] if args.dry_run else found
    ready = with_pre(kernels, operation, a, **interpret)
    jobs = compiled(found, function, ready, until)
    if args.dry_run:
        plain = with_pre(reference.KERNELS, operation, a)
        expected = call(reference.KERNELS, matmul_reference, operation, plain)
        for job in jobs.values():
            check(job(), expected, 3e-2)
    if not jobs:
        return None
    ranking = timed(jobs, 1 if args.dry_run else 5)
    default = matmul.default_tiling(operation, *sizes, dtype)
    best, best_s = ranking[0]
    return {
        "operation": operation,
        **dict(zip("MKNG", sizes, strict=True)),
        "dtype": args.dtype,
        "tiling": fields(best),
        "us": us(best_s),
        "tried": len(ranking),
        "default_us": us(dict(ranking).get(default)),
        "jax": jax.__version__,
    }


def us(seconds: float | None) -> float | None:
    """Seconds as microseconds; None for a time that could not be measured."""
    return None if seconds is None else round(1e6 * seconds, 1)


def fields(tiling) -> dict:
    """A Tiling as plain data."""
    if hasattr(tiling, "_asdict"):
        return tiling._asdict()
    return dict(vars(tiling))


def key_of(entry: dict) -> tuple:
    """The key of an entry: the operation and its sizes."""
    return tuple(entry[k] for k in KEY)


def replace(table, device, name, entry) -> None:
    """Puts an entry in the place of one for the same operation and sizes."""
    entries = table.setdefault(device, {}).setdefault(name, [])
    entries[:] = [e for e in entries if key_of(e) != key_of(entry)]
    entries.append(entry)
    entries.sort(key=lambda e: tuple(map(str, key_of(e))))


def merge(file: pathlib.Path) -> int:
    """Moves the entries of a table of `--out` to tilings.json; returns their number."""
    table, new = read_object(tuned.PATH), read_object(file)
    found = [
        (device, name, entry)
        for device, backends in new.items()
        for name, entries in backends.items()
        for entry in entries
    ]
    for device, name, entry in found:
        replace(table, device, name, entry)
    write(tuned.PATH, table)
    return len(found)


def write(file: pathlib.Path, data) -> None:
    atomic_write(file, json.dumps(data, indent=1) + "\n")


def work_of(args, shapes, done) -> list:
    """`(shape's name, shape, backend, operation)` of all that is not in `done` yet."""
    out = []
    for shape_name, shape in shapes.items():
        for name in args.implementations.split(","):
            for operation in args.operations.split(","):
                sizes = sizes_of(shape, operation)
                key = (operation, *sizes, args.dtype)
                if key not in map(key_of, done.get(name, [])):
                    out.append((shape_name, shape, name, operation))
    return out


def parsed() -> tuple[argparse.Namespace, dict]:
    """The arguments, and `{name: shape}`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", default="triton,mosaic")
    parser.add_argument("--shapes", default="H1,H2,H3,H4,H5,H6,H7,H8,H9")
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load", default="random", choices=common.LOADS)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=pathlib.Path, help="instead of tilings.json")
    parser.add_argument("--merge", type=pathlib.Path, help="a table of --out")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    try:
        common.check_names(args.implementations, implementations.PALLAS)
        common.check_names(args.operations, OPERATIONS)
        shapes = {name: common.shape_of(name) for name in args.shapes.split(",")}
    except ValueError as e:
        parser.error(str(e))
    return args, {"small": SMALL} if args.dry_run else shapes


def main() -> None:
    args, shapes = parsed()
    if args.merge:
        print(f"{merge(args.merge)} entries into {tuned.PATH}")
        return
    file = args.out or (None if args.dry_run else tuned.PATH)
    table = read_object(file) if file and file.exists() else {}
    device, began = device_kind(), time.monotonic()
    work = work_of(args, shapes, table.get(device, {}) if args.out else {})
    figures: dict = {"entries": [], "failed": []}
    for i, (shape_name, shape, name, operation) in enumerate(work):
        left = began + args.seconds - time.monotonic()
        until = time.monotonic() + left / (len(work) - i)
        entry = tune(name, shape, operation, args, until)
        what = f"{shape_name:<6}{name:<8}{operation:<10}"
        if entry is None:
            print(f"{what} no candidate compiles", flush=True)
            figures["failed"].append([shape_name, name, operation])
        else:
            print(
                f"{what}{entry['us']:>10} us, default {entry['default_us']} us: "
                f"{entry['tiling']}",
                flush=True,
            )
            replace(table, device, name, entry)
            figures["entries"].append({"shape": shape_name, "backend": name} | entry)
            if file:  # after every entry: the machine may be taken away at any time
                write(file, table)
        common.write_json(args.json, figures)
    if work and not figures["entries"]:
        raise SystemExit("error: no candidate of any operation compiles.")


if __name__ == "__main__":
    main()
