"""The addresses where process 0 listens: if possible, only those the others use."""

import contextlib
import ipaddress
import socket
from typing import Any

from moex.config.base import ConfigError


def split(address: str) -> tuple[str, int]:
    """Split HOST:PORT or [HOST]:PORT into host and port."""
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def bind_addresses(host: str) -> list[str]:
    """The IP addresses of this machine where others look for `host`; []: unknown.

    They are unknown if a name leads to the loopback here, as on Debian: elsewhere it
    leads to another address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    here = [address for address in addresses if _is_here(address)]
    if is_loopback(host):
        return here
    inner = any(is_loopback(address) for address in addresses)
    return [] if inner or here != addresses else addresses


def is_loopback(host: str) -> bool:
    """Whether an address or name leads to the machine itself, on every machine."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _is_here(address: str) -> bool:
    """Whether `address` is one of this machine, and not the wildcard for all."""
    if address in ("::", "0.0.0.0"):
        return False
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, 0), family=family):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def listen(addresses: list[str], port: int):
    """Yield sockets that listen at these addresses, or at all of this machine."""
    with contextlib.ExitStack() as stack:
        servers = []
        for address in addresses or [""]:
            options: dict[str, Any] = {}
            if not address and socket.has_dualstack_ipv6():
                options = {"family": socket.AF_INET6, "dualstack_ipv6": True}
            elif ":" in address:
                options = {"family": socket.AF_INET6}
            try:
                server = socket.create_server((address, port), **options)
            except OSError as e:
                raise ConfigError(
                    f"--coordinator: process 0 cannot listen on port {port} "
                    f"({e.strerror}); another program has it, or a run that has not "
                    "ended yet. Choose another."
                ) from None
            servers.append(stack.enter_context(server))
        yield servers
