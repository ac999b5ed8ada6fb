"""Processes that meet: who comes, what they were told, and how they end together."""

import importlib.machinery
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from unittest import mock

import jax
import pytest

from launch.local import free_port
from moex import cli
from moex.cluster import connections, distributed, rendezvous
from moex.config.base import ConfigError
from moex.config.flags import load_config
from tests.marks import thorough, thorough_but_for

ROOT = pathlib.Path(__file__).parents[2]
FACTS = {"config": {"optim": {"lr": 0.1}, "layers": [1, 2]}, "code": "abc"}


def meet_all(*calls, token="a secret"):
    """`meet(address, *call, token)` of each at once: Lines or ConfigErrors."""
    address, ended = f"localhost:{free_port()}", [None] * len(calls)

    def work(i, call):
        try:
            ended[i] = rendezvous.meet(address, *call, token)
        except ConfigError as e:
            ended[i] = e

    threads = [
        threading.Thread(target=work, args=item, daemon=True)
        for item in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return ended


def test_all_meet_and_agree():
    lines = meet_all(*((i, 3, FACTS, 20) for i in range(3)))
    assert [line.index for line in lines] == [0, 1, 2]
    others = [threading.Thread(target=line.agree, args=(FACTS,)) for line in lines[1:]]
    for thread in others:
        thread.start()
    lines[0].agree(FACTS)
    for thread in others:
        thread.join(10)
        assert not thread.is_alive()
    for line in lines:
        line.leave()  # from here on the end of a connection is no loss
    time.sleep(0.2)
    assert lines[0].done == {1, 2} and lines[1].done == lines[2].done == {0}


def changed(**config):
    return FACTS | {"config": FACTS["config"] | config}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            (1, 3, FACTS),
            "the processes must be told one number of processes: process 0 was told 2, "
            "process 1 was told 3.",
        ),
        thorough((0, 2, FACTS), None),  # both listen
        (
            (1, 2, changed(optim={"lr": 0.2})),
            "all processes of a job must have the same config.optim.lr: it is 0.1 on "
            "process 0 and 0.2 on process 1.",
        ),
        (
            (1, 2, changed(layers=[1, 3])),
            "must have the same config.layers.1: it is 2 on process 0 and 3 on",
        ),
        (
            (1, 2, changed(layers=[1])),
            r"same config.layers: it is [1, 2] on process 0 and [1] on process 1",
        ),
        ((1, 2, FACTS | {"new": 1}), "same new: it is null on process 0 and 1 on"),
    ],
)
def test_what_differs_is_said_on_both(second, message):
    began = time.monotonic()
    ended = meet_all((0, 2, FACTS, 4), (*second, 4))
    if message is None:
        assert "cannot listen on port" in "".join(map(str, ended))
        return
    assert all(isinstance(e, ConfigError) for e in ended)
    assert str(ended[0]) == str(ended[1])
    assert message in str(ended[0])
    assert time.monotonic() - began < 4 + connections.LINGER_S + 2


def test_the_same_index_twice():
    ended = meet_all((0, 3, FACTS, 10), (1, 3, FACTS, 10), (1, 3, FACTS, 10))
    for error in ended:
        assert "two processes came as process 1" in str(error)


def test_a_process_that_does_not_come_is_named():
    began = time.monotonic()
    ended = meet_all((0, 4, FACTS, 1), (2, 4, FACTS, 1))
    for error in ended:
        assert (
            "4 processes were announced and process 1, 3 did not come within 1 s"
            in (str(error))
        )
    assert time.monotonic() - began < 10


def processes(*bodies):
    """Each body in a process of its own, as process i of a line; (code, error)."""
    head = f"""
    import os, signal, sys, time
    from moex.cluster import rendezvous, connections
    index = int(sys.argv[1])
    line = rendezvous.meet("localhost:{free_port()}", index, {len(bodies)}, {{}}, 20)
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(head) + body, str(i)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for i, body in enumerate(bodies)
    ]
    try:
        errors = [process.communicate(timeout=40)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, e) for p, e in zip(started, errors, strict=True)]


WAIT = "time.sleep(30)"  # as inside a collective
AGAIN = f"; {connections.AGAIN}\n"


def test_an_error_of_one_process_ends_all_and_is_said_once():
    began = time.monotonic()
    ended = processes(WAIT, "line.fail('No space left: a.txt', 1)", WAIT)
    line = "moex: error: process 1 of 3: No space left: a.txt\n"
    assert ended == [(1, line), (1, ""), (1, "")]
    assert time.monotonic() - began < 20


def test_an_error_of_all_processes_is_said_once():
    ended = processes(*["line.fail('bad  vocabulary', 2)"] * 3)
    assert [code for code, _ in ended] == [2, 2, 2]
    (line,) = "".join(error for _, error in ended).splitlines()
    assert line.startswith("moex: error: ") and line.endswith("bad vocabulary")


@pytest.mark.parametrize("who", thorough_but_for([0, 1, 2], 1))
def test_a_lost_process_ends_the_others(who):
    bodies = [WAIT] * 3
    bodies[who] = "time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)"
    ended = processes(*bodies)
    line = (
        f"moex: error: process {who} of 3 was lost (its connection closed without a "
        f"word){AGAIN}"
    )
    said = 1 if who == 0 else 0
    expected = [(1, line if i == said else "") for i in range(3)]
    expected[who] = (-signal.SIGKILL, "")
    assert ended == expected


def test_facts_that_differ_later_end_all():
    body = "\n".join(
        (
            "try: line.agree({'data': index // 2})",
            "except connections.ConfigError as e: line.fail(str(e), 2)",
            WAIT,
        )
    )
    ended = processes(body, body, body)
    assert [code for code, _ in ended] == [2, 2, 2]
    (line,) = "".join(error for _, error in ended).splitlines()
    assert "must have the same data: it is 0 on process 0 and 1 on process 2." in line


@pytest.mark.thorough
def test_an_exception_that_nobody_expects_ends_all():
    body = (
        "from moex.cluster import distributed\n"
        "distributed.LINE, sys.excepthook = line, distributed._unexpected\n"
        "raise RuntimeError('a bug')"
    )
    (code, error), (other, traceback) = processes(WAIT, body)
    assert (code, other) == (1, 1)
    assert error == "moex: error: process 1 of 2: RuntimeError: a bug\n"
    assert traceback.startswith("Traceback") and traceback.endswith("a bug\n")


SLURM = {
    **{"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-08]"},
    **{"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
}
OPEN_MPI = {
    **{"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        (SLURM, None),  # a shell or a batch script in an allocation: no step of srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, ("Slurm", 4, 3)),
        (OPEN_MPI, ("Open MPI", 2, 1)),
        # mpirun inside a Slurm job: Slurm's variables are those of mpirun's daemons
        (OPEN_MPI | SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, ("Open MPI", 2, 1)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (GKE, ("TPU pod", 4, 2)),
        (GKE | SLICES, ("TPU pod", 8, 6)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (POD, ("Kubernetes", None, 3)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # of no indexed job
        ({"JOB_COMPLETION_INDEX": "3"}, None),
        (POD | GKE, ("TPU pod", 4, 2)),
        (POD | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),  # one host of TPUs
        (POD | OPEN_MPI, ("Open MPI", 2, 1)),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, ("environment", 2, 1)),
    ],
)
def test_detection(environ, found):
    place = distributed.detect(environ)
    assert (None if place is None else place[:3]) == found


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES = 'two' in the environment"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID = None in the environment: must"),
        (POD | {"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX = '' in the env"),
    ],
)
def test_detection_of_what_is_half_set(environ, message):
    with pytest.raises(ConfigError, match=message):
        distributed.detect(environ)


@pytest.fixture
def clean(monkeypatch):
    """No variable of any cluster is set; the monkeypatch."""
    heads = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_NUM_", "JAX_PROCESS_")
    for name in os.environ:
        more = ("JAX_COORDINATOR_", "KUBERNETES_", "JOB_COMP", "MOEX_JOB_TOKEN")
        if name.startswith((*heads, *more)):
            monkeypatch.delenv(name)
    return monkeypatch


def flags(**given):
    names = ("coordinator", "num_processes", "process_id", "distributed")
    rest = {"join_timeout": 5, "heartbeat_timeout": 10}
    return types.SimpleNamespace(**(dict.fromkeys(names) | rest | given))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        # JAX names the first host of the step, and a port made of the job's number.
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "4"},
            distributed.Place("Slurm", 4, 3, "node07:61441", [1]),
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
            | {"JAX_COORDINATOR_ADDRESS": "a:1"},
            distributed.Place("environment", 2, 1, "a:1"),
        ),
    ],
)
def test_the_place_by_the_environment(clean, environ, expected):
    for name, value in environ.items():
        clean.setenv(name, value)
    assert distributed._place(flags(), os.environ) == expected
    assert distributed._place(flags(distributed=False), os.environ) is None


def test_open_mpi_names_the_host_of_mpirun(clean):
    for name, value in OPEN_MPI.items():
        clean.setenv(name, value)
    clean.setenv("OMPI_VERSION", "4.1.6")
    place = distributed._place(flags(), os.environ)
    assert place[:3] == ("Open MPI", 2, 1)
    assert place.coordinator.startswith("10.96.0.1:")
    assert place.devices == [0]


@pytest.fixture
def kubernetes(clean):
    """A pod of a job of four, JAX's client of Kubernetes replaced; its class."""
    from jax._src.clusters import K8sCluster

    for name, value in POD.items():
        clean.setenv(name, value)
    package = types.ModuleType("kubernetes")
    package.__spec__ = importlib.machinery.ModuleSpec("kubernetes", None)
    package.config = types.SimpleNamespace(load_incluster_config=lambda: None)
    package.client = mock.MagicMock()
    clean.setitem(sys.modules, "kubernetes", package)
    for name in ("_core_api", "_batch_api", "_ApiException"):  # JAX sets them
        clean.setattr(K8sCluster, name, None, raising=False)
    meta = types.SimpleNamespace(name="train", labels={})
    job = types.SimpleNamespace(
        metadata=meta, spec=types.SimpleNamespace(parallelism=4)
    )
    pod = types.SimpleNamespace(spec=types.SimpleNamespace(subdomain="pods"))
    clean.setattr(K8sCluster, "_job", lambda: job)
    clean.setattr(K8sCluster, "_pod", lambda: pod)
    clean.setattr(K8sCluster, "_controller", lambda: mock.Mock(kind="Job"))
    clean.setattr(socket, "gethostbyname", lambda name: "10.0.0.2")
    return K8sCluster


def test_a_pod_of_an_indexed_job(kubernetes):
    expected = distributed.Place("Kubernetes", 4, 3, "train-0.pods:55527")
    assert distributed._place(flags(), os.environ) == expected
    assert distributed._place(flags(distributed=False), os.environ) is None


def test_a_pod_that_may_not_ask_is_one_line(kubernetes, monkeypatch):
    def refused():
        raise LookupError("Kubernetes API Error: 403 - Forbidden\ngrant the account")

    monkeypatch.setattr(kubernetes, "_job", refused)
    with pytest.raises(ConfigError, match="joining by Kubernetes .*Forbidden") as error:
        distributed.join(flags(), {})
    assert "\n" not in str(error.value) and "--no-distributed" in str(error.value)


def test_a_pod_without_the_package_names_the_extra(clean):
    for name, value in POD.items():
        clean.setenv(name, value)
    clean.setitem(sys.modules, "kubernetes", None)
    message = r"number 3 of an indexed job .*'moex\[k8s\]', or give --no-distributed"
    with pytest.raises(ConfigError, match=message):
        distributed.join(flags(), {})
    assert distributed._place(flags(distributed=False), os.environ) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "--coordinator, --num-processes and --process-id go"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            r"--process-id = 2: must be in \[0, --num-processes = 2\)",
        ),
        (
            {"coordinator": "a", "num_processes": 2, "process_id": 0},
            "--coordinator = 'a': must be HOST:PORT",
        ),
        (
            {"coordinator": "a:70000", "num_processes": 2, "process_id": 0},
            "--coordinator = 'a:70000': must be HOST:PORT",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 0}
            | {"distributed": True},
            "--distributed and --no-distributed are about detection",
        ),
        (
            {"distributed": True},
            r"several processes \(by --distributed\): .* not found",
        ),
    ],
)
def test_flags_that_are_wrong(clean, given, message):
    with pytest.raises(ConfigError, match=message):
        distributed.join(flags(**given), {})


def test_no_coordinator_in_the_environment(clean):
    clean.setenv("JAX_NUM_PROCESSES", "2")
    clean.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ConfigError, match="give --coordinator=HOST:PORT"):
        distributed.join(flags(), {})


def test_a_host_of_a_pod_that_joined_nobody(clean):
    clean.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match="one of 4 of a pod; run .* --distributed"):
        distributed.join(flags(), {})


def test_alone_nothing_is_joined(clean):
    one = {"coordinator": "a:1", "num_processes": 1, "process_id": 0}
    for given in ({}, one, {"distributed": False}):
        distributed.join(flags(**given), {})
    assert distributed.LINE is None
    distributed.agree({"x": 1})
    distributed.leave()
    distributed.fail("returns", 2)


def test_a_coordinator_that_cannot_be_reached(clean, capsys):
    address = f"localhost:{free_port()}"
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["train", "--config=configs/quickstart.py", "--workdir=never"]
            + [f"--coordinator={address}", "--num-processes=2", "--process-id=1"]
            + ["--join-timeout=1"]
        )
    assert stop.value.code == 2
    assert 1 <= time.monotonic() - began < 15
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"moex: error: the coordinator {address} cannot be reached from process 1: "
        "Connection refused, after 1 s. Check that process 0 was started"
    )
    assert not pathlib.Path("never").exists()


def test_another_config_is_refused_on_both_in_one_line(clean, capsys):
    address, ended = f"localhost:{free_port()}", []
    command = ["train", "--config=configs/quickstart.py", "--workdir=never"]
    args = cli.make_parser(["train"]).parse_args(["train", "--workdir=never"])
    cfg = load_config([command[1], "--config.optim.lr=0.5"])

    def first():
        try:
            rendezvous.meet(address, 0, 2, distributed.told(cfg, args), 30, "0" * 16)
        except ConfigError as e:
            ended.append(str(e))

    clean.setenv("MOEX_JOB_TOKEN", "0" * 16)
    thread = threading.Thread(target=first)
    thread.start()
    place = (f"--coordinator={address}", "--num-processes=2", "--process-id=1")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, *place])
    thread.join(10)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"moex: error: {ended[0]}\n"
    assert "must have the same config.optim.lr: it is 0.5 on process 0 and" in ended[0]
