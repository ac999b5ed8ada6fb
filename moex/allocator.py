"""Settings of the C library's allocator for CPU runs: the process keeps freed memory.

Every step of a CPU run frees its working memory and takes it again. By default glibc
gives large blocks back to the kernel, which fills each page with zeros when it is next
touched: thousands of page faults in every step.
"""

import ctypes
import importlib.util
import os
import pkgutil

VARIABLE = "MOEX_KEEP_MEMORY"
# Options of mallopt(3): their numbers from malloc.h, and the values that we set.
SETTINGS = {
    "M_ARENA_MAX": (-8, 1),  # all threads share the memory that one of them freed
    "M_MMAP_MAX": (-4, 0),  # large blocks come from the heap too
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),  # the top of the heap is not given back
    "M_TOP_PAD": (-2, 64 * 2**20),  # bytes by which the heap grows at least
}


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, for JAX to take again.

    Call it before JAX makes its first array; the command `moex` does so. It does
    nothing where JAX may find an accelerator, where the C library is not glibc, where
    the environment variable `MOEX_KEEP_MEMORY` is 0, or where `GLIBC_TUNABLES` already
    says something about malloc.

    Returns:
      Whether the allocator was set.

    Raises:
      ConfigError: if `MOEX_KEEP_MEMORY` is neither 0 nor 1.
    """
    if why_not() is not None:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(name, value) for name, value in SETTINGS.values()])


def why_not() -> str | None:
    """The reason why `keep_memory` does nothing here; None: it sets the allocator."""
    wanted = os.environ.get(VARIABLE, "1")
    if wanted not in ("0", "1"):
        from moex.config.base import ConfigError  # late: `import moex` stays quick

        raise ConfigError(f"{VARIABLE}={wanted}: must be 0 or 1.")
    if wanted == "0":
        return f"{VARIABLE}=0"
    if not _is_glibc():
        return "the C library is not glibc"
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES sets the allocator"
    if _may_have_accelerator():
        return "JAX may find an accelerator"
    return None


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return False


def _may_have_accelerator() -> bool:
    """Whether JAX could choose a device other than a CPU; found without JAX."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    if importlib.util.find_spec("libtpu"):
        return True
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else None
    return any(True for _ in pkgutil.iter_modules(folders)) if folders else False
