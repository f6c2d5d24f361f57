"""Promise 2: a failed write changes nothing, and work goes on when the fault is gone.

Each storage call of a workload is made to fail in turn, in each way it can. After the error: the
caller has it, nothing flushed is lost, every sector is old or new, what lies on the storage at
that moment has no corruption, the rest of the workload succeeds, and so does closing.
"""

from __future__ import annotations

import errno

import pytest

import enban
from enban.block.runtime import BLOCKING
from enban.block.storage import Storage
from enban.errors import FlushFailedError, HostError
from enban.filters import faults
from enban.filters.faults import Call, Fault, Faults
from enban.storage.memory import MemoryStorage
from tests.qcow2_reader import Qcow2Reader
from tests.support import check_bytes, nothing_remains, pattern
from tests.workload import (
    IMAGES,
    SECTOR,
    Image,
    Operation,
    Oracle,
    open_door,
    operations,
    prepare,
    run_until_error,
)

EXTERNAL = Image("4k-data", 64 * 1024, cluster_size=4096, data_file="d")
ALL = (*IMAGES, EXTERNAL)
COUNT = 26

# How a call can fail: errno, whether a part is done before, the operations that can fail so.
WAYS = {
    "EIO": (errno.EIO, False, (*faults.CHANGES, faults.READ)),
    "ENOSPC": (errno.ENOSPC, False, (faults.WRITE, faults.ZERO, faults.ALLOCATE, faults.TRUNCATE)),
    "torn": (errno.EIO, True, (faults.WRITE, faults.ZERO)),
}


class Walk:
    """A workload with one fault in it. `data_faults`: the fault hits the external data file."""

    def __init__(self, image: Image, seed: int, start: tuple[bytes, bytes, bytes]) -> None:
        self.image = image
        self.seed = seed
        content, data, guest = start
        self.memory = MemoryStorage(BLOCKING, content)
        self.data_memory = MemoryStorage(BLOCKING, data) if image.external else None
        self.storage = Faults(self.memory)
        self.data: Storage | None = Faults(self.data_memory) if self.data_memory is not None else None
        self.oracle = Oracle(guest)
        self.disk = enban.Disk(open_door(image, self.storage, self.data))
        self.errors = 0

    def aim(self, decide: faults.Decide | None) -> None:
        self.storage.decide = decide
        if isinstance(self.data, Faults):
            self.data.decide = decide  # one count over both files

    def seen_on_disk(self) -> Qcow2Reader:
        data = self.data_memory.content if self.data_memory is not None else None
        return Qcow2Reader(self.memory.content, data_file=data)

    def check_storage(self, what: str) -> None:
        """What a crash at this moment would leave (all that was written arrived)."""
        reader = self.seen_on_disk()
        report = reader.check()
        assert not report.corruptions, f"{what}: {report.corruptions[:4]}"
        if not self.image.external:  # there flushed zeros and discards are in place before their entries
            self.oracle.check_crash(reader.read(backing=self.image.backing), what=what)

    def step(self, operation: Operation, *, may_fail: bool = True) -> HostError | None:
        if operation.kind == "read":
            operation = Operation("read", 0, self.disk.size)
        elif operation.kind != "resize" and operation.offset + operation.length > self.disk.size:
            return None  # a resize before it failed
        error = run_until_error(self.disk, self.oracle, operation, may_fail=may_fail, look=self.look)
        if error is not None:
            self.errors += 1
            what = f"{self.image} seed {self.seed} {operation} failed: {error}"
            self.check_storage(what)
            if operation.kind == "resize":
                assert self.disk.size in (len(self.oracle.model), operation.length)
                if self.disk.size == operation.length:
                    self.oracle.done(operation)
            self.oracle.observe(operation, self.look(self.disk), what=what)
        return error

    def look(self, disk: enban.Disk) -> bytes:
        """The whole disk, read without faults."""
        decide = self.storage.decide
        self.aim(None)
        content = disk.pread(disk.size, 0)
        self.aim(decide)
        return content

    def finish(self, what: str) -> None:
        """The fault is gone: all goes well, and leaks are all that may remain."""
        self.aim(None)
        for operation in operations(self.image, self.seed + 50, 4, size=self.disk.size):
            self.step(operation, may_fail=False)
        self.step(Operation("flush"), may_fail=False)
        nothing_remains(self.disk.door)
        self.disk.close()
        data = self.data_memory.content if self.data_memory is not None else None
        check_bytes(self.memory.content, leaks=False, data_file=data)
        assert self.seen_on_disk().read(backing=self.image.backing) == self.oracle.model, what


def walk(image: Image, seed: int, way: str) -> tuple[int, int]:
    """Fail each call in turn. Returns (calls walked over, errors the caller saw)."""
    number, tears, kinds = WAYS[way]
    start = prepare(image, seed)
    index = seen = 0
    while True:
        index += 1
        here = Walk(image, seed, start)
        count = 0

        def decide(call: Call, index: int = index) -> Fault | None:
            nonlocal count
            if call.operation not in kinds:
                return None
            count += 1
            if count != index:
                return None
            done = 0
            if tears:  # up to a sector boundary inside the range, if there is one
                first = SECTOR - call.offset % SECTOR
                done = first + (call.length - first) // 2 // SECTOR * SECTOR if first < call.length else 0
            return Fault(number, done=done)

        here.aim(decide)
        for operation in operations(image, seed + 7, COUNT):
            here.step(operation)
        here.finish(f"{image} seed {seed} {way} at call {index}")
        seen += here.errors
        if count < index:
            return index - 1, seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("image", ALL, ids=repr)
def test_each_call_fails_once(image: Image, way: str) -> None:
    calls, errors = walk(image, 1, way)
    assert calls > 10 and errors > 5, "the workload does not reach the storage often enough to prove anything"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 30))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("image", ALL, ids=repr)
def test_each_call_fails_once_long(image: Image, way: str, seed: int) -> None:
    walk(image, seed, way)


@pytest.mark.parametrize("image", IMAGES, ids=repr)
def test_a_full_disk_at_every_size(image: Image) -> None:
    """A file system with room for so many sectors and no more; later there is room again."""
    seed = 3
    start = prepare(image, seed)
    failures = 0
    for room in range(64):
        here = Walk(image, seed, start)
        here.memory.limit = len(start[0]) + room * SECTOR
        for operation in operations(image, seed + 7, COUNT):
            here.step(operation)
        failures += here.errors
        here.memory.limit = 1 << 40
        here.finish(f"{image} with room for {room} sectors")
    assert failures > 2


@pytest.mark.parametrize("image", ALL, ids=repr)
def test_a_flush_that_keeps_failing_is_never_called_a_success(image: Image) -> None:
    seed = 4
    start = prepare(image, seed)
    for index in range(1, 12):
        here = Walk(image, seed, start)
        here.aim(faults.fail_at(index, operations=(faults.FLUSH,), sticky=True))
        broken = False
        for operation in operations(image, seed + 7, COUNT):
            error = here.step(operation)
            broken = broken or isinstance(error, FlushFailedError)
            assert not (broken and operation.kind == "flush" and error is None), "a lost flush was forgotten"
        if broken:
            with pytest.raises(FlushFailedError):
                here.disk.close()
            here.check_storage(f"{image} flush {index}")
        else:
            here.finish("the fault was never reached")


def test_a_failed_write_of_every_size_leaves_neighbours_alone() -> None:
    """The cluster around a failed partial write still shows its backing file."""
    backing = pattern(16 * 1024, 9)
    image = Image("4k", 16 * 1024, cluster_size=4096, backing=backing)
    start = prepare(image, 0)
    guest = start[2]
    for index in range(1, 4):
        here = Walk(image, 0, start)
        here.aim(faults.fail_at(index, operations=(faults.WRITE,), errno=errno.ENOSPC))
        for at in range(100, 16000, 4096):
            before = here.disk.pread(16384, 0)
            try:
                here.disk.pwrite(b"x" * 10, at)
            except HostError as error:
                assert error.errno == errno.ENOSPC
                assert here.disk.pread(16384, 0) == before
        here.aim(None)
        here.disk.close()
        check_bytes(here.memory.content, leaks=True)
    assert len(guest) == 16384
