"""Open connections between the processes of a job: if one fails, all of them end.

The connections made in `rendezvous.py` stay open, so that an error or the death of one
process ends all of them at once. A host that falls silent (power, network) is not
noticed here: its connection stays open, and JAX's heartbeat ends the others.
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
from typing import NoReturn

from moex import progress
from moex.config.base import ConfigError
from moex.json_files import parse_object
from moex.terminal import printable

MOST_SHOWN = 1800  # the most characters of a printed line
LINGER_S = 3.0  # seconds that a failing process waits for the others to hear of it
LIMIT = 1 << 24  # the most bytes of one message
AGAIN = "the same command on all hosts goes on from the last checkpoint"


def disagreement(ours, theirs, index: int) -> str | None:
    """Describe the first fact in which process `index` differs from process 0."""
    ours = json.loads(json.dumps(ours))  # tuples become lists, as in `theirs`
    found = _first_difference(ours, theirs, "")
    if found is None:
        return None
    path, mine, other = found
    return (
        f"all processes of a job must have the same {path}: it is {_short(mine)} on "
        f"process 0 and {_short(other)} on process {index}."
    )


def _short(value) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "nested too deep"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _first_difference(a, b, path):
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = ({str(i): v for i, v in enumerate(x)} for x in (a, b))
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return None if a == b else (path, a, b)
    for key in [*a, *(k for k in b if k not in a)]:
        name = key if key in a else _short(key).strip('"')  # the other side chose it
        inner = f"{path}.{name}" if path else name
        found = _first_difference(a.get(key), b.get(key), inner)
        if found is not None:
            return found
    return None


def send(connection: socket.socket, message: dict) -> None:
    """Send one message; it is no error if nobody is there to receive it."""
    with contextlib.suppress(OSError):  # a lost process is noticed elsewhere
        connection.sendall(json.dumps(message).encode() + b"\n")


def parse(line: bytes) -> dict | None:
    """Read a message from bytes; None if they are not one."""
    try:
        return parse_object(line, "message", nan=True)
    except ConfigError:
        return None


class Line:
    """The open connections of this process; process 0 has all, the others one to it.

    A thread listens. When a process fails or is lost, process 0 prints that once and
    all processes end; none is left waiting for it inside a collective.
    """

    def __init__(self, index: int, count: int, links: dict[int, socket.socket]):
        self.index, self.count, self.links = index, count, links
        self.facts: queue.SimpleQueue = queue.SimpleQueue()
        self.done: set[int] = set()  # processes that said that they have finished
        self.unsaid: str | None = None  # our error, which process 0 should print
        self.ending = threading.Lock()  # taken once and never released
        for link in links.values():
            link.settimeout(None)
            _keep_alive(link)
        threading.Thread(target=self._listen, daemon=True, name="moex-peers").start()

    def agree(self, facts: dict) -> None:
        """Wait for all processes to call this, and compare `facts`.

        Raises:
          ConfigError: on process 0 if they differ; the others end with it.
        """
        if self.index:
            send(self.links[0], {"facts": facts})
            self.facts.get()
            return
        for _ in range(self.count - 1):
            index, theirs = self.facts.get()
            wrong = disagreement(facts, theirs, index)
            if wrong:
                raise ConfigError(wrong)
        for link in self.links.values():
            send(link, {"ok": True})

    def leave(self) -> None:
        """Tell the others that this process has finished: its end is then no error."""
        for link in self.links.values():
            send(link, {"done": True})

    def fail(self, text: str, code: int) -> None:
        """End all processes of the job; process 0 prints why. Does not return."""
        if self.index == 0:
            self._end_all(text, code)
        self.unsaid = text
        send(self.links[0], {"error": text, "code": code})
        time.sleep(2 * LINGER_S)  # the listening thread ends this process
        self._end(text, code)

    def _end_all(self, text: str, code: int) -> None:
        """On process 0, print why, tell the others, wait a moment for them, and end."""
        self.ending.acquire()
        say(text)
        for link in self.links.values():
            send(link, {"stop": True, "code": code})
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_S
        for link in self.links.values():
            with contextlib.suppress(OSError):
                link.settimeout(max(deadline - time.monotonic(), 0.001))
                while link.recv(65536):
                    pass
        end_now(code)

    def _end(self, text: str | None, code: int) -> None:
        """End this process alone."""
        self.ending.acquire()
        if text is not None:
            say(text)
        end_now(code)

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
                    self._heard(index, parse(line))
                if len(pending[index]) > LIMIT:
                    self._heard(index, None)

    def _heard(self, index: int, message: dict | None) -> None:
        if message is None:
            self._lost(index, "it sent what is no message")
            return
        code = message.get("code")
        code = code if type(code) is int and 0 < code < 256 else 1
        if "stop" in message:
            self._end(None, code)
        elif "error" in message:
            where = f"process {index} of {self.count}: "
            self._end_all(where + str(message["error"]), code)
        elif "done" in message:
            self.done.add(index)
        else:
            self.facts.put((index, message.get("facts")))

    def _lost(self, index: int, how="its connection closed without a word") -> None:
        text = f"process {index} of {self.count} was lost ({how}); {AGAIN}"
        if self.index == 0:
            self._end_all(text, 1)
        elif self.unsaid is not None:
            self._end(self.unsaid, 1)
        else:
            self._end(text if self.index == 1 else None, 1)


def _keep_alive(link: socket.socket) -> None:
    """Turn on keep-alive packets, as firewalls drop connections that are silent."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def say(text: str, kind: str = "error") -> None:
    """Print one line of error or warning."""
    line = printable(" ".join(text.split()))
    if len(line) > MOST_SHOWN:  # for example, it may quote a long value
        line = f"{line[: MOST_SHOWN - 400]} ... {line[-300:]}"
    progress.tell(f"moex: {kind}: {line}")


def end_now(code: int) -> NoReturn:
    """End at once, as the orderly end of JAX would wait for the others."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
