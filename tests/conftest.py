"""How every test runs: eight small CPU devices, and JAX at its strictest.

MOEX_TEST_PLATFORM=gpu or =tpu runs on that platform instead, for `-m gpu`, `-m tpu`.
"""

import importlib.metadata
import os
import pathlib
import sys

# So that tests can share `tests.helpers` however pytest was called.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

PLATFORM = os.environ.get("MOEX_TEST_PLATFORM", "cpu")

if PLATFORM == "cpu":
    # Before JAX is imported. Compiling is most of the time of these tests and LLVM's
    # optimisation half of that; worker processes share the cores already.
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # The whole suite in 4:50 min instead of 8:40 (2 CPU cores, JAX 0.10.2). Later
        # versions do not have the flag, and an unknown one ends the process.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    if "PYTEST_XDIST_WORKER" in os.environ:
        flags.append("--xla_cpu_multi_thread_eigen=false")
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

if PLATFORM == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

hypothesis.settings.register_profile(
    "moex", derandomize=True, deadline=None, max_examples=40, database=None
)
hypothesis.settings.load_profile("moex")


@pytest.fixture(scope="session", autouse=True)
def moex_cache(tmp_path_factory):
    """Prepared data and downloads of this process stay away from the user's."""
    before = os.environ.get("MOEX_CACHE")
    os.environ["MOEX_CACHE"] = str(tmp_path_factory.mktemp("moex_cache"))
    yield
    if before is None:
        del os.environ["MOEX_CACHE"]
    else:
        os.environ["MOEX_CACHE"] = before


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of a file go with it: a worker stays below 2 GB."""
    yield
    jax.clear_caches()


# The files that take longest go first, or one worker waits for the other at the end.
LONGEST = (
    *("test_sharded", "test_distributed", "test_plan", "moe/test_layer", "test_crash"),
    *("train/test_step", "train/test_variants", "moe/test_parallel"),
    *("compress/test_upcycle", "interop/test_import_export", "interop/test_families"),
    *("kernels/test_grouped_swiglu", "moe/test_routers", "train/test_loop"),
    *("moe/test_chain", "moe/test_experts", "serve/test_decode"),
    *("compress/test_convert", "nn/test_stack", "test_cli_verbs", "test_params"),
    *("moe/test_replay", "train/test_guard", "nn/test_lm", "moe/test_combinations"),
)


def pytest_collection_modifyitems(items):
    """Order files by `LONGEST`; `make test` keeps this order."""
    root = pathlib.Path(__file__).parent
    rank = {name: i for i, name in enumerate(LONGEST)}

    def place(item):
        name = item.path.relative_to(root).with_suffix("").as_posix()
        return rank.get(name, len(LONGEST))

    items.sort(key=place)
