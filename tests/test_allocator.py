"""Memory that a process on a CPU frees is kept, where nothing says otherwise."""

import os
import subprocess
import sys

import pytest

from moex import allocator, cli

GLIBC = allocator._is_glibc()

# Prints the page faults of taking and freeing 64 MiB, each page touched, ten times.
FAULTS = """
import ctypes, resource, sys
from moex import keep_memory
print(keep_memory(), "jax" in sys.modules)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def take():
    block = libc.malloc(ctypes.c_size_t(2**26))
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment) -> tuple[list[str], int]:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env.pop("GLIBC_TUNABLES", None)
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=env | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, count = ran.stdout.splitlines()
    return first.split(), int(count)


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_a_process_that_keeps_memory_takes_it_again_without_page_faults():
    kept, count = faults()
    assert kept == ["True", "False"]
    assert count < 1000
    off, count = faults(MOEX_KEEP_MEMORY="0")
    assert off == ["False", "False"]
    assert count > 10 * 2**26 // 4096 // 600  # huge pages take 512 pages with a fault


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"MOEX_KEEP_MEMORY": "0"}, "MOEX_KEEP_MEMORY=0"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, "GLIBC_TUNABLES sets"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, "accelerator"),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, None),
        ({}, None),
    ],
)
def test_the_allocator_is_left_alone_where_that_is_asked_for(
    environment, reason, monkeypatch
):
    monkeypatch.setattr(allocator, "_is_glibc", lambda: True)
    for name in (allocator.VARIABLE, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = allocator.why_not()
    assert said is None if reason is None else reason in said


def test_an_installed_accelerator_plugin_is_seen_without_jax(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "jax_plugins", raising=False)
    assert not allocator._may_have_accelerator()
    (tmp_path / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "xla_cuda13" / "__init__.py").touch()
    sys.path_importer_cache.pop(str(tmp_path), None)
    assert allocator._may_have_accelerator()


def test_nothing_is_set_without_glibc(monkeypatch):
    monkeypatch.setattr(allocator, "_is_glibc", lambda: False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not allocator.keep_memory()


def test_another_value_of_the_variable_is_refused(monkeypatch, capsys):
    monkeypatch.setenv(allocator.VARIABLE, "yes")
    monkeypatch.setattr(sys, "argv", ["moex", "config"])
    monkeypatch.setattr(cli.interrupts, "listen", lambda: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "MOEX_KEEP_MEMORY=yes: must be 0 or 1" in capsys.readouterr().err
