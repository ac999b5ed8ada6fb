"""Two sets of cores: how they are divided, and that the threads keep to them."""

import json
import os
import subprocess
import sys

import jax
import pytest

from moex.offload import cores
from moex.serve.text import write_text
from moex.train.job import make_job
from tests import runs
from tests.helpers import built

needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores and Linux",
)


def test_halves_are_whole_cores(monkeypatch):
    monkeypatch.setattr(cores, "_first_sibling", lambda core: core % 4)
    assert cores.halves(range(8)) == ({0, 4, 1, 5}, {2, 6, 3, 7})
    assert cores.halves([0, 4, 3]) == ({0, 4}, {3})
    assert cores.halves([6, 2]) == ({2}, {6})
    assert cores.halves([3]) is None


def test_siblings_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "SIBLINGS", str(tmp_path / "{}"))
    for core, text in ((0, "0,4\n"), (4, "0,4\n"), (5, "2-5\n"), (6, "none\n")):
        (tmp_path / str(core)).write_text(text, encoding="utf-8")
    assert [cores._first_sibling(n) for n in (0, 4, 5, 6, 7)] == [0, 0, 2, 6, 7]


def refused(*args):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("sched_setaffinity", None, "does not bind threads to cores"),
        ("sched_getaffinity", lambda pid: {3}, "there is only one"),
        ("sched_setaffinity", refused, "cannot be bound to them ([Errno 1] Operation"),
    ],
)
def test_cores_that_cannot_be_divided_are_told(name, change, told, monkeypatch, capsys):
    jax.devices()  # so that nothing here starts it
    assert cores.divide() is None
    assert "JAX has started already" in capsys.readouterr().err
    started = "backends_are_initialized"
    monkeypatch.setattr(cores.xla_bridge, started, lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", refused, raising=False)
    if change is None:
        monkeypatch.delattr(os, name)
    else:
        monkeypatch.setattr(os, name, change)
    assert cores.divide() is None
    said = capsys.readouterr().err
    assert said.startswith("--offload-host: host and device take turns on the same")
    assert told in said and said.count("\n") == 1


def test_a_host_beside_an_accelerator_has_all_cores(monkeypatch, capsys):
    bound = []
    monkeypatch.setattr(cores.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cores, "_first_sibling", lambda core: core)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 6, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", None, raising=False)
    monkeypatch.setattr(cores, "bind", lambda own: bound.append(set(own)))
    assert cores.divide() == ({5, 6, 7}, {5, 6, 7})
    assert bound == [{5, 6}, {5, 6, 7}]
    assert capsys.readouterr().err == ""


WATCHED = """
import json, os, pathlib, sys, threading
from moex.offload import host, setup
from moex.offload.costs import Costs
from moex.offload.settings import Settings
from moex.serve.text import write_text

every = sorted(os.sched_getaffinity(0))
setup.profile = lambda *args: Costs(cpu_row=1.0, device=0.0, move=1.0)
used, found = set(), {}
sums = host.HostExperts.sums
def watched(self, *args):
    used.add(threading.get_native_id())
    sum_TD = sums(self, *args)
    found.clear()
    for task in pathlib.Path("/proc/self/task").iterdir():
        try:
            lines = (task / "status").read_text().splitlines()
            bound = sorted(os.sched_getaffinity(int(task.name)))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        told = dict(line.split(":", 1) for line in lines if ":" in line)
        allowed = told["Cpus_allowed_list"].strip()
        found[task.name] = [told["Name"].strip(), allowed, bound]
    return sum_TD
host.HostExperts.sums = watched
how = {"max_new_tokens": 6, "seed": 0, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
offload = Settings("1", host=True)
texts = write_text(sys.argv[1], ["the cat"], offload=offload, **how)
print(json.dumps([texts, every, found, sorted(used), os.getpid()]))
"""


@needs_two
def test_threads_of_host_and_device_keep_to_their_cores(tmp_path):
    """The first thread and XLA's on one half, those of the host on the other."""
    cfg = runs.config(tmp_path, "checkpoint.every=0", "eval.every=0")
    with runs.one_device():
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        runs.write(job, {"params": params, "state": state}, tmp_path / "run")
        how = {"max_new_tokens": 6, "seed": 0, "temperature": 0.8}
        want = write_text(tmp_path / "run", ["the cat"], top_k=0, top_p=1.0, **how)
    env = runs.environment(MOEX_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "run")]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    texts, every, found, used, first = json.loads(done.stdout.splitlines()[-1])
    assert texts == want
    divided = cores.halves(every)
    sets = {"device": sorted(divided.device), "host": sorted(divided.host)}
    assert found[str(first)][2] == sets["device"]
    assert used and all(found[str(thread)][2] == sets["host"] for thread in used)
    # Each of the two CPU devices has a pool of XLA's threads, on its own half.
    pools = {tuple(bound) for name, _, bound in found.values() if "XLAEigen" in name}
    assert pools == {tuple(own) for own in sets.values()}
    for name, text, bound in found.values():
        assert bound in sets.values(), name
        assert text == _listed(bound), name


def _listed(cores_: list[int]) -> str:
    """Cores as /proc lists them: "0-3,8"."""
    parts: list[list[int]] = []
    for core in cores_:
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
