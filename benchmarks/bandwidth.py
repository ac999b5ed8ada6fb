"""The rate at which a CPU reads memory, by a C program that does nothing else.

  python -m benchmarks.bandwidth [--gigabytes=4] [--threads=N] [--repeats=7]
      [--json=FILE]

The array is larger than any cache, and each thread reads a part of it from its begin to
its end. Pages are those that JAX's arrays have, and large ones (2 MB) beside them.
"""

import argparse
import ctypes
import mmap
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

from benchmarks import common
from kernels_pallas.native import library

SOURCE = pathlib.Path(__file__).with_name("bandwidth.c")
TURN = 512  # bytes of a turn in bandwidth.c


def reader():
    """The C function `read_all(address, turns, threads)`; RuntimeError without C."""
    compiler = library.find_compiler()
    if compiler is None:
        raise RuntimeError("there is no C compiler: see `kernels_pallas.native`.")
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/bandwidth.so"
        flags = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
        command = [*compiler, *flags, str(SOURCE), "-o", made, "-lpthread"]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(made).read_all
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return function


def read_rate(
    gigabytes: float = 4.0, threads: int = 0, repeats: int = 7, large_pages=False
) -> dict:
    """Bytes per second of reading: `{"median", "max", "all"}`.

    Args:
      gigabytes: size of the array, 10^9 bytes.
      threads: how many read; 0: as many as there are cores.
      repeats: how often all of it is read.
      large_pages: ask for pages of 2 MB.
    """
    run, turns = reader(), int(gigabytes * 1e9 / TURN)
    rates = []
    with mmap.mmap(-1, turns * TURN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE if large_pages else mmap.MADV_NOHUGEPAGE)
        for start in range(0, turns * TURN, 1 << 26):  # every page is written once
            size = min(1 << 26, turns * TURN - start)
            memory[start : start + size] = b"\1" * size
        array = (ctypes.c_char * len(memory)).from_buffer(memory)
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            found = run(ctypes.addressof(array), turns, threads or os.cpu_count() or 1)
            rates.append(turns * TURN / (time.perf_counter() - begin))
            assert found == turns * TURN // 8 * 0x0101010101010101 % 2**64
        del array
    return {"median": statistics.median(rates[1:]), "max": max(rates), "all": rates[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, help="default: 1, and one per core")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    rows = []
    for threads in [args.threads] if args.threads else sorted({1, os.cpu_count() or 1}):
        for large in (False, True):
            rate = read_rate(args.gigabytes, threads, args.repeats, large)
            pages = "2 MB" if large else "4 kB"
            rows.append({"threads": threads, "pages": pages} | rate)
            text = (
                f"{threads:>3} threads, pages of {pages}: {rate['median'] / 1e9:6.1f}"
            )
            print(f"{text} GB/s, at most {rate['max'] / 1e9:.1f}", flush=True)
    common.write_json(args.json, {"gigabytes": args.gigabytes, "rows": rows})


if __name__ == "__main__":
    main()
