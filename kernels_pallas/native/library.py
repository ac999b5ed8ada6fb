"""Compiles the C files once for a machine and a jaxlib; registers their functions.

The library is kept under $XDG_CACHE_HOME/moex/native; its name holds the sha256 of its
bytes, and it is loaded only if nobody else can have written it (`private.py`).

The compiler is $CC, cc, gcc or clang; or `zig cc` of the package ziglang (the extra
`native`), for machines that have Python but no compiler.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings

import jax
import jaxlib
import numpy as np

SOURCES = ("attention.c", "experts.c", "lowered.c", "orthogonalise.c")
FOLDER = pathlib.Path(__file__).parent
FUNCTIONS = (
    "moex_attention_forward",
    "moex_attention_backward",
    "moex_experts_forward",
    "moex_experts_backward",
    "moex_lowered",
    "moex_orthogonalise",
    "moex_product",
    "moex_weight_product",
)
DTYPES = ("float32", "int32")  # of the inputs of a function, if it is not one of these:
OTHER_DTYPES = {"moex_lowered": ("bfloat16", "float32", "int32", "int8")}
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
LIBRARIES = ("-lm", "-lpthread")
MOST_FLOATS = (
    2**28
)  # 1 GiB, touched only where one expert has a large share of the rows


@functools.cache
def why_not() -> str | None:
    """The reason why the functions are missing; None once XLA knows them."""
    if os.name != "posix":
        return f"it is compiled on Linux and macOS, and this is {platform.system()}"
    compiler = find_compiler()
    if compiler is None:
        return (
            "it needs a C compiler: $CC, cc, gcc, clang, or pip install ziglang (the "
            "extra `native` of moex)"
        )
    try:
        library = _load(compiler)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        first = next((line for line in said.splitlines() if "error" in line), said)
        return f"{' '.join(compiler)} could not compile the C files: {first.strip()}"
    for name in FUNCTIONS:
        capsule = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return None


def find_compiler() -> tuple[str, ...] | None:
    """The beginning of the compiler's command line; None if there is no compiler."""
    if os.environ.get("CC"):
        return tuple(os.environ["CC"].split())
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return (path,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "cc")
    return None


def _load(compiler) -> ctypes.CDLL:
    """The compiled library: from the cache if it is there, undamaged and this user's.

    Raises:
      OSError: if it cannot be written or loaded.
      subprocess.CalledProcessError: if the compiler fails.
    """
    from kernels_pallas.native import private  # needs POSIX

    march = "-march" if platform.machine() in ("x86_64", "AMD64") else "-mcpu"
    command = [*compiler, *FLAGS, f"{march}=native", f"-I{jax.ffi.include_dir()}"]
    about = (command, _processor(), platform.libc_ver(), jaxlib.__version__)
    text = b"".join(f.read_bytes() for f in sorted(FOLDER.glob("*.[ch]")))
    key = hashlib.sha256(repr(about).encode() + text).hexdigest()[:24]
    folder = _cache_folder()
    if folder is not None and (found := _cached(folder, f"experts-{key}-")):
        return found.load()
    parent = folder.name() if folder and os.access(folder.name(), os.W_OK) else None
    with private.work_folder(parent or tempfile.gettempdir()) as work:
        made = "experts.so"
        command += ["-o", work.name(made), *(str(FOLDER / name) for name in SOURCES)]
        command += LIBRARIES
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            umask=0o077,
            env=os.environ | {"TMPDIR": work.name()},
            pass_fds=(work.fd,),
        )
        found = private.open_library(work, made)
        loaded = found.load()
        if parent is not None:
            # Another process may compile at the same time: the name has the hash of the
            # content, so that both files are good.
            name = f"experts-{key}-{found.sha256}.so"
            with contextlib.suppress(OSError):  # a full disk: it is loaded already
                os.replace(made, name, src_dir_fd=work.fd, dst_dir_fd=folder.fd)
    return loaded


def _cached(folder, start: str):
    """The library in the cache whose name begins with `start`; removes damaged ones."""
    from kernels_pallas.native import private

    for name in sorted(os.listdir(folder.fd)):
        if not name.startswith(start):
            continue
        with contextlib.suppress(OSError):
            found = private.open_library(folder, name)
            if name == f"{start}{found.sha256}.so":
                return found
            os.close(found.fd)
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder.fd)
    return None


def call(name, shapes, inputs, pieces=None, **attributes):
    """Call one of FUNCTIONS; its results are float32 of `shapes`.

    Args:
      pieces: number of pieces of the rows if they are all of one group; None: four for
        each core, so that the cores end together.
      attributes: ints, or numpy scalars.

    Raises:
      ValueError: on other dtypes than the function takes, which C would misread.
      RuntimeError: if there is no library; see `why_not`.
    """
    if reason := why_not():
        raise RuntimeError(f"{name}: {reason}")
    dtypes, taken = {a.dtype.name for a in inputs}, OTHER_DTYPES.get(name, DTYPES)
    if not dtypes <= {*taken}:
        told = " and ".join(taken)
        raise ValueError(f"{name} takes {told}; got {sorted(dtypes)}.")
    results = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    attributes["most"] = pieces or min(max(8, 4 * (os.cpu_count() or 1)), 64)
    attributes = {
        k: np.int32(v) if isinstance(v, int) else v for k, v in attributes.items()
    }
    return jax.ffi.ffi_call(name, results, vmap_method="sequential")(
        *inputs, **attributes
    )


def weight_pieces(num_floats) -> int:
    """The number of pieces if each has its own weight gradient of `num_floats`."""
    most = min(max(4, 2 * (os.cpu_count() or 1)), 32)
    return max(1, min(most, MOST_FLOATS // num_floats))


def cache_path() -> pathlib.Path:
    """The path of the folder of libraries; raises RuntimeError if there is no home."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache, "moex", "native").absolute()


def _cache_folder():
    """Open the folder of libraries; None, with a warning, if it cannot be used.

    There is no warning if the folder is read-only or the user has no home.
    """
    from kernels_pallas.native import private

    try:
        return private.open_folder(cache_path())
    except private.Refused as error:
        warnings.warn(
            f"{error}: the library of implementation 'native' is compiled anew in each "
            "process; set XDG_CACHE_HOME to a folder of your own",
            stacklevel=2,
        )
    except (OSError, RuntimeError):
        pass
    return None


def _processor() -> str:
    """The facts that -march=native may depend on: machines can share a home folder."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
