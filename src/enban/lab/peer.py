"""The crash explorer on somebody else's driver: QEMU's qcow2, side by side with ours.

qemu-storage-daemon serves an image over NBD, with its write-log driver (blklogwrites) between its
qcow2 driver and the file. Our client sends a workload, one request after the other, so that each
answer has a place in the log. The log is then cut into crash states as our own recordings are, and
the same independent reader judges them. The same workload goes to our engine.

Log format (little-endian, the one of Linux's dm-log-writes): sector 0 is {u64 magic, u64 version,
u64 entries, u32 sector size}; each entry is a header sector {u64 sector, u64 sectors, u64 flags,
u64 data length} and, but for a discard, its data.
"""

from __future__ import annotations

import json
import shutil
import socket as socket_module
import struct
import subprocess
import tempfile
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

from enban.block.runtime import BLOCKING, drive
from enban.errors import EnbanError, UsageError
from enban.filters import writelog
from enban.filters.writelog import Entry
from enban.storage.nbd.client import NbdStorage, open_nbd

from .crash import Explorer, Recording, Tally, record
from .images import KIB, Image
from .oracle import ENGINE, Oracle, Violation
from .workload import Operation, operations

if TYPE_CHECKING:
    from .campaign import Screen

KINDS = (
    Image("v3, 4 KiB clusters", 256 * KIB, cluster_size=4096, packs=0),
    Image("v3, 64 KiB clusters", 1024 * KIB, packs=0),
    Image("v2, 4 KiB clusters", 256 * KIB, cluster_size=4096, compat="0.10", packs=0),
    Image("lazy refcounts", 256 * KIB, cluster_size=4096, lazy_refcounts=True, packs=0),
    Image("subclusters", 512 * KIB, cluster_size=16384, extended_l2=True, packs=0),
    Image("live snapshots", 256 * KIB, cluster_size=4096, snapshots=True, packs=0),
)
OPERATIONS = 250
PROGRAM = "qemu-storage-daemon"

_MAGIC = 0x6A736677736872
_SECTOR = 512
_FLUSH, _DISCARD = 1, 4
_HEADER = struct.Struct("<QQQQ")
START_S = 20.0


class Row:
    """One line of the table."""

    def __init__(self, image: str, driver: str, tally: Tally, flushes: int, asked: int) -> None:
        self.image = image
        self.driver = driver
        self.ours = driver == "enban"
        self.tally = tally
        self.flushes = flushes
        self.asked = asked

    @property
    def broken(self) -> int:
        return self.tally.corrupt + self.tally.lost + self.tally.foreign

    def as_dict(self) -> dict[str, object]:
        return {
            "image": self.image,
            "driver": self.driver,
            **self.tally.as_dict(),
            "storage-flushes": self.flushes,
            "guest-flushes": self.asked,
        }


class Log:
    """The write log, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._at = _SECTOR

    def read(self) -> None:
        """Take what has been added."""
        with open(self.path, "rb") as file:
            file.seek(0)
            start = file.read(28)
            if len(start) == 28:
                magic, version, _, sector = struct.unpack("<QQQI", start)
                if (magic, version, sector) != (_MAGIC, 1, _SECTOR):
                    raise UsageError(f"{self.path}: not a write log of 512-byte sectors")
            while True:
                file.seek(self._at)
                header = file.read(_SECTOR)
                if len(header) < _SECTOR:
                    return
                place, sectors, flags, _ = _HEADER.unpack_from(header)
                if not sectors and not flags & _FLUSH:
                    return  # space that is not written yet
                self._take(place * _SECTOR, sectors * _SECTOR, flags, file.read(sectors * _SECTOR))
                has_data = not flags & _DISCARD
                self._at += _SECTOR + (sectors * _SECTOR if has_data else 0)

    def _take(self, offset: int, length: int, flags: int, data: bytes) -> None:
        if flags & _FLUSH:
            self._add(writelog.FLUSH, 0, 0, b"")
        if flags & _DISCARD:
            self._add(writelog.DISCARD, offset, length, b"")
        elif length:
            self._add(writelog.WRITE, offset, length, data.ljust(length, b"\0"))

    def _add(self, kind: str, offset: int, length: int, data: bytes) -> None:
        entry = Entry(kind, 2 * len(self.entries) + 1, offset, length, data=data)
        entry.ended = entry.began + 1
        self.entries.append(entry)

    def mark(self, note: object) -> None:
        entry = Entry(writelog.MARK, 2 * len(self.entries) + 1)
        entry.note = note
        entry.ended = entry.began
        self.entries.append(entry)


def record_qemu(image: Image, script: list[Operation]) -> Recording:
    """Do a workload through QEMU's driver. Raises UsageError if the program is missing, Violation."""
    if shutil.which(PROGRAM) is None:
        raise UsageError(
            f"{PROGRAM} is missing", hint="install QEMU (Debian: qemu-system-common or qemu-utils)"
        )
    directory = Path(tempfile.mkdtemp(prefix="enban-peer-"))
    start = bytes(image.empty())
    (directory / "image").write_bytes(start)
    (directory / "log").touch()
    socket = directory / "socket"
    process = subprocess.Popen(
        [
            PROGRAM,
            "--blockdev",
            f"driver=file,node-name=file,filename={directory / 'image'},discard=unmap",
            "--blockdev",
            f"driver=file,node-name=log,filename={directory / 'log'}",
            "--blockdev",
            "driver=blklogwrites,node-name=writes,file=file,log=log,log-sector-size=512,discard=unmap",
            "--blockdev",
            "driver=qcow2,node-name=disk,file=writes,discard=unmap",
            "--nbd-server",
            f"addr.type=unix,addr.path={socket}",
            "--export",
            "type=nbd,id=export,node-name=disk,writable=on,name=",
            "--chardev",
            f"socket,id=monitor,path={directory / 'monitor'},server=on,wait=off",
            "--monitor",
            "chardev=monitor",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    log = Log(directory / "log")
    try:
        storage = _connect(process, socket)
        monitor = Monitor(directory / "monitor")
        oracle = Oracle(image.shown())
        for operation in script:
            log.read()
            log.mark(("begin", operation))
            oracle.begin(operation)
            if operation.kind in ("snapshot", "delete"):
                monitor.snapshot(operation)
            else:
                _perform(storage, operation)
            log.read()
            if operation.kind == "discard":
                oracle.observe(operation, bytes(drive(storage.read(0, image.size))), what=str(operation))
            else:
                oracle.done(operation)
            if operation.kind in ("discard", "snapshot", "delete"):
                # Of a snapshot QEMU does not say that it makes anything durable.
                operation = Operation("seen", content=bytes(oracle.model))
            log.mark(("end", operation))
        drive(storage.close())
        monitor.close()
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(directory, ignore_errors=True)
    return Recording(image, start, image.shown(), log.entries)


def _connect(process: subprocess.Popen[bytes], socket: Path) -> NbdStorage:
    deadline = monotonic() + START_S
    while True:
        try:
            return open_nbd(
                {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}, "connections": "1"},
                BLOCKING,
                True,
            )
        except EnbanError as error:
            if process.poll() is not None:
                _, said = process.communicate()
                raise UsageError(f"{PROGRAM} ended: {said.decode(errors='replace').strip()}") from None
            if monotonic() > deadline:
                raise UsageError(f"{PROGRAM} does not answer: {error}") from None
            sleep(0.01)


class Monitor:
    """QEMU's monitor (QMP), as far as snapshots need it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket_module.socket(socket_module.AF_UNIX)
        self._socket.settimeout(START_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._lines.readline()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: str) -> None:
        """Raises Violation if QEMU refuses."""
        question = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline() or b'{"error": "the monitor is gone"}')
            if "error" in answer:
                raise Violation(ENGINE, f"{command}: {answer['error']}")
            if "return" in answer:
                return

    def snapshot(self, operation: Operation) -> None:
        words = {"snapshot": "blockdev-snapshot-internal-sync"}
        command = words.get(operation.kind, "blockdev-snapshot-delete-internal-sync")
        self.ask(command, device="disk", name=operation.name)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def _perform(storage: NbdStorage, operation: Operation) -> None:
    kind, offset, length = operation.kind, operation.offset, operation.length
    if kind in ("write", "fua"):
        drive(storage.write(operation.content, offset))
        if kind == "fua":
            drive(storage.flush())
    elif kind == "zero":
        drive(storage.write_zeroes(offset, length, unmap=operation.unmap))
    elif kind == "discard":
        drive(storage.discard(offset, length))
    elif kind == "flush":
        drive(storage.flush())


def side_by_side(seed: int, count: int, screen: Screen) -> list[Row]:
    """Both drivers on the same workloads: `count` of each kind. Raises UsageError, Violation."""
    rows = []
    for image in KINDS:
        for driver in ("enban", "QEMU"):
            total, flushes, asked = Tally(), 0, 0
            for number in range(count):
                # Applying a snapshot is nothing QEMU can do while a disk is in use.
                script = [o for o in operations(image, seed + number, OPERATIONS) if o.kind != "apply"]
                recording = record(image, script) if driver == "enban" else record_qemu(image, script)
                flushes += sum(entry.kind == writelog.FLUSH for entry in recording.entries)
                asked += sum(operation.kind in ("flush", "fua") for operation in script)
                explorer = Explorer(recording, seed, subsets=6, scattered=3, reopen_every=1 << 60, stop=False)
                screen.show(f"{driver}, {image.name}, workload {number + 1} of {count}")
                total.add(explorer.explore())
            rows.append(Row(image.name, driver, total, flushes, asked))
    return rows


def table(rows: list[Row]) -> str:
    """Side by side, for a person."""
    lines = [
        f"{'image':<20} {'driver':<7} {'states':>8} {'corrupt':>8} {'lost':>6} {'foreign':>8} "
        f"{'leaks only':>10} {'clean':>7}  {'flushes: storage/guest'}"
    ]
    for row in rows:
        tally = row.tally
        lines.append(
            f"{row.image:<20} {row.driver:<7} {tally.states:>8,} {tally.corrupt:>8,} {tally.lost:>6,} "
            f"{tally.foreign:>8,} {tally.leaking:>10,} {tally.clean:>7,}  {row.flushes}/{row.asked}"
        )
    lines += [
        "",
        "states: images that a power cut may leave; corrupt: the tables contradict each other; lost: flushed",
        "data is gone; foreign: a sector shows what was never written there since the last flush. QEMU marks",
        "images with lazy refcounts dirty and repairs them when it opens them: corrupt is expected there.",
    ]
    return "\n".join(lines)
