"""How every test runs: eight small CPU devices, and JAX at its strictest.

MOEX_TEST_PLATFORM=gpu or =tpu runs on that platform instead, for `-m gpu`, `-m tpu`.
"""

import atexit
import collections
import gc
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import sysconfig
import tempfile

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

if "PYTEST_XDIST_WORKER" not in os.environ:  # or it is the folder of all workers
    # A program is compiled once in a session: by its workers and by the processes that
    # they start. Another session starts with an empty folder.
    session = tempfile.mkdtemp(prefix="moex-session-")
    atexit.register(shutil.rmtree, session, ignore_errors=True)
    os.environ["MOEX_TEST_SESSION"] = session
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(session, "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # JAX writes an entry of its cache in place; another process may read half of it,
    # says so in a warning, and compiles.
    unread = "ignore:Error reading persistent compilation cache"
    os.environ["PYTHONWARNINGS"] = unread

# As in an activated environment: commands that are printed have no path in front.
os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
os.environ["MOEX_PROGRESS"] = "0"  # a slow machine would add lines to stderr

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

if PLATFORM == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "moex", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.load_profile("moex")

# Tracing makes many small objects that live on, and the collector would walk over all
# of them again and again: about an eighth of the time of the tests.
gc.set_threshold(50_000, 50, 100)


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
def programs():
    """Programs of a file are shared by its runs and go with it: 2 GB are enough."""
    from tests import runs

    with runs.one_trace_of_equal_configs():
        yield
    jax.clear_caches()


# Seconds of each test file, from `make durations`. The files that take longest go
# first, or one worker would wait for the other at the end; a new file takes none.
DURATIONS = pathlib.Path(__file__).with_name("durations.json")


def file_of(nodeid: str) -> str:
    """The file of a test, from its node id."""
    return nodeid.partition("::")[0]


def pytest_addoption(parser):
    """One option: write what the files of this run took."""
    parser.addoption(
        "--record-durations",
        action="store_true",
        help="write the seconds of each test file to tests/durations.json",
    )


def pytest_collection_modifyitems(items):
    """Order files by `DURATIONS`; `make test` keeps this order."""
    seconds = json.loads(DURATIONS.read_text(encoding="utf-8"))
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), 0))


def pytest_collection_finish():
    """Keep what was imported and collected out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    """Write `DURATIONS` if that was asked for."""
    if not config.getoption("--record-durations"):
        return
    seconds = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[file_of(report.nodeid)] += report.duration
    known = {name: round(s) for name, s in sorted(seconds.items()) if round(s) > 0}
    DURATIONS.write_text(json.dumps(known, indent=0) + "\n", encoding="utf-8")
