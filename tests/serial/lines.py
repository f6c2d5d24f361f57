"""What the tests of serial lines share: a bridge in a thread, and clients of every kind of transport."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from enban.serial.bridge import Bridge
from enban.serial.transports import Link, LinkEnded, Transport, parse_transport

PATIENCE_S = 20.0


def until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for something that happens in another thread."""
    deadline = monotonic() + patience_s
    while not condition():
        assert monotonic() < deadline, f"waited too long: {what}"
        sleep(0.002)


class Client:
    """One end of a line as a program uses it, through a transport of ours or a plain descriptor."""

    def __init__(self, text: str) -> None:
        self.transport: Transport = parse_transport(text)
        self.transport.open()
        self.link: Link | None = None

    def connect(self) -> Client:
        deadline = monotonic() + PATIENCE_S
        while self.link is None:
            assert monotonic() < deadline, f"{self.transport.name}: {self.transport.reason}"
            wait = self.transport.wait()
            if wait is not None:
                poll = select.poll()
                poll.register(*wait)
                poll.poll(20)
            self.link = self.transport.advance()
            if self.link is None and wait is None:
                sleep(0.005)
        return self

    @property
    def up(self) -> Link:
        assert self.link is not None
        return self.link

    def send(self, data: bytes, piece: int = 1 << 16) -> None:
        deadline = monotonic() + PATIENCE_S
        view = memoryview(data)
        while view:
            taken = self.up.write(view[:piece])
            view = view[taken:]
            if not taken:
                assert monotonic() < deadline, f"{len(view)} bytes were not taken"
                _wait(self.up.write_fd, select.POLLOUT)

    def receive(self, count: int, *, pause_s: float = 0.0, piece: int = 1 << 16) -> bytes:
        """Exactly so many bytes."""
        deadline = monotonic() + PATIENCE_S
        got = bytearray()
        while len(got) < count:
            data = self.up.read(min(piece, count - len(got)))
            got += data
            if not data:
                assert monotonic() < deadline, f"{len(got)} of {count} bytes came"
                _wait(self.up.read_fd, select.POLLIN)
            if pause_s:
                sleep(pause_s)
        return bytes(got)

    def rest(self, seconds: float = 0.1) -> bytes:
        """What comes within a time."""
        deadline = monotonic() + seconds
        got = b""
        while monotonic() < deadline:
            try:
                got += self.up.read()
            except LinkEnded:
                break
            sleep(0.005)
        return got

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None
        self.transport.close()


def _wait(fd: int, events: int) -> None:
    poll = select.poll()
    poll.register(fd, events)
    poll.poll(50)


class Ends:
    """Names of both ends of one line: what the bridge is told, and what the program at the other end uses."""

    def __init__(self, bridge: str, client: str) -> None:
        self.bridge = bridge
        self.client = client


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def ends_of(kind: str, folder: Path, name: str) -> Ends:
    path = folder / name
    if kind == "unix-listen":
        return Ends(f"unix:{path},listen", f"unix:{path}")
    if kind == "unix-connect":
        return Ends(f"unix:{path}", f"unix:{path},listen")
    if kind == "tcp-listen":
        port = free_port()
        return Ends(f"tcp:{port},listen", f"tcp:{port}")
    if kind == "tcp-connect":
        port = free_port()
        return Ends(f"tcp:127.0.0.1:{port}", f"tcp:{port},listen")
    if kind == "fifo":
        return Ends(f"fifo:{path}", f"fifo:{path},swap")
    if kind == "pty":
        return Ends(f"pty:{path}", f"tty:{path}")
    assert kind == "tty"
    return Ends(f"tty:{path}", f"pty:{path}")


KINDS = ("unix-listen", "unix-connect", "tcp-listen", "tcp-connect", "fifo", "pty", "tty")


class Running:
    """A bridge in a thread, and what it logged."""

    def __init__(self, guest: str, debuggers: Sequence[str], **options: Any) -> None:
        self.log: list[str] = []
        sides = [parse_transport(text) for text in (guest, *debuggers)]
        self.bridge = Bridge(sides[0], sides[1:], log=self.log.append, **options)
        self.bridge.open()
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.bridge.run()
        except BaseException as error:
            self.failure = error

    def logged(self, text: str) -> int:
        """In how many lines."""
        return sum(text in line for line in list(self.log))

    def expect(self, text: str, times: int = 1) -> None:
        until(lambda: self.logged(text) >= times, f"{times} times {text!r} in {self.log}")

    def expect_guest(self, times: int = 1) -> None:
        def there() -> bool:
            return sum(x.startswith("guest: ") and "is conn" in x for x in list(self.log)) >= times

        until(there, f"{times} times the guest in {self.log}")

    def stop(self) -> None:
        self.bridge.stop()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        if self.failure is not None:
            raise self.failure


@contextmanager
def bridge(guest: str, *debuggers: str, **options: Any) -> Iterator[Running]:
    running = Running(guest, debuggers, **options)
    try:
        yield running
    finally:
        running.stop()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
