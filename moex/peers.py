"""A line between the processes of a job: they meet before JAX starts, and tell ends.

JAX's own service answers a process that does not come, or that is lost, by ending all
others with a C++ stack trace, after its time-outs. So process 0 listens first, at the
coordinator's address: processes that cannot be reached, did not come or were told
something else are named in one line. The connections stay open, so that an error of one
process, or its death, ends all of them at once.

What this does not see is a host that falls silent (power, network): its connection
stays open, and JAX's heartbeat ends the others.
"""

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time

from moex.config import ConfigError

LINGER_S = 3.0  # for which a process that fails waits for the others to hear of it
HELLO_S = 5.0  # for which process 0 listens to one connection; others wait meanwhile
LIMIT = 1 << 24  # bytes of one message
AGAIN = "the same command on all hosts goes on from the last checkpoint"


def meet(address: str, index: int, count: int, facts: dict, timeout: float) -> "Line":
    """Wait for all processes of the job and compare what they were told.

    Args:
      address: HOST:PORT where process 0 listens.
      index: of this process, 0 <= index < count.
      count: of processes.
      facts: JSON data that must be the same on all.
      timeout: seconds to wait for the others.

    Raises:
      ConfigError: on all processes, if one does not come or was told something else.
    """
    host, port = address.rsplit(":", 1)
    if index == 0:
        return _gather(int(port), count, facts, timeout)
    hello = {"process": index, "processes": count, "facts": facts}
    deadline, reason = time.monotonic() + timeout, "no answer"
    while time.monotonic() < deadline:
        connection = None
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), 5)
            _send(connection, hello)
            reply = _receive(connection, timeout + LINGER_S + HELLO_S)
            if reply is not None and "stop" in reply:
                raise ConfigError(reply["stop"])
            if reply == {"ok": True}:
                return Line(index, count, {0: connection})
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


def _gather(port: int, count: int, facts: dict, timeout: float) -> "Line":
    """Process 0: wait for the others, answer all of them."""
    arrived: dict[int, socket.socket] = {}
    deadline, refusal, came = time.monotonic() + timeout, None, 0
    with _listen(port) as server:
        while came < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            hello = _receive(connection, HELLO_S)
            if hello is None or not _is_hello(hello):  # a scan of ports, say
                connection.close()
                continue
            came += 1
            wrong = _refusal(hello, arrived, count, facts)
            if wrong and not refusal:
                refusal, deadline = wrong, time.monotonic() + LINGER_S
                for other in arrived.values():
                    _send(other, {"stop": refusal})
            if refusal:
                _send(connection, {"stop": refusal})
                connection.close()
            else:
                arrived[hello["process"]] = connection
    missing = [i for i in range(1, count) if i not in arrived]
    if missing and not refusal:
        refusal = (
            f"{count} processes were announced and process "
            f"{', '.join(map(str, missing))} did not come within {timeout:g} s; start "
            "one process with each --process-id, with the same --num-processes and "
            "--coordinator (or raise --join-timeout)."
        )
        for other in arrived.values():
            _send(other, {"stop": refusal})
    if refusal:
        raise ConfigError(refusal)
    for other in arrived.values():
        _send(other, {"ok": True})
    return Line(0, count, arrived)


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        return socket.create_server(("", port))
    except OSError as e:
        raise ConfigError(
            f"--coordinator: process 0 cannot listen on port {port} ({e.strerror}); "
            "another program has it, or a run that has not ended yet. Choose another."
        ) from None


def _is_hello(message: dict) -> bool:
    """Whether a process of a job sent this: its keys are there, its numbers numbers."""
    if {*message} != {"process", "processes", "facts"}:
        return False
    index, count = message["process"], message["processes"]
    numbers = type(index) is type(count) is int
    return numbers and 0 <= index < count and isinstance(message["facts"], dict)


def _refusal(hello: dict, arrived, count: int, facts: dict) -> str | None:
    index = hello["process"]
    if hello["processes"] != count:
        return (
            f"the processes must be told one number of processes: process 0 was told "
            f"{count}, process {index} was told {hello['processes']}."
        )
    if index in arrived or index == 0:
        return f"two processes came as process {index}; give each its own --process-id."
    return disagreement(facts, hello["facts"], index)


def disagreement(ours, theirs, index: int) -> str | None:
    """The first fact in which process `index` differs from process 0, in words."""
    ours = json.loads(json.dumps(ours))  # as theirs came: tuples are lists
    found = _first_difference(ours, theirs, "")
    if found is None:
        return None
    path, mine, other = found
    return (
        f"all processes of a job must have the same {path}: it is {_short(mine)} on "
        f"process 0 and {_short(other)} on process {index}."
    )


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _first_difference(a, b, path):
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = ({str(i): v for i, v in enumerate(x)} for x in (a, b))
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return None if a == b else (path, a, b)
    for key in [*a, *(k for k in b if k not in a)]:
        inner = f"{path}.{key}" if path else key
        found = _first_difference(a.get(key), b.get(key), inner)
        if found is not None:
            return found
    return None


def _send(connection: socket.socket, message: dict) -> None:
    with contextlib.suppress(OSError):  # whoever is gone is missed elsewhere
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, timeout: float) -> dict | None:
    """One message; None if it does not come, or is none."""
    data, deadline = b"", time.monotonic() + timeout
    try:
        while not data.endswith(b"\n") and len(data) < LIMIT:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = connection.recv(65536, socket.MSG_PEEK)
            if not piece:
                return None
            # No byte more than this message: the next one may be there already.
            data += connection.recv(piece.find(b"\n") + 1 or len(piece))
        message = json.loads(data)
        return message if isinstance(message, dict) else None
    except (OSError, ValueError):
        return None


class Line:
    """The open connections of this process: to all others from process 0, else to it.

    A thread listens. When a process fails or is lost, process 0 says so once and all
    processes end; none is left waiting for it inside a collective.
    """

    def __init__(self, index: int, count: int, links: dict[int, socket.socket]):
        self.index, self.count, self.links = index, count, links
        self.facts: queue.SimpleQueue = queue.SimpleQueue()
        self.done: set[int] = set()  # processes that said that they are through
        self.unsaid: str | None = None  # our error, which process 0 is to say
        self.ending = threading.Lock()  # taken once and never given back
        for link in links.values():
            link.settimeout(None)
            _keep_alive(link)
        threading.Thread(target=self._listen, daemon=True, name="moex-peers").start()

    def agree(self, facts: dict) -> None:
        """Wait for all processes to come here and compare `facts`.

        Raises:
          ConfigError: on process 0 if they differ; the others end with it.
        """
        if self.index:
            _send(self.links[0], {"facts": facts})
            self.facts.get()
            return
        for _ in range(self.count - 1):
            index, theirs = self.facts.get()
            wrong = disagreement(facts, theirs, index)
            if wrong:
                raise ConfigError(wrong)
        for link in self.links.values():
            _send(link, {"ok": True})

    def leave(self) -> None:
        """Say that this process is through: the end of its connection is no loss."""
        for link in self.links.values():
            _send(link, {"done": True})

    def fail(self, text: str, code: int) -> None:
        """End all processes of the job; process 0 says why. Does not return."""
        if self.index == 0:
            self._end_all(text, code)
        self.unsaid = text
        _send(self.links[0], {"error": text, "code": code})
        time.sleep(2 * LINGER_S)  # the listening thread ends this process
        self._end(text, code)

    def _end_all(self, text: str, code: int) -> None:
        """Process 0: say why, tell the others, wait a moment for them, end."""
        self.ending.acquire()
        say(text)
        for link in self.links.values():
            _send(link, {"stop": True, "code": code})
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_S
        for link in self.links.values():
            with contextlib.suppress(OSError):
                link.settimeout(max(deadline - time.monotonic(), 0.001))
                while link.recv(65536):
                    pass
        _exit(code)

    def _end(self, text: str | None, code: int) -> None:
        """End this process alone."""
        self.ending.acquire()
        if text is not None:
            say(text)
        _exit(code)

    def _listen(self) -> None:
        selector, pending = selectors.DefaultSelector(), dict.fromkeys(self.links, b"")
        for index, link in self.links.items():
            selector.register(link, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select():
                index = key.data
                try:
                    piece = self.links[index].recv(65536)
                except OSError:
                    piece = b""
                if not piece:
                    selector.unregister(key.fileobj)
                    if index not in self.done:
                        self._lost(index)
                *lines, pending[index] = (pending[index] + piece).split(b"\n")
                for line in lines:
                    self._heard(index, json.loads(line))

    def _heard(self, index: int, message: dict) -> None:
        if "stop" in message:
            self._end(None, message["code"])
        elif "error" in message:
            where = f"process {index} of {self.count}: "
            self._end_all(where + message["error"], message["code"])
        elif "done" in message:
            self.done.add(index)
        else:
            self.facts.put((index, message.get("facts")))

    def _lost(self, index: int) -> None:
        text = (
            f"process {index} of {self.count} was lost (its connection closed without "
            f"a word); {AGAIN}"
        )
        if self.index == 0:
            self._end_all(text, 1)
        elif self.unsaid is not None:
            self._end(self.unsaid, 1)
        else:
            self._end(text if self.index == 1 else None, 1)


def _keep_alive(link: socket.socket) -> None:
    """Send something now and then: firewalls forget connections that are silent."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def say(text: str) -> None:
    """One line of error."""
    print(f"moex: error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """End at once: the orderly end of JAX would wait for the others."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
