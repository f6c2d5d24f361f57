"""Unix and TCP sockets, connecting and listening.

TCP links never wait to fill a packet (TCP_NODELAY): with Nagle's algorithm a debugger's small packets stand
still until the other side's delayed acknowledgment, and a session drops to a few exchanges a second.
A TCP listener without a host is reachable from this machine alone; nothing asks who comes.
"""

from __future__ import annotations

import errno
import os
import select
import socket

from ...errors import HostError, UsageError, from_oserror
from .base import RETRY_S, Link, Transport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BACKLOG = 16
# As small as kernels let it be: what lies in it was not paced yet.
SMALL_BUFFER = 2048
_AGAIN = (errno.EAGAIN, errno.EINPROGRESS, errno.EALREADY)


def link_of(sock: socket.socket, peer: str, *, small: bool) -> Link:
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A debugger's machine that lost power is noticed after half a minute.
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    return Link(sock.fileno(), sock.fileno(), peer, sock.close)


class Connector(Transport):
    """Connects, again and again until somebody is there, and again when the link is lost."""

    def __init__(self, name: str, addresses: list[tuple[int, Any]]) -> None:
        """addresses: (family, address) in the order to try."""
        super().__init__(name)
        self._addresses = addresses
        self._turn = 0
        self._trying: socket.socket | None = None

    def open(self) -> None:
        self.due = 0.0

    def wait(self) -> tuple[int, int] | None:
        return (self._trying.fileno(), select.POLLOUT) if self._trying else None

    def advance(self) -> Link | None:
        self.due = None
        family, address = self._addresses[self._turn % len(self._addresses)]
        if self._trying is None:
            self._trying = socket.socket(family, socket.SOCK_STREAM)
            self._trying.setblocking(False)
            failed = self._trying.connect_ex(address)
        else:
            failed = self._trying.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed in _AGAIN and family != socket.AF_UNIX:
            return None
        sock, self._trying = self._trying, None
        if failed:
            sock.close()
            self._turn += 1
            # Quickly through all addresses of a name, then a rest.
            rest = RETRY_S if self._turn % len(self._addresses) == 0 else 0.0
            self.retry(os.strerror(failed).lower(), rest)
            return None
        self.reason = ""
        return link_of(sock, self.name, small=self.small)

    def close(self) -> None:
        if self._trying is not None:
            self._trying.close()
            self._trying = None


class Listener(Transport):
    """Lets others connect."""

    many = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.sockets: list[socket.socket] = []
        self._count = 0

    def wait(self) -> tuple[int, int] | None:
        return (self.sockets[0].fileno(), select.POLLIN) if self.sockets else None

    def advance(self) -> Link | None:
        self.due = None
        try:
            sock, address = self.sockets[0].accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return None
        except OSError as error:
            self.retry(os.strerror(error.errno or errno.EIO).lower(), 1.0)
            return None
        self._count += 1
        return link_of(sock, self._peer_name(sock, address), small=self.small)

    def _peer_name(self, sock: socket.socket, address: object) -> str:
        return f"{self.name} #{self._count}"

    def lost(self) -> None:
        pass

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets = []


class UnixListener(Listener):
    """path: only this user may connect, whatever the directory allows."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        self._path = path
        self._made: tuple[int, int] | None = None

    def open(self) -> None:
        from ...exports.sockets import listen_unix

        sock = listen_unix(self._path)
        sock.setblocking(False)
        os.chmod(self._path, 0o600)
        status = os.stat(self._path)
        self._made = status.st_dev, status.st_ino
        self.sockets = [sock]

    def close(self) -> None:
        super().close()
        if self._made is not None:
            try:
                status = os.stat(self._path)
                if (status.st_dev, status.st_ino) == self._made:
                    os.unlink(self._path)
            except OSError:
                pass
            self._made = None


class TcpListener(Listener):
    """host: "" for this machine alone (127.0.0.1), "*" for all of its IPv4 and IPv6 addresses."""

    def __init__(self, name: str, host: str, port: int) -> None:
        super().__init__(name)
        self._host = host
        self._port = port

    def open(self) -> None:
        self.sockets = [self._listen()]

    def _listen(self) -> socket.socket:
        from ...exports.sockets import listen_hint

        host = self._host or "127.0.0.1"
        everywhere = host == "*"
        try:
            if everywhere:
                dual = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if dual else socket.AF_INET
                sock = socket.create_server(("", self._port), family=family, dualstack_ipv6=dual)
            else:
                family, _, _, _, address = socket.getaddrinfo(
                    host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                )[0]
                sock = socket.create_server(address, family=family)
        except socket.gaierror:
            raise UsageError(f"'{host}' is no address of this machine", path=self.name) from None
        except OverflowError:
            raise UsageError(f"{self._port} is no port", path=self.name) from None
        except OSError as error:
            what = f"listen on port {self._port}"
            raise from_oserror(error, what, self.name, hint=listen_hint(error)) from error
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return sock

    def address(self) -> str:
        """The name with the port that was picked in place of 0."""
        if not self.sockets:
            return self.name
        host, port = self.sockets[0].getsockname()[:2]
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"

    def _peer_name(self, sock: socket.socket, address: object) -> str:
        assert isinstance(address, tuple)
        host = str(address[0]).removeprefix("::ffff:")
        return f"tcp:{host}:{address[1]}"


def unix_connector(name: str, path: str) -> Connector:
    if len(os.fsencode(path)) > 107:
        raise UsageError("path is too long for a unix socket (107 bytes)", path=path)
    return Connector(name, [(socket.AF_UNIX, path)])


def tcp_connector(name: str, host: str, port: int) -> Connector:
    """Raises HostError if the name cannot be looked up."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise HostError(
            f"cannot look up '{host}': {(error.strerror or str(error)).lower()}", path=name
        ) from None
    return Connector(name, [(family, address) for family, _, _, _, address in found])
