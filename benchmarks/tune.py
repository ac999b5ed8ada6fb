"""Finds the fastest tiles on this device, for kernels_pallas/tilings.json.

  python -m benchmarks.tune [--implementations=triton,mosaic] [--shapes=H1,H2,...]
      [--operations=up,product,...] [--dtype=bfloat16] [--load=random]
      [--dry-run]

Every candidate of every operation of the layer (`candidates` of each backend) is
compiled and timed, interleaved; the fastest by its median becomes the entry, with its
time and that of the default beside it, so that the table says what it gains. Candidates
that do not compile are listed and skipped. Entries of the same operation and sizes are
replaced, all others kept; nothing of this happens when moex is imported.

`--dry-run` uses a small shape, the Pallas interpreter and one repeat, compares every
candidate with the reference, and writes nothing: it shows that this script is ready
for a device that is not there.

T tokens · K slots per token · D model width · F expert width · E experts
"""

import argparse
import functools
import json
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from kernels_pallas import implementations, make_plan, tuned
from kernels_pallas.device import device_kind
from kernels_pallas.grouped_glu import xla as reference
from kernels_pallas.grouped_matmul import xla as matmul_reference
from kernels_pallas.grouped_matmul.shapes import LayerShape

OPERATIONS = ("up", "product", "down_vjp", "product_t", "weight")
SMALL = LayerShape(96, 2, 64, 64, 4)


def arrays(shape, dtype, load):
    """What the kernels of a layer of this shape are called with."""
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


def calls(kernels, matmul, operation, a):
    """`(function of a tiling, sizes for default_tiling)` of an operation."""
    N, (E, F, D) = a["token"].shape[0], a["w_out"].shape
    token, bounds = a["token"], a["bounds"]
    if operation == "up":
        return (
            lambda **o: kernels.up(a["x"], a["w_in"], token, bounds, "silu", True, **o)
        ), (N, D, F, E)
    if operation == "down_vjp":
        pre = kernels.up(a["x"], a["w_in"], token, bounds, "silu", True)[0]
        return (
            lambda **o: kernels.down_vjp(
                a["dy"], a["w_out"], pre, a["weight"], token, bounds, "silu", **o
            )
        ), (N, D, F, E)
    if operation == "weight":
        return (
            lambda **o: matmul.weight_product(a["h"], a["a"], bounds, a["h"].dtype, **o)
        ), (N, F, 2 * F, E)
    if operation == "product":
        return (
            lambda **o: matmul.product(
                a["h"], a["w_out"], bounds, False, a["h"].dtype, **o
            )
        ), (N, F, D, E)
    return (
        lambda **o: matmul.product(a["a"], a["w_in"], bounds, True, a["a"].dtype, **o)
    ), (N, 2 * F, D, E)


def timed(candidates, function, dtype_tolerance, dry_run, expected):
    """`[(tiling, median seconds)]`, fastest first; prints what does not compile."""
    jobs = {}
    for tiling in candidates:
        job = jax.jit(functools.partial(function, tiling=tiling))
        try:
            result = jax.block_until_ready(job())
        except Exception as e:  # whatever a compiler refuses a candidate with
            print(f"    {tiling}: {str(e).splitlines()[0][:100]}", file=sys.stderr)
            continue
        if dry_run:
            check(result, expected, dtype_tolerance)
        jobs[tiling] = job
    seconds = common.measure(jobs, 1 if dry_run else 5)
    medians = {t: statistics.median(s["wall"]) for t, s in seconds.items()}
    return sorted(medians.items(), key=lambda item: item[1])


def check(actual, expected, tolerance) -> None:
    """Fails unless the results of a candidate are those of the reference."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if a.shape != b.shape:  # residuals have layouts of their own
            continue
        a, b = (np.asarray(value, np.float32) for value in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


def tune(name, shape, operation, args) -> dict:
    """The entry of one operation of one shape."""
    backend = implementations.PALLAS[name]
    dtype = jnp.dtype(args.dtype)
    a = arrays(shape, dtype, args.load)
    interpret = {"interpret": backend.interpreter()} if args.dry_run else {}
    kernels = backend.glu.KERNELS
    if interpret:
        kernels = kernels.__class__(
            *(functools.partial(f, **interpret) for f in kernels)
        )
    function, sizes = calls(kernels, backend.matmul, operation, a)
    if interpret and operation in ("weight", "product", "product_t"):
        function = functools.partial(function, **interpret)
    expected = None
    if args.dry_run:
        plain, _ = calls(reference.KERNELS, matmul_reference, operation, a)
        expected = plain()
    found = backend.matmul.candidates(operation, *sizes, dtype)
    if args.dry_run:
        found = found[:3]
    ranking = timed(found, function, 3e-2, args.dry_run, expected)
    if not ranking:
        raise SystemExit(f"error: no candidate of {name} {operation} compiles.")
    default = backend.matmul.default_tiling(operation, *sizes, dtype)
    best, best_s = ranking[0]
    return {
        "operation": operation,
        **dict(zip("MKNG", sizes, strict=True)),
        "dtype": args.dtype,
        "tiling": fields(best),
        "us": round(1e6 * best_s, 1),
        "default_us": round(1e6 * dict(ranking).get(default, float("nan")), 1),
        "jax": jax.__version__,
    }


def fields(tiling) -> dict:
    """A Tiling as plain data."""
    if hasattr(tiling, "_asdict"):
        return tiling._asdict()
    return dict(vars(tiling))


def replace(table, device, name, entry) -> None:
    """Puts an entry in the place of one for the same operation and sizes."""
    key = ("operation", "M", "K", "N", "G", "dtype")
    entries = table.setdefault(device, {}).setdefault(name, [])
    same = [e for e in entries if all(e[k] == entry[k] for k in key)]
    for old in same:
        entries.remove(old)
    entries.append(entry)
    entries.sort(key=lambda e: tuple(str(e[k]) for k in key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", default="triton,mosaic")
    parser.add_argument("--shapes", default="H1,H2,H3,H4,H5,H6,H7,H8,H9")
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load", default="random", choices=common.LOADS)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    try:
        common.check_names(args.implementations, implementations.PALLAS)
        common.check_names(args.operations, OPERATIONS)
        shapes = {name: common.shape_of(name) for name in args.shapes.split(",")}
    except ValueError as e:
        parser.error(str(e))
    if args.dry_run:
        shapes = {"small": SMALL}
    device = device_kind()
    table = json.loads(tuned.PATH.read_text(encoding="utf-8"))
    for shape_name, shape in shapes.items():
        for name in args.implementations.split(","):
            for operation in args.operations.split(","):
                entry = tune(name, shape, operation, args)
                print(
                    f"{shape_name:<6}{name:<8}{operation:<10}{entry['us']:>10} us, "
                    f"default {entry['default_us']} us: {entry['tiling']}"
                )
                replace(table, device, name, entry)
                if not args.dry_run:  # as it goes: a lease may end at any time
                    tuned.PATH.write_text(
                        json.dumps(table, indent=1) + "\n", encoding="utf-8"
                    )


if __name__ == "__main__":
    main()
