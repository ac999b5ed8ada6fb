"""Strangers at the coordinator's port: nothing they send ends or delays the job."""

import contextlib
import json
import os
import random
import socket
import threading
import time

import pytest

from launch.local import free_port
from moex.cluster import addresses, connections, distributed, rendezvous, signed_lines
from moex.config.base import ConfigError
from tests.marks import thorough_but_for

FACTS = {"config": {"optim": {"lr": 0.1}, "layers": [1, 2]}, "code": "abc"}
TOKENS = ["", "a secret"]


class Job:
    """Process 0 of a job waits in a thread; the others are called here."""

    def __init__(self, count=2, token="", timeout=20, facts=FACTS):
        self.port, self.token, self.count = free_port(), token, count
        self.address, self.ended = f"localhost:{self.port}", []

        def first():
            call = (self.address, 0, count, facts, timeout, token)
            with contextlib.suppress(ConfigError):
                self.ended.append(rendezvous.meet(*call))
                return
            self.ended.append(None)

        self.thread = threading.Thread(target=first, daemon=True)
        self.thread.start()

    def stranger(self, *pieces, read=False):
        """Connect, send, and hang up unless `read`; the open connection or None."""
        connection = connect(self.port)
        with contextlib.suppress(OSError):  # we are turned away meanwhile
            for piece in pieces:
                connection.sendall(piece)
        if read:
            return connection
        connection.close()
        return None

    def process(self, index=1, token=None, count=None, facts=FACTS, timeout=20):
        token = self.token if token is None else token
        call = (self.address, index, count or self.count, facts, timeout, token)
        return rendezvous.meet(*call)

    def ends_well(self):
        """The missing processes come, and all are together."""
        began = time.monotonic()
        lines: list = []
        threads = [
            threading.Thread(target=lambda i=i: lines.append(self.process(i)))
            for i in range(1, self.count)
        ]
        for thread in [*threads, self.thread]:
            if thread is not self.thread:
                thread.start()
        for thread in [*threads, self.thread]:
            thread.join(15)
            assert not thread.is_alive()
        assert len(lines) == self.count - 1
        assert isinstance(self.ended[0], connections.Line)
        return time.monotonic() - began


def connect(port):
    for _ in range(200):
        with contextlib.suppress(OSError):
            return socket.create_connection(("localhost", port), 5)
        time.sleep(0.02)
    raise AssertionError("nobody listens")


def greeting(connection):
    """The number that process 0 sends first."""
    line = signed_lines.receive(connection, 5, 10_000)
    return json.loads(line)["moex"]


def hello(**changes):
    return {"process": 1, "processes": 2, "facts": FACTS, "number": "0"} | changes


DEEP = b"[" * 100_000
LINES = {
    "nothing": (),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",),
    "TLS": (bytes.fromhex("16030100a5010000a10303") + bytes(40) + b"\n",),
    "zeros": (bytes(70_000), b"\n"),
    "deep": (DEEP, b"\n"),
    "deep object": (b'{"a":' * 100_000, b"\n"),
    "deep, sealed": (b"0" * 64 + b" {" + DEEP, b"\n"),
    "digits": (b'{"process": ' + b"9" * 100_000 + b"}\n",),
    "a list": (b"[1]\n",),
    "no UTF-8": (b'{"\xff": 1}\n',),
    "escape sequences": (b"\x1b[2J\x1b]0;owned\x07\n",),
    "an empty line": (b"\n",),
    "only a proof": (b"0" * 64 + b"\n",),
    "of an older version": (json.dumps(hello()).encode() + b"\n",),
    "another count, without a proof": (
        json.dumps(hello(processes=3)).encode() + b"\n",
    ),
    "two lines": (json.dumps(hello()).encode() + b"\n{}\n",),
    "5 MB": (b"x" * 5_000_000,),
}


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("name", LINES)
def test_what_a_stranger_sends_ends_nothing(name, token):
    job = Job(token=token)
    job.stranger(*LINES[name])
    kept = job.stranger(*LINES[name], read=True)
    assert job.ends_well() < 4
    kept.close()


SEALED = {
    "another count": {"processes": 3},
    "a huge count": {"processes": 10**300},
    "a count below the index": {"process": 5},
    "index 0": {"process": 0},
    "a negative index": {"process": -1},
    "a text": {"process": "1"},
    "true": {"process": True},
    "a fraction": {"process": 1.0},
    "other facts": {"facts": {"config": {"\x1b[2J": 1}}},
    "no facts": {"facts": None},
    "deep facts": {"facts": {"config": json.loads("[" * 900 + "]" * 900)}},
    "one more key": {"more": 1},
    "a lone surrogate": {"facts": {"\ud800": "\udfff"}},
}


@pytest.mark.parametrize("name", SEALED)
def test_without_a_token_one_who_differs_is_refused_alone(name, capfd):
    job = Job()
    with contextlib.closing(connect(job.port)) as connection:
        message = hello(**SEALED[name])
        connection.sendall(signed_lines.seal("", greeting(connection), message))
        signed_lines.receive(connection, 5, 1 << 20)  # until it has been heard
    assert job.ends_well() < 4
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("moex: warning: ignored at the coordinator's port: ")
    assert ": 127.0.0.1 (" in line or ": ::1 (" in line
    assert line.isprintable() and len(line) < 400


@pytest.mark.parametrize("name", SEALED)
def test_with_a_token_one_who_does_not_know_it_is_not_even_read(name, capfd):
    job = Job(token="a secret")
    with contextlib.closing(connect(job.port)) as connection:
        message = hello(**SEALED[name])
        connection.sendall(signed_lines.seal("a guess", greeting(connection), message))
        signed_lines.receive(connection, 5, 1 << 20)
    assert job.ends_well() < 4
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("(it does not know this job's MOEX_JOB_TOKEN)")


def test_a_line_that_was_overheard_does_not_serve_twice():
    job = Job(count=3, token="a secret")
    with contextlib.closing(connect(job.port)) as connection:
        line = signed_lines.seal("a secret", greeting(connection), hello(processes=9))
    with contextlib.closing(connect(job.port)) as connection:
        greeting(connection)
        connection.sendall(line)  # with the answer to another number
        signed_lines.receive(connection, 5, 1 << 20)
    assert job.ends_well() < 4


def test_without_a_token_the_one_who_differs_is_told_and_may_come_again(capfd):
    job = Job()
    facts = FACTS | {"config": {"optim": {"lr": 0.2}, "layers": [1, 2]}}
    with pytest.raises(ConfigError, match="same config.optim.lr: it is 0.1 on proc"):
        job.process(facts=facts)
    assert job.ends_well() < 4
    said = capfd.readouterr().err
    assert "same config.optim.lr" in said and "Still waiting for the others" in said


@pytest.mark.thorough
def test_without_a_token_the_last_that_was_refused_is_named_at_the_end():
    address = f"localhost:{free_port()}"
    other = threading.Thread(target=come_with_another_count, args=(address,))
    other.start()
    with pytest.raises(ConfigError, match="did not come .* One was refused: .*told 3"):
        rendezvous.meet(address, 0, 2, FACTS, 1)
    other.join(10)


def come_with_another_count(address):
    with contextlib.suppress(ConfigError):
        rendezvous.meet(address, 1, 3, FACTS, 5)


@pytest.mark.parametrize(("ours", "theirs"), [("a", "b"), ("a", ""), ("", "b")])
def test_a_process_with_another_token_is_told(ours, theirs, capfd):
    job = Job(token=ours)
    began = time.monotonic()
    how = "another one than" if theirs else "none, unlike"
    with pytest.raises(ConfigError, match=f"same MOEX_JOB_TOKEN .* {how} process 0"):
        job.process(token=theirs)
    assert time.monotonic() - began < 4
    assert job.ends_well() < 4
    assert "does not know this job's MOEX_JOB_TOKEN" in capfd.readouterr().err


@pytest.mark.thorough
@pytest.mark.parametrize("token", TOKENS)
def test_those_who_stay_silent_delay_nobody(token, capfd):
    job = Job(count=3, token=token)
    silent = [job.stranger(read=True) for _ in range(3 * rendezvous.MOST_UNKNOWN)]
    slow = job.stranger(b'{"process": ', read=True)
    assert job.ends_well() < 4
    for connection in [*silent, slow]:
        connection.close()
    # However many come, an address is named once.
    assert len(capfd.readouterr().err.splitlines()) <= 2


def test_who_drips_bytes_is_heard_for_a_limited_time(monkeypatch):
    monkeypatch.setattr(rendezvous, "HELLO_S", 0.5)
    job, began = Job(), time.monotonic()
    connection = connect(job.port)
    with pytest.raises(OSError):  # it is closed from there
        for _ in range(200):
            connection.sendall(b"x")
            time.sleep(0.05)
    assert time.monotonic() - began < 5
    assert job.ends_well() < 4


def test_a_process_that_left_while_others_were_awaited_may_come_again(capfd):
    job = Job(count=3, token="a secret")
    with contextlib.closing(connect(job.port)) as connection:
        message = hello(processes=3)
        connection.sendall(signed_lines.seal("a secret", greeting(connection), message))
        time.sleep(0.2)
    for _ in range(100):
        if "came and left" in (said := capfd.readouterr().err):
            break
        time.sleep(0.02)
    assert "warning: process 1 at " in said and "still waiting" in said
    assert job.ends_well() < 4


@pytest.mark.parametrize(
    "answer",
    thorough_but_for(
        [b"", b"\n", b"{}\n", DEEP + b"\n", b'{"moex": 1}\n', b'{"moex": "\\ud800"}\n']
        + [b'{"moex": "1"}\n' + b"0" * 200, b'{"moex": "1"}\n{"ok": true}\n'],
        *(b"", DEEP + b"\n", b'{"moex": "1"}\n{"ok": true}\n'),
    ),
)
def test_who_is_no_process_0_is_not_believed(answer):
    """A stranger has the port; with a token its words count for nothing."""
    with socket.create_server(("localhost", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no moex process|reset by peer"):
            rendezvous.meet(address, 1, 2, FACTS, 0.5, "a secret")
        server.shutdown(socket.SHUT_RDWR)


def test_random_bytes_end_nothing():
    rng = random.Random(0)
    job = Job(token="a secret")
    good = signed_lines.seal("", "0", hello())
    for _ in range(60):
        line = bytearray(good)
        for _ in range(rng.randrange(1, 40)):
            line[rng.randrange(len(line))] = rng.randrange(256)
        job.stranger(bytes(line[: rng.randrange(len(line) + 1)]))
    assert job.ends_well() < 6


def test_a_later_message_that_is_none_is_a_lost_process(monkeypatch):
    with socket.create_server(("localhost", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    found = []
    monkeypatch.setattr(
        connections.Line,
        "_end_all",
        lambda self, text, code: found.append((text, code)),
    )
    with ours, theirs:
        connections.Line(0, 2, {1: ours})
        for line in (DEEP, b'{"error": 5, "code": "a"}', b'{"error": "x", "code": 2}'):
            theirs.sendall(line + b"\n")
        for _ in range(200):
            if len(found) == 3:
                break
            time.sleep(0.02)
        theirs.sendall(b'{"done": true}\n')
        time.sleep(0.1)
    assert found[0][0].startswith("process 1 of 2 was lost (it sent what is no message")
    assert found[1:] == [("process 1 of 2: 5", 1), ("process 1 of 2: x", 2)]


def test_it_listens_only_where_it_is_looked_for(monkeypatch):
    def resolve(*addresses):
        found = [(0, 0, 0, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    assert addresses.bind_addresses("127.0.0.1") == ["127.0.0.1"]
    resolve("127.0.0.1")
    assert addresses.bind_addresses("localhost") == ["127.0.0.1"]
    # Debian writes a machine's own name so into /etc/hosts; others see another one.
    assert addresses.bind_addresses("node1") == []
    resolve("192.0.2.7")  # of a router that passes the port on
    assert addresses.bind_addresses("node1") == []
    monkeypatch.setattr(addresses, "_is_here", lambda address: True)
    assert addresses.bind_addresses("node1") == ["192.0.2.7"]
    monkeypatch.undo()
    for every in ("0.0.0.0", "::"):
        assert addresses.bind_addresses(every) == []


def test_another_address_of_the_machine_does_not_answer():
    job = Job()
    connect(job.port).close()
    # All of 127.0.0.0/8 is this machine on Linux.
    with pytest.raises(OSError):
        socket.create_connection(("127.9.9.9", job.port), 1)
    assert job.ends_well() < 4


@pytest.mark.parametrize(
    ("coordinator", "variable", "expected"),
    [
        ("127.0.0.1:81", None, "127.0.0.1:81"),
        ("[::1]:81", None, "[::1]:81"),
        ("no-such-host.invalid:81", None, None),
        ("127.0.0.1:81", "0.0.0.0:81", None),  # JAX reads it
    ],
)
def test_where_the_service_of_jax_listens(monkeypatch, coordinator, variable, expected):
    monkeypatch.delenv(rendezvous.BIND, raising=False)
    if variable:
        monkeypatch.setenv(rendezvous.BIND, variable)
    if "::1" in coordinator and not addresses._is_here("::1"):
        pytest.skip("no IPv6")
    assert distributed._bind_address(coordinator) == expected


def test_the_token_of_a_job():
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    slurm, by_flags = (distributed.Place(by, 2, 0, "a:1") for by in ("Slurm", "flags"))
    secret = {"MOEX_JOB_TOKEN": "0123456789abcdef\n"}
    assert distributed._token(slurm, step | secret) == "0123456789abcdef"
    assert distributed._token(slurm, step) == "7.0."
    assert distributed._token(by_flags, step) == ""
    assert distributed._token(by_flags, secret) == "0123456789abcdef"
    for token in ("", " ", "0123456789abcde"):
        with pytest.raises(ConfigError, match="MOEX_JOB_TOKEN .* at least 16, such as"):
            distributed._token(slurm, step | {"MOEX_JOB_TOKEN": token})


def test_a_token_that_is_no_text_serves_too():
    token = os.fsdecode(b"\xff\xfe")
    assert Job(token=token).ends_well() < 4
