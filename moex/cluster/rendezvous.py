"""The meeting of a job's processes before JAX starts; strangers are refused.

If a process does not come, JAX's own service ends all others with a C++ stack trace,
after its time-outs. So process 0 listens first, at the coordinator's address, and names
processes that cannot be reached, did not come or have other facts in one line.

Anybody who reaches the port may connect. A token is a secret of the job: it is never
sent, but each side proves that it knows it. A process with other facts is then surely
one of the job, and all end. Without a token it may be anybody: it alone is refused,
and process 0 goes on waiting.
"""

import contextlib
import os
import secrets
import selectors
import socket
import time

from moex.cluster import addresses, connections, signed_lines
from moex.config.base import ConfigError

BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # if set, JAX's own service listens there
HELLO_S = 5.0  # seconds in which a new connection must say who it is
HELLO_BYTES = 1 << 22  # the longest first message that we read
MOST_UNKNOWN = 64  # unknown connections at a time; a further one closes the oldest
MOST_REPORTED = 8  # addresses of strangers that we name, each in a line


def meet(
    address: str, index: int, count: int, facts: dict, timeout: float, token: str = ""
) -> connections.Line:
    """Wait for all processes of the job and compare their facts.

    Args:
      address: HOST:PORT where process 0 listens.
      index: index of this process, 0 <= index < count.
      count: number of processes.
      facts: JSON data that must be the same on all.
      timeout: seconds to wait for the others.
      token: a secret that the processes share; "": there is none.

    Raises:
      ConfigError: on all processes, if one does not come or, with a token, has other
        facts; without a token, only on the process with other facts.
    """
    if index == 0:
        host, port = addresses.split(os.environ.get(BIND) or address)
        with addresses.listen(addresses.bind_addresses(host), port) as servers:
            return _Meeting(count, facts, token, servers).run(timeout)
    host, port = addresses.split(address)
    hello = {"process": index, "processes": count, "facts": facts}
    deadline, reason = time.monotonic() + timeout, "no answer"
    while time.monotonic() < deadline:
        connection = None
        try:
            connection = socket.create_connection((host, port), 5)
            reply = _introduce(connection, hello, token, timeout)
            if reply is not None and "stop" in reply:
                raise ConfigError(str(reply["stop"]))
            if reply == {"ok": True}:
                return connections.Line(index, count, {0: connection})
            reason = "what listens there is no moex process that waits for others"
        except OSError as e:
            reason = e.strerror or str(e)
        if connection is not None:
            connection.close()
        time.sleep(0.3)
    raise ConfigError(
        f"the coordinator {address} cannot be reached from process {index}: {reason}, "
        f"after {timeout:g} s. Check that process 0 was started, that this is the "
        "address of its host, and that the port is open between the hosts."
    )


def _introduce(connection, hello: dict, token: str, timeout: float) -> dict | None:
    """Tell process 0 who we are; return its answer, None if it is not process 0.

    Raises:
      ConfigError: if one of the two has no token, or another one.
    """
    first = connections.parse(signed_lines.receive(connection, HELLO_S, HELLO_BYTES))
    number = None if first is None else first.get("moex")
    if type(number) is not str or not number.isascii():
        return None
    message = hello | {"number": secrets.token_hex(16)}  # no two hellos are equal
    line = signed_lines.seal(token, number, message)
    if len(line) > HELLO_BYTES:
        raise ConfigError(f"the config has {len(line):,} bytes of JSON; too many.")
    connection.sendall(line)
    answer = signed_lines.receive(
        connection, timeout + connections.LINGER_S + HELLO_S, HELLO_BYTES
    )
    reply = signed_lines.unseal(token, signed_lines.name_of(line), answer)
    if signed_lines.LINE.match(answer) and (reply is None or "token" in reply):
        raise ConfigError(
            "the processes of a job must have the same MOEX_JOB_TOKEN in their "
            f"environment: process {hello['process']} has "
            f"{'another one than' if token else 'none, unlike'} process 0."
        )
    return reply


class _Guest:
    """A connection that has not said who it is yet."""

    def __init__(self, connection: socket.socket, address: str):
        self.connection, self.address = connection, address
        self.number, self.data = secrets.token_hex(16), b""
        self.until = time.monotonic() + HELLO_S

    def answer(self, token: str, message: dict) -> None:
        """Answer its hello with a sealed message."""
        with contextlib.suppress(OSError):  # a lost process is noticed elsewhere
            self.connection.settimeout(HELLO_S)
            self.connection.sendall(
                signed_lines.seal(token, signed_lines.name_of(self.data), message)
            )


class _Meeting:
    """The state of process 0 while it waits for the others."""

    def __init__(self, count: int, facts: dict, token: str, servers):
        self.count, self.facts, self.token = count, facts, token
        self.guests: dict[int, _Guest] = {}  # by file descriptor; the oldest is first
        self.arrived: dict[int, _Guest] = {}  # by index of the process
        self.came = 0  # processes of the job that came, with those that were refused
        self.refusal: str | None = None  # why all processes are refused
        self.refused: str | None = None  # why the last possible stranger was refused
        self.reported: set[str] = set()
        self.selector = selectors.DefaultSelector()
        for server in servers:
            server.setblocking(False)
            self.selector.register(server, selectors.EVENT_READ, self._accept)

    def run(self, timeout: float) -> connections.Line:
        self.deadline = time.monotonic() + timeout
        with self.selector:
            while self.came < self.count - 1:
                now = time.monotonic()
                if now >= self.deadline:
                    break
                for guest in [g for g in self.guests.values() if g.until <= now]:
                    self._turn_away(guest, f"said nothing for {HELLO_S:g} s")
                for key, _ in self.selector.select(min(0.5, self.deadline - now)):
                    key.data(key.fileobj)
        for guest in self.guests.values():
            guest.connection.close()
        missing = [i for i in range(1, self.count) if i not in self.arrived]
        if missing and not self.refusal:
            self._refuse_all(self._missing(missing, timeout))
        if self.refusal:
            raise ConfigError(self.refusal)
        for guest in self.arrived.values():
            guest.answer(self.token, {"ok": True})
        links = {i: guest.connection for i, guest in self.arrived.items()}
        return connections.Line(0, self.count, links)

    def _missing(self, missing: list[int], timeout: float) -> str:
        last = f" One was refused: {self.refused}" if self.refused else ""
        return (
            f"{self.count} processes were announced and process "
            f"{', '.join(map(str, missing))} did not come within {timeout:g} s; start "
            "one process with each --process-id, with the same --num-processes and "
            f"--coordinator (or raise --join-timeout).{last}"
        )

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, address = server.accept()
        except OSError:  # it has closed already, or we have no descriptor left
            time.sleep(0.01)
            return
        if len(self.guests) >= MOST_UNKNOWN + self.count:
            self._turn_away(next(iter(self.guests.values())), "said nothing so far")
        connection.setblocking(False)
        guest = _Guest(connection, address[0].removeprefix("::ffff:"))
        self.guests[connection.fileno()] = guest
        self.selector.register(connection, selectors.EVENT_READ, self._read)
        connections.send(connection, {"moex": guest.number})

    def _read(self, connection: socket.socket) -> None:
        guest = self.guests.get(connection.fileno())
        if guest is None:  # it was turned away a moment ago
            return
        try:
            piece = connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        guest.data += piece
        if not piece:
            self._turn_away(guest, "ended without a word" if not guest.data else None)
        elif b"\n" in piece:
            self._hear(guest)
        elif len(guest.data) > HELLO_BYTES:
            self._turn_away(guest, None)

    def _turn_away(self, guest: _Guest, why: str | None) -> None:
        """Close the connection of a stranger, and report its address once."""
        self._forget(guest)
        guest.connection.close()
        self._report(guest, f"it {why or 'sent what no process of moex sends'}")

    def _report(self, guest: _Guest, text: str) -> None:
        if len(self.reported) < MOST_REPORTED and guest.address not in self.reported:
            self.reported.add(guest.address)
            connections.say(
                f"ignored at the coordinator's port: {guest.address} ({text})",
                "warning",
            )

    def _forget(self, guest: _Guest) -> None:
        self.selector.unregister(guest.connection)
        self.guests.pop(guest.connection.fileno(), None)

    def _hear(self, guest: _Guest) -> None:
        if not signed_lines.LINE.match(guest.data):
            self._turn_away(guest, None)
            return
        hello = signed_lines.unseal(self.token, guest.number, guest.data)
        if hello is None:
            guest.answer(self.token, {"token": "other"})
            self._turn_away(guest, "does not know this job's MOEX_JOB_TOKEN")
            return
        if not _is_hello(hello):
            self._turn_away(guest, None)
            return
        self._forget(guest)
        wrong = self._wrong(hello)
        if wrong and not self.token:  # it may be anybody
            guest.answer(self.token, {"stop": wrong})
            guest.connection.close()
            self.refused = wrong
            self._report(guest, f"{wrong} Still waiting for the others")
            return
        self.came += 1
        if wrong and not self.refusal:
            self._refuse_all(wrong)
            self.deadline = time.monotonic() + connections.LINGER_S
        if self.refusal:
            guest.answer(self.token, {"stop": self.refusal})
            guest.connection.close()
            return
        self.arrived[hello["process"]] = guest
        self.selector.register(guest.connection, selectors.EVENT_READ, self._left)

    def _refuse_all(self, refusal: str) -> None:
        self.refusal = refusal
        for guest in self.arrived.values():
            guest.answer(self.token, {"stop": refusal})

    def _left(self, connection: socket.socket) -> None:
        """Forget an arrived process whose connection closed; it may come again."""
        self.selector.unregister(connection)
        if self.refusal:
            return
        index = next(i for i, g in self.arrived.items() if g.connection is connection)
        guest = self.arrived.pop(index)
        connection.close()
        self.came -= 1
        connections.say(
            f"process {index} at {guest.address} came and left again; still waiting",
            "warning",
        )

    def _wrong(self, hello: dict) -> str | None:
        """The reason why this process cannot be one of the job; None if it can."""
        index, count = hello["process"], hello["processes"]
        if count != self.count:
            return (
                "the processes must be told one number of processes: process 0 was "
                f"told {self.count}, process {index} was told {count}."
            )
        if index in self.arrived or index == 0:
            return (
                f"two processes came as process {index}; give each its own "
                "--process-id."
            )
        return connections.disagreement(self.facts, hello["facts"], index)


def _is_hello(message: dict) -> bool:
    """Whether a message has the keys and types of a hello from a process of a job."""
    if {*message} != {"process", "processes", "facts", "number"}:
        return False
    index, count = message["process"], message["processes"]
    numbers = type(index) is type(count) is int and 0 <= index < count < 1 << 31
    return numbers and isinstance(message["facts"], dict)
