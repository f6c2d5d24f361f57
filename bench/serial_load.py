"""Two programs on one serial line under one load; prints what a round trip, or a megabyte, took in seconds.

    python -m bench.serial_load WORK KIND FOLDER direct
    python -m bench.serial_load WORK KIND FOLDER cable ENBAN-COMMAND...     through the bridge at 115200 baud
    python -m bench.serial_load WORK KIND FOLDER bridge ENBAN-COMMAND...

WORK: trips (kernel-debugging requests of 56 bytes, their ACKs, answers of 184 bytes, and the ACKs of those)
or bytes (from the guest, as fast as they are taken). KIND: unix, tcp, fifo or pty, at both ends.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import tty

from enban.wire.kd import Packet, Parser, control_packet, data_packet
from enban.wire.kd import constants as k

RUN_S = 1.0
CABLE_BAUD = 115200
_REQUEST, _ANSWER = bytes(56), bytes(184)


class Line:
    """One end, as blocking descriptors."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd
        self.parser = Parser()
        self.packets: list[Packet] = []

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.write_fd, view) :]

    def packet(self) -> Packet:
        while not self.packets:
            data = os.read(self.read_fd, 65536)
            if not data:
                raise EOFError
            self.packets += [e for e in self.parser.receive(data) if isinstance(e, Packet)]
        return self.packets.pop(0)


def of_socket(sock: socket.socket) -> Line:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    fd = sock.detach()
    return Line(fd, fd)


def far_end(kind: str, where: str) -> Line:
    """The end of a program that is told where to go."""
    deadline = time.monotonic() + 20
    while True:
        try:
            if kind == "unix":
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(where)
                return of_socket(sock)
            if kind == "tcp":
                return of_socket(socket.create_connection(("127.0.0.1", int(where))))
            if kind == "fifo":
                return Line(os.open(where + ".in", os.O_RDWR), os.open(where + ".out", os.O_RDWR))
            fd = os.open(where, os.O_RDWR | os.O_NOCTTY)
            tty.setraw(fd)
            return Line(fd, fd)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Direct:
    """The other end, made by ourselves, without anything in between."""

    def __init__(self, kind: str, where: str) -> None:
        self.kind, self.where = kind, where
        if kind == "unix":
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.bind(where)
            self.sock.listen()
        elif kind == "tcp":
            self.sock = socket.create_server(("127.0.0.1", int(where)))
        elif kind == "fifo":
            os.mkfifo(where + ".in")
            os.mkfifo(where + ".out")
        else:
            self.master, slave = os.openpty()
            tty.setraw(slave)
            os.symlink(os.ttyname(slave), where)

    def line(self) -> Line:
        if self.kind in ("unix", "tcp"):
            return of_socket(self.sock.accept()[0])
        if self.kind == "fifo":
            fds = os.open(self.where + ".out", os.O_RDWR), os.open(self.where + ".in", os.O_RDWR)
            return Line(*fds)
        return Line(self.master, self.master)


def text_of(kind: str, where: str, options: str = "") -> str:
    return f"{kind}:{where}{',listen' if kind in ('unix', 'tcp') else ''}{options}"


def place(kind: str, room: str, name: str) -> str:
    if kind != "tcp":
        return os.path.join(room, name)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return str(sock.getsockname()[1])


def guest(work: str, kind: str, where: str) -> None:
    line = far_end(kind, where)
    if work == "bytes":
        # Told by one byte that somebody listens.
        os.read(line.read_fd, 1)
        while True:
            line.send(bytes(65536))
    id = k.INITIAL_ID
    while True:
        packet = line.packet()
        if not packet.is_control:
            answer = data_packet(k.MANIPULATE, id, _ANSWER)
            line.send(control_packet(k.ACK, packet.id) + answer)
            id ^= 1


def debug(work: str, line: Line) -> float:
    started = time.perf_counter()
    count = 0
    if work == "bytes":
        line.send(b"g")
        os.read(line.read_fd, 1)
        started = time.perf_counter()
        while time.perf_counter() < started + RUN_S:
            count += len(os.read(line.read_fd, 65536))
        return (time.perf_counter() - started) / count * 1e6
    id = k.INITIAL_ID
    while (now := time.perf_counter()) < started + RUN_S:
        line.send(data_packet(k.MANIPULATE, id, _REQUEST))
        while (packet := line.packet()).is_control:
            pass
        line.send(control_packet(k.ACK, packet.id))
        id ^= 1
        count += 1
    return (now - started) / count


def main(arguments: list[str]) -> int:
    work, kind, folder, through, *command = arguments
    if through == "guest":
        try:
            guest(work, kind, folder)
        except (EOFError, OSError):
            return 0
    with tempfile.TemporaryDirectory(dir=folder) as room:
        inner, outer = place(kind, room, "guest"), place(kind, room, "debugger")
        direct = Direct(kind, inner) if through == "direct" else None
        started = []
        try:
            if direct is None:
                pace = f",pace={CABLE_BAUD}" if through == "cable" else ""
                ends = [text_of(kind, inner), text_of(kind, outer, pace)]
                started.append(subprocess.Popen([*command, "serial", "bridge", "-q", *ends]))
            words = [sys.executable, "-m", "bench.serial_load", work, kind, inner, "guest"]
            started.append(subprocess.Popen(words))
            line = direct.line() if direct is not None else far_end(kind, outer)
            time.sleep(0.5)  # everybody is there
            print(debug(work, line))
        finally:
            for process in reversed(started):
                process.kill()
                process.wait(20)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
