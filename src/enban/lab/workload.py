"""Random histories of one disk: operations by seed, and doing them with the oracle in step.

A workload is a list of operations, and a list of operations is a text with one line each, so
that what failed can be read, cut down and done again:

    write 0x1200+0x400 #17      the bytes are those of `pattern(length, 17)`
    fua, packed (compressed)    as write
    zero 0x0+0x2000 unmap       discard 0x400+0x200
    flush   read   reopen       resize 0x6000
    snapshot a   apply a   delete a
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import enban
from enban.block.codec import deflater
from enban.block.runtime import BLOCKING, drive
from enban.errors import HostError

from .images import Image, Medium, pattern
from .oracle import ENGINE, SECTOR, Oracle, Violation

if TYPE_CHECKING:
    from enban.block.door import Door
    from enban.block.storage import Storage

WRITES = ("write", "fua", "packed")
MOST = 16 << 20  # of an offset or a length in a script; the lab's disks are much smaller


class Operation:
    """kind: see above. stamp: which bytes a write has. length: for resize, the new size.
    name: of a snapshot. content: the bytes of a write."""

    __slots__ = ("content", "kind", "length", "name", "offset", "stamp", "unmap")

    def __init__(
        self,
        kind: str,
        offset: int = 0,
        length: int = 0,
        content: bytes = b"",
        *,
        stamp: int = 0,
        name: str = "",
        unmap: bool = True,
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.stamp = stamp
        self.name = name
        self.unmap = unmap
        self.content = content

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        place = f"{self.offset:#x}+{self.length:#x}"
        if self.kind in WRITES:
            return f"{self.kind} {place} #{self.stamp}"
        if self.kind == "zero":
            return f"zero {place}{' unmap' if self.unmap else ''}"
        if self.kind == "discard":
            return f"discard {place}"
        if self.kind == "resize":
            return f"resize {self.length:#x}"
        return f"{self.kind} {self.name}".rstrip()


def parse_script(text: str, image: Image) -> list[Operation]:
    """The operations of a script; lines that begin with # are remarks. Raises ValueError, which names the
    line: also for a number that no disk of the lab has, and for a script of remarks alone."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            found.append(_parse_operation(words, image))
        except (ValueError, IndexError):
            raise ValueError(f"line {number}, {line.strip()[:60]!r}, is no operation") from None
    if not found:
        raise ValueError("there is no operation in it")
    return found


def _parse_operation(words: list[str], image: Image) -> Operation:
    """Raises ValueError, IndexError."""
    kind = words[0]
    if kind in (*WRITES, "zero", "discard"):
        offset, length = (_place(part) for part in words[1].split("+"))
        stamp = int(words[2][1:]) if kind in WRITES else 0
        content = content_of(image, kind, length, stamp) if kind in WRITES else b""
        unmap = kind != "zero" or words[-1] == "unmap"
        return Operation(kind, offset, length, content, stamp=stamp, unmap=unmap)
    if kind == "resize":
        return Operation(kind, 0, _place(words[1]))
    if kind in ("snapshot", "apply", "delete"):
        return Operation(kind, name=words[1])
    if kind in ("flush", "read", "reopen"):
        return Operation(kind)
    raise ValueError(kind)


def _place(text: str) -> int:
    """An offset or a length."""
    number = int(text, 16)
    if not 0 <= number <= MOST:
        raise ValueError(text)
    return number


def content_of(image: Image, kind: str, length: int, stamp: int) -> bytes:
    if kind == "packed":
        return pattern(image.cluster // 4, stamp).ljust(image.cluster, b"\x77")
    return pattern(length, stamp)


def operations(
    image: Image,
    seed: int,
    count: int,
    *,
    size: int = 0,
    resizes: bool = True,
    snapshots: bool = True,
    reopens: bool = False,
) -> list[Operation]:
    """`count` random operations; a write's content is different each time."""
    random = Random(seed)
    size = size or image.size
    kinds = ["write", "fua", "zero", "discard", "flush", "read", "packed", "resize", "snapshot", "reopen"]
    weights = [
        46,
        2,
        12,
        12,
        11,
        4,
        image.packs,
        4 if image.resizes and resizes else 0,
        9 if image.snapshots and snapshots else 0,
        1 if reopens else 0,
    ]
    pack = deflater("zlib")
    kept: list[str] = []
    found: list[Operation] = []
    while len(found) < count:
        stamp = 1000 * seed + len(found) + 1
        kind = random.choices(kinds, weights)[0]
        if kind in ("flush", "read", "reopen"):
            found.append(Operation(kind, 0, size if kind == "read" else 0))
        elif kind == "resize":
            size = random.randrange(1, 3 * image.size // SECTOR // 2) * SECTOR
            found.append(Operation(kind, 0, size))
        elif kind == "snapshot":
            action = random.choice(("snapshot", "apply", "delete")) if kept else "snapshot"
            action = "delete" if len(kept) > 2 else action
            name = f"s{stamp}" if action == "snapshot" else random.choice(kept)
            if action == "snapshot":
                kept.append(name)
            elif action == "delete":
                kept.remove(name)
            found.append(Operation(action, name=name))
        elif kind == "packed":
            offset = random.randrange(-(-size // image.cluster)) * image.cluster
            content = content_of(image, kind, image.cluster, stamp)
            if len(pack(content)) < image.cluster:
                length = min(image.cluster, size - offset)
                found.append(Operation(kind, offset, length, content, stamp=stamp))
            else:
                found.append(Operation("flush"))
        else:
            unit = random.choice((SECTOR, SECTOR, image.cluster, 1))
            offset = min(random.randrange(size // unit + 1) * unit, size - 1)
            length = random.choice((SECTOR, 3 * SECTOR, image.cluster, 2 * image.cluster + 700))
            length = min(length - length % unit or unit, size - offset)
            content = content_of(image, kind, length, stamp) if kind in WRITES else b""
            unmap = kind != "zero" or random.random() < 0.6
            found.append(Operation(kind, offset, length, content, stamp=stamp, unmap=unmap))
    return found


def perform(disk: enban.Disk, operation: Operation) -> bytes:
    """Do it; a read returns what it saw. `reopen` is for the caller."""
    kind, offset, length = operation.kind, operation.offset, operation.length
    if kind in ("write", "fua"):
        disk.pwrite(operation.content, offset, fua=kind == "fua")
    elif kind == "packed":
        drive(disk.door.write_packed(deflater(disk.node.codec)(operation.content), offset))
    elif kind == "zero":
        disk.write_zeroes(offset, length, unmap=operation.unmap)
    elif kind == "discard":
        disk.discard(offset, length)
    elif kind == "flush":
        disk.flush()
    elif kind == "resize":
        disk.resize(length)
    elif kind == "snapshot":
        disk.create_snapshot(operation.name)
    elif kind == "apply":
        disk.apply_snapshot(operation.name)
    elif kind == "delete":
        disk.delete_snapshot(operation.name)
    elif kind == "read":
        return disk.pread(disk.size, 0)
    return b""


def fits(operation: Operation, oracle: Oracle) -> bool:
    """Whether an operation makes sense now (one before it may have failed, or been cut out)."""
    if operation.kind in ("apply", "delete"):
        return operation.name in oracle.snapshots
    if operation.kind == "snapshot":
        return operation.name not in oracle.snapshots and operation.name not in oracle.possible
    if operation.kind in ("resize", "read", "flush", "reopen"):
        return True
    return operation.offset + operation.length <= len(oracle.model)


def see(disk: enban.Disk) -> bytes:
    return disk.pread(disk.size, 0)


def run_until_error(
    disk: enban.Disk,
    oracle: Oracle,
    operation: Operation,
    *,
    may_fail: bool,
    look: Callable[[enban.Disk], bytes] = see,
) -> HostError | None:
    """One operation with the oracle in step. A failure must be a HostError, and only if it may be.
    look: reads the whole disk, to learn what a discard did."""
    oracle.begin(operation)
    try:
        seen = perform(disk, operation)
    except HostError as error:
        if not may_fail:
            raise Violation(ENGINE, f"{operation}: {error}") from error
        return error
    oracle.done(operation)
    if operation.kind == "read":
        oracle.check_now(seen, "read")
    elif operation.kind == "discard":
        oracle.observe(operation, look(disk), what=repr(operation))
    return None


def prepare(image: Image, seed: int) -> tuple[bytes, bytes, bytes]:
    """A closed image with some history: (its bytes, its data file's, what the guest sees)."""
    storage = Medium(BLOCKING, image.empty())
    data = Medium(BLOCKING) if image.external else None
    door = open_door(image, storage, data)
    disk, oracle = enban.Disk(door), Oracle(image.shown())
    for operation in operations(image, seed, 14, resizes=False, snapshots=False):
        run_until_error(disk, oracle, operation, may_fail=False)
    disk.close()
    return bytes(storage.content), bytes(data.content) if data is not None else b"", bytes(oracle.model)


def open_door(image: Image, storage: Storage, data: Storage | None) -> Door:
    return drive(image.open(storage, data))
