"""wire.nbd against programs nobody here wrote: the server qemu-nbd; nbdinfo, nbdcopy, qemu-img as clients."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from enban.wire.nbd import (
    ClientHandshake,
    ClientTransmission,
    Negotiator,
    ProtocolError,
    RefusedError,
    ServerHandshake,
    ServerTransmission,
)
from enban.wire.nbd import constants as c
from enban.wire.nbd.handshake_client import Acknowledged, ContextListed, ExportListed
from enban.wire.nbd.negotiator import READY
from enban.wire.nbd.replies import Transaction
from enban.wire.nbd.server import Disconnect
from tests.wire.nbd_helpers import ALL_FLAGS, CONTEXTS, STYLES, Disk, Outcome, answer_question, collect

pytestmark = pytest.mark.interop

KIB = 1 << 10
MIB = 1 << 20
HOLE_STATE = c.STATE_HOLE | c.STATE_ZERO


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        package = {"qemu-nbd": "qemu-utils", "qemu-img": "qemu-utils"}.get(name, "libnbd-bin")
        pytest.skip(f"{name} is not installed (Debian package {package})")
    return path


# ---- our client, qemu-nbd the server ----


class Connection:
    """The client machines over a blocking socket."""

    def __init__(
        self, path: Path, export: str = "", *, style: int = c.EXTENDED, contexts: tuple[str, ...] = ()
    ) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.handshake = ClientHandshake()
        negotiator = Negotiator(self.handshake, export, style=style, contexts=contexts)
        while negotiator.advance() != READY:
            self.socket.sendall(self.handshake.to_send())
            data = self.socket.recv(65536)
            if not data:
                self.handshake.end_of_stream()
            self.handshake.receive(data)
        assert self.handshake.session is not None
        self.session = self.handshake.session
        self.machine = ClientTransmission(self.session, self.handshake.leftover())

    def ask(
        self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> Outcome:
        """One request, its answer; asserts that it worked."""
        transaction = self.machine.request(kind, offset, length, flags)
        self.socket.sendall(transaction.header + payload)
        outcomes: dict[Transaction, Outcome] = {transaction: Outcome()}
        while not transaction.done:
            collect(self.machine, self.socket.recv(1 << 16), outcomes)
        assert transaction.error == 0, transaction.message
        return outcomes[transaction]

    def close(self) -> None:
        self.socket.sendall(self.machine.disconnect())
        assert self.socket.recv(1) == b""
        self.machine.end_of_stream()
        self.socket.close()


@pytest.fixture
def qemu_nbd(tmp_path: Path) -> Iterator[Path]:
    """A raw file of 8 MiB, data in its second MiB, served by qemu-nbd on `socket` beside it."""
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(MIB)
        file.write(os.urandom(MIB))
    command = [
        program("qemu-nbd"),
        "-f",
        "raw",
        "-k",
        str(tmp_path / "socket"),
        "-x",
        "disk",
        "-D",
        "the disk",
    ]
    server = subprocess.Popen([*command, "--persistent", "--shared=4", "--discard=unmap", str(image)])
    yield image
    server.terminate()
    server.wait(20)


@pytest.mark.parametrize("style", STYLES)
def test_qemu_nbd_does_everything(qemu_nbd: Path, style: int) -> None:
    connection = Connection(qemu_nbd.parent / "socket", "disk", style=style, contexts=(c.BASE_ALLOCATION,))
    session = connection.session
    # QEMU learned extended headers in 8.2; an older one must make us fall back.
    assert session.style in ((style,) if style < c.EXTENDED else (c.STRUCTURED, c.EXTENDED))
    assert session.export.size == 8 * MIB
    assert session.export.description == "the disk"
    assert session.max_payload == 32 * MIB
    flush_and_fua = c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES
    assert session.export.flags & flush_and_fua == flush_and_fua

    before = qemu_nbd.read_bytes()
    assert connection.ask(c.CMD_READ, 0, 8 * MIB).data == before
    assert connection.ask(c.CMD_READ, MIB - 512, 1024).data == before[MIB - 512 : MIB + 512]

    if style:
        assert list(session.contexts.values()) == [c.BASE_ALLOCATION]
        (extents,) = connection.ask(c.CMD_BLOCK_STATUS, 0, 8 * MIB).status.values()
        assert extents == [(MIB, HOLE_STATE), (MIB, 0), (6 * MIB, HOLE_STATE)]
        (extents,) = connection.ask(c.CMD_BLOCK_STATUS, 0, 8 * MIB, c.CMD_FLAG_REQ_ONE).status.values()
        assert extents == [(MIB, HOLE_STATE)]
        assert connection.ask(c.CMD_READ, MIB, 64 * KIB, c.CMD_FLAG_DF).data == before[MIB:][: 64 * KIB]
    else:
        assert session.contexts == {}

    data = os.urandom(300 * KIB)
    connection.ask(c.CMD_WRITE, 4 * MIB + 100, len(data), c.CMD_FLAG_FUA, data)
    connection.ask(c.CMD_TRIM, MIB, 512 * KIB)
    connection.ask(c.CMD_WRITE_ZEROES, MIB + 512 * KIB, 256 * KIB, c.CMD_FLAG_NO_HOLE)
    connection.ask(c.CMD_WRITE_ZEROES, MIB + 768 * KIB, 64 * KIB)
    connection.ask(c.CMD_CACHE, 0, MIB)
    connection.ask(c.CMD_FLUSH)
    after = qemu_nbd.read_bytes()
    assert after[4 * MIB + 100 :][: len(data)] == data
    assert not any(after[MIB : MIB + 832 * KIB])
    assert after[MIB + 832 * KIB : 2 * MIB] == before[MIB + 832 * KIB : 2 * MIB]
    connection.close()


def test_qemu_nbd_answers_many_in_flight(qemu_nbd: Path) -> None:
    connection = Connection(qemu_nbd.parent / "socket", "disk")
    want = [connection.machine.request(c.CMD_READ, i * 64 * KIB, 64 * KIB) for i in range(32)]
    connection.socket.sendall(b"".join(transaction.header for transaction in want))
    outcomes: dict[Transaction, Outcome] = {}
    while connection.machine.in_flight:
        collect(connection.machine, connection.socket.recv(50_000), outcomes)
    before = qemu_nbd.read_bytes()
    assert all(outcomes[t].data == before[t.offset :][: 64 * KIB] for t in want)
    connection.close()


def test_qemu_nbd_lists_and_refuses(qemu_nbd: Path) -> None:
    connection = Connection(qemu_nbd.parent / "socket", "disk")
    connection.close()
    with pytest.raises(RefusedError, match="no such export"):
        Connection(qemu_nbd.parent / "socket", "nothing")
    # Single options, by hand.
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(qemu_nbd.parent / "socket"))
    hs = ClientHandshake()
    heard: list[object] = []

    def turn() -> None:
        sock.sendall(hs.to_send())
        while not (heard and isinstance(heard[-1], Acknowledged)):
            hs.receive(sock.recv(4096))
            while (event := hs.next_event()) is not None:
                heard.append(event)

    hs.receive(sock.recv(18))
    assert hs.next_event() is not None
    for ask in (hs.list_exports, hs.request_structured, lambda: hs.list_contexts("disk"), hs.abort):
        ask()
        turn()
        if isinstance(heard[0], ExportListed):
            assert (heard[0].name, heard[0].description) == ("disk", "the disk")
        if isinstance(heard[0], ContextListed):
            assert heard[0].name == c.BASE_ALLOCATION
        heard.clear()
    assert hs.state == "closed"
    sock.close()


# ---- our server, foreign clients ----


class Server:
    """The server machines over sockets, a thread a connection, one disk in memory."""

    def __init__(self, path: Path, disk: Disk, style: int) -> None:
        self.disk, self.style = disk, style
        self.problems: list[BaseException] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(16)
        self.threads = [threading.Thread(target=self.accept, daemon=True)]
        self.threads[0].start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self.serve, args=(connection,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self.talk(connection)
        except (ProtocolError, AssertionError) as problem:
            self.problems.append(problem)
        except OSError:
            pass  # clients may leave in any way they like

    def talk(self, connection: socket.socket) -> None:
        hs = ServerHandshake(style=self.style)
        while hs.session is None:
            event = hs.next_event()
            answer_question(hs, event, self.disk)
            connection.sendall(hs.to_send())
            if hs.state == "closed":
                return
            if event is None and hs.session is None:
                data = connection.recv(4096)
                if not data:
                    return
                hs.receive(data)
        machine = ServerTransmission(hs.session, hs.leftover())
        while True:
            request = machine.next_event()
            if isinstance(request, Disconnect):
                return
            if request is not None:
                connection.sendall(self.disk.answer(machine, request))
                continue
            data = connection.recv(1 << 18)
            if not data:
                machine.end_of_stream()
                return
            machine.receive(data)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self.threads)
        assert not self.problems


@pytest.fixture(params=STYLES, ids=["simple", "structured", "extended"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    disk = Disk(4 * MIB, ALL_FLAGS & ~c.FLAG_SEND_RESIZE)
    disk.data[MIB : 2 * MIB] = os.urandom(MIB)
    server = Server(tmp_path / "socket", disk, request.param)
    yield server
    server.close()


def uri(tmp_path: Path, export: str = "disk") -> str:
    return f"nbd+unix:///{export}?socket={tmp_path / 'socket'}"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def test_nbdinfo_describes_the_export(server: Server, tmp_path: Path) -> None:
    told = json.loads(run(program("nbdinfo"), "--json", uri(tmp_path)))
    assert told["protocol"] == "newstyle-fixed" and not told["TLS"]
    # libnbd learned extended headers in 1.18.
    assert told["structured"] == (server.style > c.SIMPLE)
    (export,) = told["exports"]
    assert export["export-size"] == 4 * MIB
    assert export["description"] == "a disk in memory"
    assert export.get("contexts", []) == ([name for _, name in CONTEXTS] if server.style else [])
    for word in ("cache", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export["can_" + word] is True
    assert export["can_df"] == (server.style > c.SIMPLE) and export["is_read_only"] is False
    assert (export["block_size_minimum"], export["block_size_maximum"]) == (1, 32 * MIB)


def test_nbdinfo_lists_the_exports(server: Server, tmp_path: Path) -> None:
    told = json.loads(run(program("nbdinfo"), "--list", "--json", uri(tmp_path, "")))
    (export,) = told["exports"]
    assert (export["export-name"], export["export-size"]) == ("disk", 4 * MIB)


def test_nbdinfo_maps_the_export(server: Server, tmp_path: Path) -> None:
    if server.style == c.SIMPLE:
        failed = subprocess.run(
            [program("nbdinfo"), "--map", uri(tmp_path)], capture_output=True, timeout=60, check=False
        )
        assert failed.returncode != 0
        return
    told = json.loads(run(program("nbdinfo"), "--map", "--json", uri(tmp_path)))
    assert [(entry["offset"], entry["length"], entry["type"]) for entry in told] == [
        (0, MIB, HOLE_STATE),
        (MIB, MIB, 0),
        (2 * MIB, 2 * MIB, HOLE_STATE),
    ]


def test_nbdinfo_is_told_about_unknown_exports(server: Server, tmp_path: Path) -> None:
    failed = subprocess.run(
        [program("nbdinfo"), uri(tmp_path, "nothing")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert failed.returncode != 0 and "No such file or directory for export: nothing" in failed.stderr


def test_nbdcopy_out_and_in(server: Server, tmp_path: Path) -> None:
    nbdcopy = program("nbdcopy")
    out = tmp_path / "out.raw"
    run(nbdcopy, uri(tmp_path), str(out))
    assert out.read_bytes() == server.disk.data
    source = tmp_path / "source.raw"
    with source.open("wb") as file:
        file.write(os.urandom(MIB // 2))
        file.seek(3 * MIB)
        file.write(os.urandom(MIB))
    run(nbdcopy, "--flush", str(source), uri(tmp_path))
    assert server.disk.data == source.read_bytes()
    assert server.disk.flushes


def test_qemu_img_reads_and_writes(server: Server, tmp_path: Path) -> None:
    qemu_img = program("qemu-img")
    out = tmp_path / "out.raw"
    run(qemu_img, "convert", "-f", "raw", "-O", "raw", uri(tmp_path), str(out))
    assert out.read_bytes() == server.disk.data
    with out.open("r+b") as file:
        file.write(os.urandom(MIB))
    run(qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", str(out), uri(tmp_path))
    assert server.disk.data == out.read_bytes()
    run(qemu_img, "compare", "-f", "raw", "-F", "raw", str(out), uri(tmp_path))
