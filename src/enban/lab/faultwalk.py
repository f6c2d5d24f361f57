"""The fault walker: a failed call changes nothing, and work goes on when the fault is gone.

Each storage call of a workload is made to fail in turn, in each way it can. After the error: the
caller has it, nothing flushed is lost, every sector is old or new, what lies on the storage at
that moment has no corruption, the rest of the workload succeeds, and so does closing.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import enban
from enban.block.runtime import BLOCKING
from enban.errors import EnbanError, FlushFailedError, HostError
from enban.filters import faults
from enban.filters.faults import Call, Fault, Faults

from .images import EXTERNAL, IMAGES, OTHERS, SNAPSHOTS, Image, Medium
from .oracle import CORRUPT, ENGINE, FOREIGN, LEAK, SECTOR, Oracle, Violation
from .storm import nothing_remains
from .workload import Operation, fits, open_door, operations, prepare, run_until_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from enban.block.storage import Storage

    from .images import View

KINDS = (*IMAGES, EXTERNAL, *SNAPSHOTS, *OTHERS)
COUNT = 26  # operations of a workload

_SPACE = (faults.WRITE, faults.ZERO, faults.ALLOCATE, faults.TRUNCATE)


class Way:
    """How a call can fail. errno: of the error, 0 for a call that only takes its time. tears: a part is
    done before. kinds: the calls that can fail so. sticky: every later one fails too."""

    __slots__ = ("errno", "kinds", "sticky", "tears")

    def __init__(
        self, number: int, kinds: tuple[str, ...], *, tears: bool = False, sticky: bool = False
    ) -> None:
        self.errno = number
        self.kinds = kinds
        self.tears = tears
        self.sticky = sticky


WAYS = {
    "EIO": Way(errno.EIO, (*faults.CHANGES, faults.READ)),
    "ENOSPC": Way(errno.ENOSPC, _SPACE),
    "full": Way(errno.ENOSPC, _SPACE, sticky=True),  # until there is room again
    "torn": Way(errno.EIO, (faults.WRITE, faults.ZERO), tears=True),
    "short read": Way(errno.EIO, (faults.READ,), tears=True),
    "flush once": Way(errno.EIO, (faults.FLUSH,)),
    "slow": Way(0, (*faults.CHANGES, faults.READ)),
}
SLOW_S = 0.0005


class Walk:
    """A workload with one fault in it. limit: of the storage, in bytes."""

    def __init__(self, image: Image, seed: int, start: tuple[bytes, bytes, bytes]) -> None:
        self.image = image
        self.seed = seed
        content, data, guest = start
        self.memory = Medium(BLOCKING, content)
        self.data_memory = Medium(BLOCKING, data) if image.external else None
        self.storage = Faults(self.memory)
        self.data: Storage | None = Faults(self.data_memory) if self.data_memory is not None else None
        self.oracle = Oracle(guest)
        self.disk = enban.Disk(open_door(image, self.storage, self.data))
        self.errors = 0

    def aim(self, decide: faults.Decide | None) -> None:
        self.storage.decide = decide
        if isinstance(self.data, Faults):
            self.data.decide = decide  # one count over both files

    @property
    def halted(self) -> bool:
        """Whether the engine has given the image up until it is opened again."""
        return not self.disk.node.writable

    def view(self) -> View:
        return self.image.view(
            self.memory.content, self.data_memory.content if self.data_memory is not None else None
        )

    def check_storage(self, what: str) -> None:
        """What a crash at this moment would leave (all that was written arrived)."""
        view = self.view()
        report = view.check()
        if report.corruptions:
            raise Violation(CORRUPT, f"{what}: {report.corruptions[:4]}", image=self.memory.content)
        if not self.image.external:  # there flushed zeros and discards are in place before their entries
            self.oracle.check_crash(view.read(), what=what)
            shown = view.snapshots()
            self.oracle.check_snapshots(shown, shown, what)

    def step(self, operation: Operation, *, may_fail: bool = True) -> HostError | None:
        if self.halted or not fits(operation, self.oracle):
            return None
        error = run_until_error(self.disk, self.oracle, operation, may_fail=may_fail, look=self.look)
        if error is not None:
            self.errors += 1
            what = f"{self.image} seed {self.seed} {operation} failed: {error}"
            self.check_storage(what)
            if operation.kind == "resize":
                if self.disk.size not in (len(self.oracle.model), operation.length):
                    raise Violation(ENGINE, f"{what}: the disk has {self.disk.size} bytes")
                if self.disk.size == operation.length:
                    self.oracle.done(operation)
            self._settle_snapshots(operation)
            if not self.halted:
                self.oracle.observe(operation, self.look(self.disk), what=what)
        return error

    def _settle_snapshots(self, operation: Operation) -> None:
        """After a failed snapshot operation: whether there is one is what the engine says."""
        oracle = self.oracle
        if operation.kind not in ("snapshot", "delete") or self.halted:
            return
        here = {snapshot.name for snapshot in self.disk.snapshots}
        content = oracle.possible.pop(operation.name)
        if operation.name in here:
            oracle.snapshots[operation.name] = content

    def look(self, disk: enban.Disk) -> bytes:
        """The whole disk, read without faults."""
        decide = self.storage.decide
        self.aim(None)
        content = disk.pread(disk.size, 0)
        self.aim(decide)
        return content

    def finish(self, what: str) -> None:
        """The fault is gone: all goes well, and nothing is left over."""
        self.aim(None)
        if self.halted:
            self._open_again(what)
        kept = self.disk.size
        for operation in operations(self.image, self.seed + 50, 4, size=kept, snapshots=False):
            self.step(operation, may_fail=False)
        self.step(Operation("flush"), may_fail=False)
        try:
            nothing_remains(self.disk.door)
        except AssertionError as error:
            raise Violation(ENGINE, f"{what}: something of a failed request is left") from error
        try:
            self.disk.close()
        except EnbanError as error:
            raise Violation(ENGINE, f"{what}: closing failed: {error}") from error
        view = self.view()
        report = view.check()
        if report.corruptions:
            raise Violation(CORRUPT, f"{what}: {report.corruptions[:4]}", image=self.memory.content)
        if report.leaks and not self.reopened:
            raise Violation(LEAK, f"{what}: leaked clusters {report.leaks[:8]}", image=self.memory.content)
        if view.read() != self.oracle.model:
            raise Violation(FOREIGN, f"{what}: it reads differently", image=self.memory.content)

    reopened = False

    def _open_again(self, what: str) -> None:
        """The image was given up: close it (it may say so), open it, and see what is legal."""
        try:
            self.disk.close()
        except HostError:
            pass  # it says that changes are lost; which ones may be is checked now
        self.reopened = True
        self.check_storage(what)
        self.disk = enban.Disk(open_door(self.image, self.storage, self.data))
        oracle = self.oracle
        here = {snapshot.name for snapshot in self.disk.snapshots}
        for name, content in oracle.possible.items():
            if name in here:
                oracle.snapshots[name] = content
        oracle.possible.clear()
        oracle.legal.clear()
        oracle.model[:] = self.disk.pread(self.disk.size, 0)
        oracle.sizes = {self.disk.size}


def walk(
    image: Image,
    seed: int,
    way: str,
    *,
    count: int = COUNT,
    tick: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Fail each call in turn. Returns (calls walked over, errors the caller saw). Raises Violation.
    tick: called with the index of each call before it is made to fail."""
    how = WAYS[way]
    start = prepare(image, seed)
    script = operations(image, seed + 7, count)
    index = seen = 0
    while True:
        index += 1
        if tick is not None:
            tick(index)
        reached, errors = walk_one(image, seed, how, index, start, script)
        seen += errors
        if not reached:
            return index - 1, seen


def walk_one(
    image: Image,
    seed: int,
    how: Way,
    index: int,
    start: tuple[bytes, bytes, bytes],
    script: list[Operation],
) -> tuple[bool, int]:
    """Fail one call. Returns (whether there was such a call, errors the caller saw)."""
    here = Walk(image, seed, start)
    reached = 0

    def decide(call: Call) -> Fault | None:
        nonlocal reached
        if call.operation not in how.kinds:
            return None
        reached += 1
        if reached != index and not (how.sticky and reached > index):
            return None
        if not how.errno:
            import time

            time.sleep(SLOW_S)
            return None
        done = 0
        if how.tears:  # up to a sector boundary inside the range, if there is one
            first = SECTOR - call.offset % SECTOR
            done = first + (call.length - first) // 2 // SECTOR * SECTOR if first < call.length else 0
        return Fault(how.errno, done=done)

    here.aim(decide)
    what = f"{image} seed {seed}, call {index}"
    try:
        for operation in script:
            here.step(operation)
        here.finish(what)
    except EnbanError as error:
        raise Violation(ENGINE, f"{what}: {error}", image=here.memory.content) from error
    return reached >= index, here.errors


def walk_sizes(image: Image, seed: int, rooms: range) -> int:
    """A file system with room for so many sectors and no more; later there is room again. Returns the
    number of errors seen. Raises Violation."""
    start = prepare(image, seed)
    script = operations(image, seed + 7, COUNT)
    failures = 0
    for room in rooms:
        here = Walk(image, seed, start)
        here.memory.limit = len(start[0]) + room * SECTOR
        try:
            for operation in script:
                here.step(operation)
            failures += here.errors
            here.memory.limit = 1 << 40
            here.finish(f"{image} seed {seed} with room for {room} sectors")
        except EnbanError as error:
            raise Violation(ENGINE, f"{image} seed {seed}, room for {room} sectors: {error}") from error
    return failures


def walk_failing_flush(image: Image, seed: int, index: int) -> bool:
    """The index-th flush fails, and all after it: never is one of them called a success. Returns
    whether there was such a flush. Raises Violation."""
    here = Walk(image, seed, prepare(image, seed))
    here.aim(faults.fail_at(index, operations=(faults.FLUSH,), sticky=True))
    what = f"{image} seed {seed}, every flush from the {index}-th on fails"
    broken = False
    for operation in operations(image, seed + 7, COUNT):
        error = here.step(operation)
        broken = broken or isinstance(error, FlushFailedError)
        if broken and operation.kind == "flush" and error is None and not here.halted:
            raise Violation(ENGINE, f"{what}: a flush was called a success")
    if not broken:
        if not here.errors:
            here.finish(what)
        return False
    try:
        here.disk.close()
    except HostError:
        here.check_storage(what)
        return True
    raise Violation(ENGINE, f"{what}: closing was called a success")
