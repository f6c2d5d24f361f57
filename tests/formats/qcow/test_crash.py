"""Power cuts and failing writes: what the format promises at every point.

A power cut keeps any subset of the writes since the last flush, sector by sector. After it

- no table entry points past the end of the file or to what another one uses,
- what was flushed reads as it was or as something written later,
- what was not flushed reads, sector by sector, as before or as something written since.

An operation that fails changes nothing that was promised, and work goes on when there is room.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from enban.block.codec import deflater
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING
from enban.errors import EnbanError, HostError, NoSpaceError
from enban.lab.qcow_reader import QcowReader
from enban.storage.memory import MemoryStorage
from tests.qcow_support import check_sound, memory_qcow, open_disk
from tests.support import KIB, raw_node

SECTOR = 512


class LoggingStorage(MemoryStorage):
    """Remembers what is durable and what was written since; fails operation number `fail_at`."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(BLOCKING, data)
        self.durable = bytearray(data)
        self.pending: list[tuple[int, bytes]] = []  # (offset, content) or (new size, b"") of a truncate
        self.operations = 0
        self.fail_at = -1
        self.stay_full = False

    def _count(self) -> None:
        self.operations += 1
        if self.operations == self.fail_at or (self.stay_full and self.operations > self.fail_at > 0):
            raise NoSpaceError("cannot write: no space left", path=self.name, errno=28)

    async def write(self, buffer: Any, offset: int) -> None:
        self._count()
        self.pending.append((offset, bytes(buffer)))
        await super().write(buffer, offset)

    async def truncate(self, size: int) -> None:
        self._count()
        self.pending.append((size, b""))
        await super().truncate(size)

    async def flush(self) -> None:
        self._count()
        self.durable = bytearray(self.content)
        self.pending = []

    def after_power_cut(self, choose: random.Random) -> bytearray:
        """The durable bytes with some sectors of the writes since."""
        image = bytearray(self.durable)
        mode = choose.randrange(3)
        cut = choose.randrange(len(self.pending) + 1)
        for number, (offset, content) in enumerate(self.pending):
            if mode == 0 and number >= cut:  # a prefix
                break
            whole = choose.random() < 0.5
            if mode == 1 and not whole:  # some writes, each whole
                continue
            if not content:
                image.extend(bytes(max(0, offset - len(image))))
                continue
            position = 0
            while position < len(content):
                end = min(len(content), position + SECTOR - (offset + position) % SECTOR)
                if mode < 2 or choose.random() < 0.6:  # in mode 2 each sector by itself
                    image.extend(bytes(max(0, offset + end - len(image))))
                    image[offset + position : offset + end] = content[position:end]
                position = end
        return image


class NeverFlushes(LoggingStorage):
    """Says that it flushed."""

    async def flush(self) -> None:
        pass


class Model:
    """For each sector the values it may have after a power cut: the flushed one and all later ones."""

    def __init__(self, content: bytes) -> None:
        self.now = bytearray(content)
        self.allowed = [{content[at : at + SECTOR]} for at in range(0, len(content), SECTOR)]

    def write(self, content: bytes, offset: int) -> None:
        self.now[offset : offset + len(content)] = content
        for sector in range(offset // SECTOR, -(-(offset + len(content)) // SECTOR)):
            self.allowed[sector].add(bytes(self.now[sector * SECTOR : sector * SECTOR + SECTOR]))

    def flushed(self) -> None:
        for sector in range(len(self.allowed)):
            self.allowed[sector] = {bytes(self.now[sector * SECTOR : sector * SECTOR + SECTOR])}

    def check(self, content: bytes) -> None:
        for sector, allowed in enumerate(self.allowed):
            assert content[sector * SECTOR : sector * SECTOR + SECTOR] in allowed, f"sector {sector}"


class History:
    """Random operations on a disk and its model."""

    def __init__(
        self,
        seed: int,
        *,
        size: int,
        cluster: int,
        backing: bytes,
        kind: type[LoggingStorage] = LoggingStorage,
    ) -> None:
        self.random = random.Random(seed)
        self.size, self.cluster, self.backing = size, cluster, backing
        options = {"backing_file": "base"} if backing else {}
        template = memory_qcow(size, cluster_size=cluster, l2_entries=64, **options).content
        self.storage = kind(template)
        self.model = Model(backing[:size].ljust(size, b"\0"))
        self.disk = self.open(self.storage)
        self.stamp = 0

    def open(self, storage: MemoryStorage) -> Disk:
        return open_disk(storage, backing=raw_node(self.backing) if self.backing else None)

    def content(self, length: int) -> bytes:
        self.stamp += 1
        return self.stamp.to_bytes(4, "little") * (length // 4 + 1)

    def step(self) -> None:
        choose = self.random
        what = choose.random()
        offset = choose.randrange(self.size // SECTOR) * SECTOR
        length = min(self.size - offset, choose.choice((512, 1024, 4096, 3 * self.cluster)))
        if what < 0.55:
            data = self.content(length)[:length]
            self.note(data, offset)
            self.disk.pwrite(data, offset)
        elif what < 0.7:
            self.note(bytes(length), offset)
            self.disk.write_zeroes(offset, length)
        elif what < 0.85:
            offset -= offset % self.cluster
            data = self.content(self.cluster)[: self.cluster]
            packed = deflater("zlib")(data)
            if len(packed) < self.cluster:
                self.note(data[: self.size - offset], offset)
                self.disk.write_packed(packed, offset)
        else:
            self.disk.flush()
            self.model.flushed()

    def note(self, data: bytes, offset: int) -> None:
        self.model.write(data, offset)

    def check(self, image: bytes | bytearray) -> None:
        reader = QcowReader(image)
        assert not reader.problems(), reader.problems()[:5]
        self.model.check(reader.read(self.backing))


LAYOUTS: list[dict[str, Any]] = [
    {"size": 40 * KIB, "cluster": 512, "backing": b""},
    {"size": 200 * KIB, "cluster": 4096, "backing": b"\xcc" * 90 * KIB},
    {"size": 300 * KIB, "cluster": 1024, "backing": b""},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["512", "4k-backing", "1k"])
@pytest.mark.parametrize("seed", range(6))
def test_power_cuts(layout: dict[str, Any], seed: int) -> None:
    history = History(seed, **layout)
    choose = random.Random(seed)
    for _ in range(60):
        history.step()
        for _ in range(3):
            history.check(history.storage.after_power_cut(choose))
    history.disk.close()
    history.model.flushed()
    history.check(history.storage.durable)


def test_a_power_cut_inside_a_flush() -> None:
    """Each operation of a flush that writes new tables, old tables and the L1 table."""
    for fail_at in range(1, 40):
        history = History(3, size=300 * KIB, cluster=1024, backing=b"")
        for _ in range(12):
            history.step()
        storage = history.storage
        storage.fail_at = storage.operations + fail_at
        storage.stay_full = True
        try:
            history.disk.flush()
        except NoSpaceError:
            choose = random.Random(fail_at)
            for _ in range(20):
                history.check(storage.after_power_cut(choose))
        else:
            assert fail_at > 4
            return
    raise AssertionError("a flush of some tables took more than 40 operations")


def test_the_control_without_flushes_is_caught() -> None:
    """The harness itself: where the storage does not flush between the steps, power cuts do harm."""
    caught = 0
    for seed in range(20):
        history = History(seed, kind=NeverFlushes, **LAYOUTS[2])
        for _ in range(30):
            history.step()
        try:
            for number in range(10):
                history.check(history.storage.after_power_cut(random.Random(number)))
        except Exception:  # a wrong byte, a table outside the file, packed data that is none
            caught += 1
    assert caught > 10


@pytest.mark.parametrize("stay_full", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_failures_at_every_operation(seed: int, stay_full: bool) -> None:
    """Operation N fails, for each N; once, or from there on until there is room again."""
    fail_at = 0
    while True:
        fail_at += 1
        history = History(seed, size=64 * KIB, cluster=1024, backing=b"\xdd" * 30 * KIB if seed else b"")
        storage = history.storage
        storage.fail_at, storage.stay_full = fail_at, stay_full
        failures = 0
        for _ in range(25):
            try:
                history.step()
            except HostError:
                failures += 1
                seen = history.disk.pread(history.size, 0)  # each sector as before or as asked
                history.model.check(seen)
                history.model.now[:] = seen
        if not failures:
            assert storage.operations < fail_at
            break
        storage.fail_at, storage.stay_full = -1, False
        seen = history.disk.pread(history.size, 0)
        assert seen == history.model.now
        history.disk.pwrite(b"room again", 100)
        seen = seen[:100] + b"room again" + seen[110:]
        assert history.disk.pread(history.size, 0) == seen
        history.disk.close()
        assert check_sound(storage.durable).read(history.backing) == seen
    assert fail_at > 20


def test_a_close_that_cannot_flush_says_so() -> None:
    history = History(1, size=64 * KIB, cluster=1024, backing=b"")
    history.disk.pwrite(b"x" * 5000, 0)
    history.storage.fail_at, history.storage.stay_full = history.storage.operations, True
    with pytest.raises(EnbanError, match="no space left"):
        history.disk.close()
