"""Byte streams for the KD target simulator: a socket, two file descriptors, or whoever connects.

`read` waits at most so long and gives b"" if nothing came; a stream that ended raises EOFError.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Protocol


class Stream(Protocol):
    def read(self, timeout_s: float) -> bytes: ...
    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class SocketStream:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def read(self, timeout_s: float) -> bytes:
        try:
            if not select.select([self.sock], [], [], timeout_s)[0]:
                return b""
            data = self.sock.recv(65536)
        except (OSError, ValueError) as error:
            raise EOFError from error
        if not data:
            raise EOFError
        return data

    def write(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise EOFError from error

    def close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()


class FdStream:
    """A tty, a pty, or a pair of FIFOs."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd

    def read(self, timeout_s: float) -> bytes:
        try:
            if not select.select([self.read_fd], [], [], timeout_s)[0]:
                return b""
            data = os.read(self.read_fd, 65536)
        except OSError as error:  # a pty whose other end closed
            raise EOFError from error
        if not data:
            raise EOFError
        return data

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                if select.select([], [self.write_fd], [], 5)[1]:
                    view = view[os.write(self.write_fd, view) :]
            except OSError as error:
                raise EOFError from error

    def close(self) -> None:
        for fd in {self.read_fd, self.write_fd}:
            os.close(fd)


class ListeningStream:
    """Whoever connects to a socket; while nobody does, what is written is lost (as with QEMU's
    server=on,wait=off). Who comes later replaces who was there."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.peer: SocketStream | None = None
        self.closed = False

    def read(self, timeout_s: float) -> bytes:
        if self.closed:
            raise EOFError
        sockets = [self.listener] + ([self.peer.sock] if self.peer else [])
        try:
            ready = select.select(sockets, [], [], timeout_s)[0]
        except (OSError, ValueError) as error:
            raise EOFError from error
        if self.listener in ready:
            try:
                sock = self.listener.accept()[0]
            except OSError as error:
                raise EOFError from error
            self._forget()
            self.peer = SocketStream(sock)
        elif ready and self.peer is not None:
            try:
                return self.peer.read(0)
            except EOFError:
                self._forget()
        return b""

    def write(self, data: bytes) -> None:
        if self.closed:
            raise EOFError
        if self.peer is not None:
            try:
                self.peer.write(data)
            except EOFError:
                self._forget()

    def _forget(self) -> None:
        if self.peer is not None:
            self.peer.close()
        self.peer = None

    def close(self) -> None:
        self.closed = True
        self._forget()
        self.listener.close()


def listen_unix(path: str) -> ListeningStream:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return ListeningStream(listener)


def listen_tcp(*, nodelay: bool = True) -> tuple[ListeningStream, int]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)  # inherited by who is accepted
    return ListeningStream(listener), listener.getsockname()[1]
