"""Where a server listens: a unix socket, a TCP port, or what systemd hands over.

A unix socket that nobody answers on is left over from a server that died, and replaced.
"""

from __future__ import annotations

import os
import socket

from ..errors import UsageError, from_oserror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BACKLOG = 128
_FIRST_PASSED_FD = 3  # by the protocol of sd_listen_fds(3)


def listen_unix(path: str, *, mode: int | None = None) -> socket.socket:
    """Listen on a unix socket; HostError if a server is there already. mode: its permissions, set before
    anybody can connect; the umask's if None. Raises HostError, UsageError for a path that is too long."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        try:
            sock.bind(path)
        except OSError:
            if not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        if mode is not None:
            os.chmod(path, mode)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if "too long" in str(error):
            raise UsageError("path is too long for a unix socket", path=path) from None
        raise from_oserror(error, "listen", path, hint=listen_hint(error)) from error
    return sock


def listen_hint(error: OSError) -> str:
    """What to do about an address that cannot be listened on."""
    import errno

    hints = {
        errno.EADDRINUSE: "is another server using it?",
        errno.EADDRNOTAVAIL: "give an address of this machine, or * for all",
        errno.EACCES: "take a path or a port that this user may have",
        errno.ENOENT: "make the folder first",
    }
    return hints.get(error.errno or 0, "")


def _is_stale(path: str) -> bool:
    import stat

    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def listen_tcp(host: str, port: int) -> list[socket.socket]:
    """Listen on a TCP port (0: any) of a host; "" is this machine alone, "*" all of its addresses."""
    names = ["127.0.0.1", "::1"] if not host else ["0.0.0.0", "::"] if host == "*" else [host]
    found: list[socket.socket] = []
    failure: OSError | None = None
    for name in names:
        try:
            addresses = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            failure = failure or error
            continue
        for family, kind, protocol, _, address in addresses:
            try:
                found.append(_listen(family, kind, protocol, address))
            except OSError as error:
                failure = failure or error
                continue
            if not port:  # the other addresses listen on the port that was picked
                port = found[-1].getsockname()[1]
    if not found:
        assert failure is not None
        if isinstance(failure, socket.gaierror):
            raise UsageError(f"'{host}' is no address of this machine: {failure.strerror}")
        raise from_oserror(failure, f"listen on port {port}", host, hint=listen_hint(failure))
    return found


def _listen(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def passed_sockets() -> list[socket.socket]:
    """The listening sockets systemd started this process with (sd_listen_fds(3)); none if it did not.

    The variables that say so are removed, so that no child takes them for its own.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = []
    for fd in range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            if sock.type != socket.SOCK_STREAM or not sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_ACCEPTCONN
            ):
                raise UsageError(f"descriptor {fd} that systemd passed is not a listening stream socket")
        except OSError as error:
            raise from_oserror(error, f"use descriptor {fd} that systemd passed") from error
        found.append(sock)
    return found


def tune(sock: socket.socket) -> None:
    """What a connection needs to be fast, and to notice a peer that is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # the host cuts it to what it allows
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
