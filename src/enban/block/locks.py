"""Locks that both runtimes can wait on.

`Mutex` guards the tables of one image for the length of a table change (metadata I/O
included, guest data never). `RangeLocks` serialises allocating writes, zeroes and
discards that touch the same clusters, first come first served. Neither is re-entrant.
A waiter that is cancelled leaves no trace.
"""

from __future__ import annotations

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .runtime import Runtime, Waiter


class Mutex:
    """A fair lock. Use as `async with mutex:`."""

    __slots__ = ("_guard", "_held", "_runtime", "_waiters")

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._guard = _thread.allocate_lock()
        self._held = False
        self._waiters: list[Waiter] = []

    async def __aenter__(self) -> None:
        with self._guard:
            if not self._held:
                self._held = True
                return
            waiter = self._runtime.waiter()
            self._waiters.append(waiter)
        try:
            await waiter.wait()
        except BaseException:
            with self._guard:
                handed_over = waiter not in self._waiters
                if not handed_over:
                    self._waiters.remove(waiter)
            if handed_over:
                self.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def try_acquire(self) -> bool:
        """Take the lock if it is free; then `release` must follow."""
        with self._guard:
            if self._held:
                return False
            self._held = True
            return True

    def release(self) -> None:
        with self._guard:
            if self._waiters:
                self._waiters.pop(0).set()  # the lock passes on without being free between
            else:
                self._held = False

    @property
    def held(self) -> bool:
        return self._held


class HeldRange:
    """A range that is held, or queued behind `blockers` earlier ranges."""

    __slots__ = ("blockers", "end", "start", "waiter")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.blockers = 0
        self.waiter: Waiter | None = None


class RangeLocks:
    """Exclusive byte ranges. Overlapping ranges are granted in the order they were asked for."""

    __slots__ = ("_guard", "_ranges", "_runtime")

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._guard = _thread.allocate_lock()
        self._ranges: list[HeldRange] = []  # in order of arrival

    async def acquire(self, start: int, end: int) -> HeldRange:
        """Wait until no earlier range overlaps [start, end), then hold it."""
        mine = HeldRange(start, end)
        with self._guard:
            for other in self._ranges:
                if other.start < end and start < other.end:
                    mine.blockers += 1
            self._ranges.append(mine)
            if not mine.blockers:
                return mine
            waiter = mine.waiter = self._runtime.waiter()
        try:
            await waiter.wait()
        except BaseException:
            self.release(mine)
            raise
        return mine

    def try_acquire(self, start: int, end: int) -> HeldRange | None:
        """Hold [start, end) if no other range overlaps it, else None."""
        mine = HeldRange(start, end)
        with self._guard:
            for other in self._ranges:
                if other.start < end and start < other.end:
                    return None
            self._ranges.append(mine)
        return mine

    def release(self, mine: HeldRange) -> None:
        with self._guard:
            position = self._ranges.index(mine)
            del self._ranges[position]
            for other in self._ranges[position:]:
                if other.start < mine.end and mine.start < other.end:
                    other.blockers -= 1
                    if not other.blockers and other.waiter is not None:
                        other.waiter.set()

    def __len__(self) -> int:
        return len(self._ranges)
