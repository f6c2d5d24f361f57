"""The NBD client: as a storage, from many threads, on both runtimes, when connections break."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import enban
import enban.aio
from enban.block.door import Door
from enban.block.gate import TRUSTED
from enban.block.runtime import BLOCKING, drive
from enban.errors import (
    FlushFailedError,
    GateError,
    HostError,
    NoSpaceError,
    PeerError,
    ReadOnlyError,
    UsageError,
)
from enban.exports import sockets
from enban.exports.nbd import ServedExport, Server
from enban.filters.faults import Call, Fault, Faults
from enban.formats.raw import RawNode
from enban.jobs.convert import convert
from enban.jobs.info import image_info
from enban.storage.memory import MemoryStorage
from enban.storage.nbd import NbdStorage, open_nbd
from enban.storage.nbd.address import from_options, from_uri
from enban.storage.nbd.link import connect
from enban.wire.nbd import RefusedError
from tests.cli.command import enban as run
from tests.cli.command import refused
from tests.exports.nbd_peer import KIB, MIB, Running, open_disk, serving
from tests.support import make_qcow2, needs, pattern, qemu_img


def uri(running: Running, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={running.path}"


def client(running: Running, **options: object) -> NbdStorage:
    return open_nbd({"filename": uri(running), **options}, BLOCKING, True)


def raw_file(folder: Path, content: bytes, name: str = "d.raw") -> Door:
    path = folder / name
    path.write_bytes(content)
    return open_disk(path, format="raw")


# -- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://host/a%20b", "nbd://host/a%20b"),
        ("nbd://host:123", "nbd://host:123/"),
        ("nbd://[::1]:5/x", "nbd://[::1]:5/x"),
        ("nbds://host/x?tls-hostname=h", "nbds://host/x"),
        ("nbd+unix:///e?socket=/tmp/s", "nbd+unix:///e?socket=/tmp/s"),
        ("nbd+unix:///?socket=/tmp/a%20b", "nbd+unix:///?socket=/tmp/a%20b"),
        ("nbd:localhost:10809:exportname=x", "nbd://localhost/x"),
        ("nbd:unix:/tmp/s:exportname=a:b", "nbd+unix:///a%3Ab?socket=/tmp/s"),
    ],
)
def test_addresses(text: str, expected: str) -> None:
    assert from_uri(text).uri == expected


@pytest.mark.parametrize(
    "text",
    [
        "nbd+unix:///e",
        "nbd://host/?socket=/x",
        "nbd+unix://host/e?socket=/x",
        "nbd+vsock://1/",
        "nbd://host:99999/",
        "nbd://host:0/",
        "nbd:host:99999",
        "nbd:host:0",
        "nbd:host:²",
        "nbd://host/?nonsense=1",
        "nbd:nothing",
    ],
)
def test_bad_addresses_say_why(text: str) -> None:
    with pytest.raises(UsageError, match="is no NBD URI"):
        from_uri(text)


def test_addresses_in_options() -> None:
    assert (
        from_options({"server": {"type": "unix", "path": "/s"}, "export": "x"}).uri
        == "nbd+unix:///x?socket=/s"
    )
    assert from_options({"host": "h", "port": "12"}).uri == "nbd://h:12/"
    with pytest.raises(UsageError, match=r"server\.path"):
        from_options({"export": "x"})
    for port in ("0", "65536", "²", "x"):
        with pytest.raises(UsageError, match="is no port"):
            from_options({"host": "h", "port": port})


def test_a_socket_path_that_is_too_long_says_so() -> None:
    with pytest.raises(PeerError, match="path too long"):
        connect(from_uri("nbd+unix:///?socket=" + "x" * 200))


def test_facts_of_an_export_are_those_qemu_img_tells(tmp_path: Path) -> None:
    """Nobody here knows how much of its medium the server uses."""
    with serving(open_disk(make_qcow2(tmp_path / "d.qcow2", MIB)), folder=tmp_path) as running:
        where = uri(running)
        (facts,) = image_info(where)
        assert facts == {"virtual-size": MIB, "filename": where, "format": "raw"}
        (tmp_path / "other").write_bytes(bytes(MIB))
        assert "disk size: unavailable" in run("info", where).out
        assert "write into it with: enban convert -n" in refused("create", where, "1M")
        assert "write into it with: enban convert -n" in refused("convert", tmp_path / "other", where)


# -- as a storage ------------------------------------------------------------------------------


def test_everything_a_storage_does(tmp_path: Path) -> None:
    with serving(raw_file(tmp_path, pattern(MIB)), folder=tmp_path) as running:
        storage = client(running)
        assert storage.size() == MIB and storage.fixed_size
        assert drive(storage.read(0, MIB)) == pattern(MIB)
        assert drive(storage.read(MIB - 10, 30)) == pattern(MIB)[-10:] + bytes(20)
        drive(storage.write(b"hello", 1001))
        drive(storage.write_zeroes(4096, 8192))
        drive(storage.write_zeroes(20000, 100, unmap=False))
        drive(storage.discard(65536, 65536))
        drive(storage.flush())
        expected = bytearray(pattern(MIB))
        expected[1001:1006] = b"hello"
        expected[4096:12288] = bytes(8192)
        expected[20000:20100] = bytes(100)
        expected[65536:131072] = bytes(65536)
        assert drive(storage.read(0, MIB)) == expected
        with pytest.raises(NoSpaceError):
            drive(storage.write(b"xx", MIB - 1))
        with pytest.raises(UsageError):
            drive(storage.truncate(5))
        drive(storage.truncate(MIB))
        drive(storage.close())


def test_pieces_larger_than_one_request(tmp_path: Path) -> None:
    data = os.urandom(70 * MIB)
    with serving(raw_file(tmp_path, bytes(80 * MIB)), folder=tmp_path) as running:
        storage = client(running)
        drive(storage.write(data, 4 * MIB + 1))
        assert drive(storage.read(4 * MIB + 1, len(data))) == data
        drive(storage.close())


def test_block_status_comes_from_the_server_and_is_not_kept_too_long(tmp_path: Path) -> None:
    with serving(open_disk(make_qcow2(tmp_path / "d.qcow2", 8 * MIB)), folder=tmp_path) as running:
        storage = client(running)
        assert drive(storage.status(0, 8 * MIB)) == (True, 8 * MIB)
        drive(storage.write(b"x" * 65536, MIB))
        assert drive(storage.status(0, 8 * MIB)) == (True, MIB)
        assert drive(storage.status(MIB, 8 * MIB)) == (False, 65536)
        assert drive(storage.status(MIB + 5, 10)) == (False, 10)
        drive(storage.write_zeroes(MIB, 65536))
        assert drive(storage.status(MIB, MIB)) == (True, MIB)
        assert drive(storage.status(9 * MIB, 5)) == (True, 5)
        drive(storage.close())


def test_read_only_and_missing_exports_are_refused_at_open(tmp_path: Path) -> None:
    door = raw_file(tmp_path, bytes(MIB))
    running = Running([ServedExport(door, "fixed", read_only=True)], tmp_path)
    try:
        with pytest.raises(ReadOnlyError, match="read-only"):
            open_nbd({"filename": uri(running, "fixed")}, BLOCKING, True)
        with pytest.raises(RefusedError, match="no such export"):
            open_nbd({"filename": uri(running, "other")}, BLOCKING, False)
        with enban.open(uri(running, "fixed"), format="raw") as disk:
            assert disk.pread(10, 5) == bytes(10)
    finally:
        running.stop()
        drive(door.close())
    with pytest.raises(HostError, match="is the server running"):
        enban.open(uri(running))


def test_errors_of_the_server_come_as_ours(tmp_path: Path) -> None:
    def decide(call: Call) -> Fault | None:
        if call.offset < 4096 or call.operation == "flush":
            return None
        return Fault(28 if call.operation == "write" else 5)

    door = Door(
        RawNode("disk", BLOCKING, Faults(MemoryStorage(BLOCKING, bytes(MIB)), decide), writable=True),
        writable=True,
    )
    with serving(door, folder=tmp_path) as running:
        storage = client(running)
        with pytest.raises(NoSpaceError):
            drive(storage.write(b"x", 8192))
        with pytest.raises(HostError, match="input/output error") as caught:
            drive(storage.read(8192, 1))
        assert caught.value.errno == 5 and caught.value.offset == 8192
        assert drive(storage.read(0, 16)) == bytes(16)  # the connection is fine
        drive(storage.close())


# -- many at once ------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, 4])
def test_many_threads_share_the_connections(tmp_path: Path, connections: int) -> None:
    size, count = 8 * MIB, 12
    with serving(raw_file(tmp_path, bytes(size)), folder=tmp_path) as running:
        storage = client(running, connections=connections)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                chance = random.Random(number)
                slot = size // count
                model = bytearray(slot)
                for _ in range(60):
                    length = chance.choice((1, 4096, 70000, 300000))
                    at = chance.randrange(slot - length)
                    if chance.random() < 0.5:
                        model[at : at + length] = chance.randbytes(length)
                        drive(storage.write(model[at : at + length], number * slot + at))
                    assert drive(storage.read(number * slot + at, length)) == model[at : at + length]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a request was lost"
        assert not failures, failures
        assert 1 <= running.server.accepted <= connections
        drive(storage.close())


def test_asyncio_has_many_in_flight(tmp_path: Path) -> None:
    content = pattern(4 * MIB)
    with serving(raw_file(tmp_path, content), folder=tmp_path) as running:

        async def scenario() -> None:
            async with await enban.aio.open(uri(running), format="raw", writable=True) as disk:
                found = await asyncio.gather(*(disk.pread(4096, n * 8192) for n in range(200)))
                assert found == [content[n * 8192 :][:4096] for n in range(200)]
                await asyncio.gather(*(disk.pwrite(bytes([n]) * 512, n * 512) for n in range(64)))
                await disk.flush()
                assert await disk.pread(64 * 512, 0) == b"".join(bytes([n]) * 512 for n in range(64))

        asyncio.run(scenario())


# -- connections that break ----------------------------------------------------------------------


class Cutter:
    """Stands between client and server, and cuts or holds back on demand."""

    def __init__(self, target: Path, path: Path) -> None:
        self.path = path
        self._target = target
        self._listener = sockets.listen_unix(str(path))
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(str(self._target))
            except OSError:
                near.close()
                continue
            self._pairs += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        pairs, self._pairs = self._pairs, []
        for end in pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()


@pytest.fixture
def cutter(tmp_path: Path) -> Iterator[Cutter]:
    with serving(raw_file(tmp_path, pattern(4 * MIB)), folder=tmp_path) as running:
        between = Cutter(running.path, tmp_path / "between")
        yield between
        between.close()


def through(cutter: Cutter, *, writable: bool = False, **options: object) -> NbdStorage:
    return open_nbd({"filename": f"nbd+unix:///?socket={cutter.path}", **options}, BLOCKING, writable)


def test_readers_do_not_notice_a_lost_connection(cutter: Cutter) -> None:
    storage = through(cutter)
    stop = threading.Event()
    content = pattern(4 * MIB)
    failures: list[BaseException] = []
    reads = [0]

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            while not stop.is_set():
                at = chance.randrange(4 * MIB - 70000)
                assert drive(storage.read(at, 70000)) == content[at : at + 70000]
                reads[0] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        time.sleep(0.15)
        cutter.cut()
    before = reads[0]
    time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a reader hangs"
    assert not failures, failures
    assert reads[0] > before and storage.losses >= 1
    drive(storage.close())


def test_a_loss_after_unflushed_writes_fails_the_flush(cutter: Cutter) -> None:
    storage = through(cutter, writable=True)
    drive(storage.write(b"safe", 0))
    drive(storage.flush())
    cutter.cut()
    drive(storage.write(b"again", 100))  # nothing was at risk: it comes back and goes on
    drive(storage.flush())
    drive(storage.write(b"at risk", 200))
    cutter.cut()
    assert drive(storage.read(200, 7)) == b"at risk"
    for _ in range(2):
        with pytest.raises(FlushFailedError, match="not flushed"):
            drive(storage.flush())
    drive(storage.close())


def test_a_server_that_stays_away_is_given_up(tmp_path: Path) -> None:
    door = raw_file(tmp_path, bytes(MIB))
    with serving(door, folder=tmp_path) as running:
        patient = client(running, **{"reconnect-delay": 1})
        hasty = client(running, **{"reconnect-delay": 0})
        assert drive(patient.read(0, 1)) == drive(hasty.read(0, 1)) == b"\0"
    for storage, least in ((hasty, 0.0), (patient, 0.5)):
        started = time.monotonic()
        with pytest.raises(PeerError, match="is the server running"):
            drive(storage.read(0, 1))
        assert least <= time.monotonic() - started < 5
        drive(storage.close())


def test_a_server_that_comes_back_changed_is_refused(tmp_path: Path) -> None:
    with serving(raw_file(tmp_path, bytes(MIB)), folder=tmp_path) as running:
        storage = client(running, **{"reconnect-delay": 1})
    with (
        serving(raw_file(tmp_path, bytes(2 * MIB), "other.raw"), folder=tmp_path),
        pytest.raises(PeerError, match="has changed"),
    ):
        drive(storage.read(0, 1))
    drive(storage.close())


def test_a_server_that_talks_nonsense_is_left(tmp_path: Path) -> None:
    path = tmp_path / "nonsense"
    listener = sockets.listen_unix(str(path))

    def talk() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.sendall(b"220 mail.example.com ESMTP ready\r\n")
                sock.close()

    threading.Thread(target=talk, daemon=True).start()
    with pytest.raises(PeerError, match="NBDMAGIC"):
        enban.open(f"nbd+unix:///?socket={path}")
    listener.close()


# -- disks over it -------------------------------------------------------------------------------


def test_a_qcow2_image_on_an_export(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "inner.qcow2", 4 * MIB)
    with path.open("r+b") as file:
        file.truncate(6 * MIB)  # room to grow into, as on a device
    with serving(open_disk(path, format="raw"), folder=tmp_path) as running:
        with enban.open(uri(running), writable=True) as disk:
            assert disk.format == "qcow2"
            disk.pwrite(pattern(MIB), 12345)
        with enban.open({"driver": "qcow2", "file": {"driver": "nbd", "path": str(running.path)}}) as disk:
            assert disk.pread(MIB, 12345) == pattern(MIB)


def test_a_backing_file_that_is_an_export(tmp_path: Path) -> None:
    with serving(raw_file(tmp_path, pattern(MIB)), folder=tmp_path) as running:
        over = make_qcow2(tmp_path / "over.qcow2", 2 * MIB, backing_file=uri(running), backing_fmt="raw")
        with pytest.raises(GateError, match="outside its own directory"):
            enban.open(over)
        with enban.open(over, writable=True, gate=TRUSTED) as disk:
            assert disk.pread(2 * MIB, 0) == pattern(MIB) + bytes(MIB)
            disk.pwrite(b"mine", 70000)
            expected = bytearray(pattern(MIB))
            expected[70000:70004] = b"mine"
            assert disk.pread(MIB, 0) == expected


def test_convert_from_an_export(tmp_path: Path) -> None:
    source = make_qcow2(tmp_path / "source.qcow2", 64 * MIB)
    with enban.open(source, writable=True) as disk:
        disk.pwrite(pattern(3 * MIB), 5 * MIB)
        disk.pwrite(pattern(MIB), 50 * MIB)
    with serving(open_disk(source), folder=tmp_path) as running:
        convert([uri(running)], str(tmp_path / "copy.qcow2"), target_format="qcow2", source_format="raw")
    with enban.open(tmp_path / "copy.qcow2") as copy, enban.open(source) as disk:
        assert copy.pread(64 * MIB, 0) == disk.pread(64 * MIB, 0)
    assert (tmp_path / "copy.qcow2").stat().st_size < 6 * MIB  # holes stayed holes


@needs("qemu-nbd", "qemu-utils")
def test_qemu_nbd_as_the_server(tmp_path: Path) -> None:
    image, path = tmp_path / "q.qcow2", tmp_path / "q.sock"
    qemu_img("create", "-q", "-f", "qcow2", image, "32M")
    words = ["qemu-nbd", "-f", "qcow2", "-k", str(path), "-t", "--discard=unmap", str(image)]
    server = subprocess.Popen(words)
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)
        storage = open_nbd({"filename": f"nbd+unix:///?socket={path}"}, BLOCKING, True)
        assert drive(storage.status(0, 32 * MIB)) == (True, 32 * MIB)
        drive(storage.write(pattern(MIB), MIB + 3))
        drive(storage.write_zeroes(MIB + 64 * KIB, 64 * KIB))
        drive(storage.flush())
        expected = bytearray(pattern(MIB))
        expected[64 * KIB - 3 : 128 * KIB - 3] = bytes(64 * KIB)
        assert drive(storage.read(MIB + 3, MIB)) == expected
        drive(storage.close())
    finally:
        server.terminate()
        server.wait(20)
    with enban.open(image) as disk:
        assert disk.pread(MIB, MIB + 3) == expected


@needs("nbdkit", "nbdkit")
def test_a_server_with_large_blocks(tmp_path: Path) -> None:
    path = tmp_path / "k.sock"
    words = ["nbdkit", "-f", "-U", str(path), "memory", "1M", "--filter=blocksize-policy"]
    words += ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    words += ["blocksize-error-policy=error"]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            if server.poll() is not None:
                assert server.stderr is not None
                pytest.skip(f"nbdkit has no blocksize-policy filter: {server.stderr.read().strip()}")
            assert time.monotonic() < deadline
            time.sleep(0.02)
        storage = open_nbd({"filename": f"nbd+unix:///?socket={path}"}, BLOCKING, True)
        model = bytearray(MIB)
        chance = random.Random(7)
        for _ in range(60):
            length = chance.choice((1, 500, 4096, 100_000))
            at = chance.randrange(MIB - length)
            model[at : at + length] = chance.randbytes(length)
            drive(storage.write(model[at : at + length], at))
            assert drive(storage.read(max(0, at - 3), length)) == model[max(0, at - 3) :][:length]
        drive(storage.write_zeroes(100, 10000))
        model[100:10100] = bytes(10000)
        assert drive(storage.read(0, MIB)) == model
        drive(storage.close())
    finally:
        server.terminate()
        server.wait(20)


@needs("openssl", "openssl")
def test_tls_both_ways(tmp_path: Path) -> None:
    from enban.storage.tls import server_context
    from tests.interop.test_nbd_server import make_certificates

    certificates = make_certificates(tmp_path / "certs")
    door = raw_file(tmp_path, pattern(MIB))
    listeners = sockets.listen_tcp("", 0)
    port = listeners[0].getsockname()[1]
    server = Server([ServedExport(door)], listeners, tls=server_context(str(certificates)))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        where = f"nbds://127.0.0.1:{port}/?tls-certificates={certificates}"
        storage = open_nbd({"filename": where}, BLOCKING, True)
        drive(storage.write(b"secret", 10))
        found: list[bytearray] = []
        threads = [
            threading.Thread(target=lambda: found.append(drive(storage.read(0, MIB)))) for _ in range(8)
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join(30)
        assert found == [pattern(10) + b"secret" + pattern(MIB)[16:]] * 8
        drive(storage.close())
        with pytest.raises(PeerError):
            open_nbd({"filename": f"nbds://127.0.0.1:{port}/"}, BLOCKING, False)  # a CA nobody knows
        with pytest.raises(PeerError, match="TLS"):
            open_nbd({"filename": f"nbd://127.0.0.1:{port}/"}, BLOCKING, False)
        with pytest.raises(PeerError):
            open_nbd({"filename": f"{where}&tls-hostname=elsewhere.example"}, BLOCKING, False)
    finally:
        server.stop()
        thread.join(30)
        drive(door.close())
