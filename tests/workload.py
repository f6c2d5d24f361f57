"""Random histories of one disk with an oracle that knows what each sector may hold.

The oracle keeps, for each 512-byte sector, the values it has had since the last flush that was
acknowledged: after a crash any of them is legal and nothing else. A disk writes whole sectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import enban
from enban.block.codec import deflater
from enban.block.door import Door
from enban.block.node import Node
from enban.block.runtime import BLOCKING, drive
from enban.block.storage import Storage
from enban.errors import HostError
from enban.storage.memory import MemoryStorage
from tests.support import empty_image, open_memory, pattern, raw_node

SECTOR = 512


class Operation:
    """kind: write, packed, zero, discard, flush, read or resize (length: the new size).
    content: the bytes of a write."""

    __slots__ = ("content", "kind", "length", "offset", "unmap")

    def __init__(
        self, kind: str, offset: int = 0, length: int = 0, content: bytes = b"", *, unmap: bool = True
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.content = content
        self.unmap = unmap

    def __repr__(self) -> str:
        return f"<{self.kind} {self.offset:#x}+{self.length:#x}>"


class Image:
    """A kind of image to work on. options: creation options; backing: bytes below it; size: of the disk.
    resizes: whether the workload resizes it."""

    def __init__(
        self, name: str, size: int, *, backing: bytes = b"", resizes: bool = False, **options: Any
    ) -> None:
        self.name = name
        self.size = size
        self.resizes = resizes
        self.backing = backing
        if backing:
            options["backing_file"] = "below"
        self.options = options
        self.cluster = options.get("cluster_size", 65536)
        self.external = "data_file" in options

    def __repr__(self) -> str:
        return self.name

    def below(self) -> Node | None:
        return raw_node(self.backing) if self.backing else None

    def shown(self) -> bytes:
        """What the guest sees of the empty image."""
        return self.backing[: self.size].ljust(self.size, b"\0")


KIB = 1024
IMAGES = (
    Image("512", 24 * KIB, cluster_size=512, resizes=True),
    Image("512-rc64", 40 * KIB, cluster_size=512, refcount_bits=64),
    Image("4k-rc1-chain", 60 * KIB + 512, cluster_size=4096, refcount_bits=1, backing=pattern(48 * KIB, 5)),
    Image("512-chain", 20 * KIB, cluster_size=512, backing=pattern(12 * KIB + 512, 5), resizes=True),
    Image("4k-v2-chain", 64 * KIB, cluster_size=4096, compat="0.10", backing=pattern(80 * KIB, 5)),
    Image(
        "16k-ext-chain", 100 * KIB, cluster_size=16384, extended_l2=True, backing=pattern(64 * KIB + 512, 5)
    ),
)


def operations(
    image: Image, seed: int, count: int, *, size: int = 0, resizes: bool = True
) -> Iterator[Operation]:
    """`count` random operations; a write's content is different each time."""
    random = Random(seed)
    size = size or image.size
    kinds = ["write", "zero", "discard", "flush", "read", "packed", "resize"]
    weights = [48, 12, 12, 11, 5, 0 if image.external else 9, 4 if image.resizes and resizes else 0]
    pack = deflater("zlib")
    for number in range(count):
        kind = random.choices(kinds, weights)[0]
        if kind in ("flush", "read"):
            yield Operation(kind, 0, size if kind == "read" else 0)
            continue
        if kind == "resize":
            size = random.randrange(1, 3 * image.size // SECTOR // 2) * SECTOR
            yield Operation(kind, 0, size)
            continue
        if kind == "packed":
            offset = random.randrange(-(-size // image.cluster)) * image.cluster
            content = pattern(image.cluster // 4, 1000 * seed + number + 1).ljust(image.cluster, b"\x77")
            if len(pack(content)) < image.cluster:
                yield Operation(kind, offset, min(image.cluster, size - offset), content)
            continue
        unit = random.choice((SECTOR, SECTOR, image.cluster, 1))
        offset = min(random.randrange(size // unit + 1) * unit, size - 1)
        length = random.choice((SECTOR, 3 * SECTOR, image.cluster, 2 * image.cluster + 700))
        length = min(length - length % unit or unit, size - offset)
        content = pattern(length, 1000 * seed + number + 1) if kind == "write" else b""
        yield Operation(kind, offset, length, content, unmap=random.random() < 0.6)


def perform(disk: enban.Disk, operation: Operation) -> bytes:
    """Do it; a read returns what it saw."""
    kind, offset, length = operation.kind, operation.offset, operation.length
    if kind == "write":
        disk.pwrite(operation.content, offset)
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
    else:
        return disk.pread(length, offset)
    return b""


class Oracle:
    """model: what the guest sees now. sizes: sizes the disk may have after a crash.
    legal: by sector, all values since the last flush; a sector not in it has its model value."""

    def __init__(self, content: bytes) -> None:
        self.model = bytearray(content)
        self.legal: dict[int, set[bytes]] = {}
        self.sizes = {len(content)}

    def sector(self, number: int) -> bytes:
        return bytes(self.model[number * SECTOR : (number + 1) * SECTOR])

    def outcomes(self, operation: Operation) -> dict[int, bytes]:
        """The sectors an operation changes (or may change), with their new values."""
        new = {
            "write": operation.content,
            "packed": operation.content[: operation.length],
            "zero": bytes(operation.length),
            "discard": bytes(operation.length),
        }.get(operation.kind)
        if new is None:
            return {}
        offset, end = operation.offset, operation.offset + operation.length
        after = {}
        for number in range(offset // SECTOR, (end - 1) // SECTOR + 1):
            value = bytearray(self.sector(number))
            first, last = max(offset, number * SECTOR), min(end, number * SECTOR + len(value))
            value[first - number * SECTOR : last - number * SECTOR] = new[first - offset : last - offset]
            after[number] = bytes(value)
        return after

    def begin(self, operation: Operation) -> None:
        """From now on a crash may show the operation's effect."""
        if operation.kind == "resize":
            self.sizes.add(operation.length)
            for number in range(len(self.model) // SECTOR, operation.length // SECTOR):
                self.legal[number] = {bytes(SECTOR)}
        for number, value in self.outcomes(operation).items():
            self.legal.setdefault(number, {self.sector(number)}).add(value)

    def done(self, operation: Operation) -> None:
        """It was acknowledged. A discard's effect is learnt by `observe`."""
        if operation.kind == "flush":
            self.legal.clear()
        elif operation.kind == "resize":
            del self.model[operation.length :]
            self.model.extend(bytes(operation.length - len(self.model)))
            if len(self.sizes) > 1:
                self.legal.clear()  # a change of the size makes all before it durable
            self.sizes = {operation.length}
        elif operation.kind != "discard":
            for number, value in self.outcomes(operation).items():
                self.model[number * SECTOR : number * SECTOR + len(value)] = value

    def observe(self, operation: Operation, content: bytes, *, what: str = "") -> None:
        """`content` is what the disk shows after a discard or a failed operation: each of its
        sectors has its old or its new value, all others are as before. It is the model from now on."""
        assert len(content) == len(self.model), f"{what}: size {len(content)}"
        outcomes = self.outcomes(operation)
        for number in range(len(content) // SECTOR):
            seen = content[number * SECTOR : (number + 1) * SECTOR]
            if seen != self.sector(number):
                assert seen == outcomes.get(number), f"{what}: sector {number} is neither old nor new"
        self.model[:] = content

    def check_crash(self, content: bytes, *, what: str = "") -> None:
        """`content` is the whole disk as found after a crash."""
        assert len(content) in self.sizes, f"{what}: size {len(content)} is not one of {self.sizes}"
        legal = self.legal
        for number in range(len(content) // SECTOR):
            seen = content[number * SECTOR : (number + 1) * SECTOR]
            allowed = legal.get(number)
            if allowed is None:
                assert seen == self.sector(number), f"{what}: sector {number} lost its flushed value"
            else:
                assert seen in allowed, f"{what}: sector {number} holds a foreign value"


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
        assert may_fail, error
        return error
    oracle.done(operation)
    if operation.kind == "read":
        assert seen == oracle.model
    elif operation.kind == "discard":
        oracle.observe(operation, look(disk), what=repr(operation))
    return None


def prepare(image: Image, seed: int) -> tuple[bytes, bytes, bytes]:
    """A closed image with some history: (its bytes, its data file's, what the guest sees)."""
    storage = MemoryStorage(BLOCKING, empty_image(image.size, **image.options))
    data = MemoryStorage(BLOCKING) if image.external else None
    door = open_door(image, storage, data)
    disk, oracle = enban.Disk(door), Oracle(image.shown())
    for operation in operations(image, seed, 14, resizes=False):
        run_until_error(disk, oracle, operation, may_fail=False)
    disk.close()
    return bytes(storage.content), bytes(data.content) if data is not None else b"", bytes(oracle.model)


def open_door(image: Image, storage: Storage, data: Storage | None) -> Door:
    return drive(open_memory(storage, backing=image.below(), data=data))
