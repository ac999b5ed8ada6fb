"""Signed lines between processes that share a secret: nobody else can write one.

A line has a proof that its writer knows the secret, and a message as JSON. Everyone who
sees it can read it. It answers one other line, so that it cannot be sent again.
"""

import contextlib
import hashlib
import hmac
import json
import re
import socket
import time

from moex.cluster import connections

LINE = re.compile(rb"[0-9a-f]{64} \{")


def seal(token: str, about: str, message: dict) -> bytes:
    """Make a line that nobody can write without the token.

    Args:
      token: the token of the job.
      about: the name of the line that it answers, so that no line can be used twice.
      message: the message.
    """
    body = json.dumps(message).encode()
    return f"{_proof(token, about, body)} ".encode() + body + b"\n"


def _proof(token: str, about: str, body: bytes) -> str:
    key = token.encode(errors="surrogateescape")
    return hmac.new(key, about.encode() + b" " + body, hashlib.sha256).hexdigest()


def unseal(token: str, about: str, line: bytes) -> dict | None:
    """The message of a sealed line; None if it was made with another token."""
    proof, _, body = line.rstrip(b"\n").partition(b" ")
    if not hmac.compare_digest(proof, _proof(token, about, body).encode()):
        return None
    return connections.parse(body)


def name_of(line: bytes) -> str:
    """The name of a sealed line; the answer to it gives this as `about`."""
    return line[:64].decode()


def receive(connection: socket.socket, timeout: float, most: int) -> bytes:
    """Read a line, or what came of it within the time and the length `most`."""
    data, deadline = b"", time.monotonic() + timeout
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < most:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = connection.recv(65536, socket.MSG_PEEK)
            if not piece:
                break
            # Read no byte after this message: the next one may have come already.
            data += connection.recv(piece.find(b"\n") + 1 or len(piece))
    return data
