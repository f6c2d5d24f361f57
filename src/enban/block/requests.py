"""The life of a request: submitted, waiting, in flight, then exactly one end.

Each guest request is a `Request` in the `Ledger` of its disk from the moment the door
lets it in until it is done, failed or cancelled. The ledger shows what is in flight and
for how long, lets a caller drain the disk, and keeps the books: started always equals
done + failed + cancelled + in flight.

A server that answers many requests in one go enters them as a batch: one entry stands for
all of them while they touch the disk, and at its end says how many they were.
"""

from __future__ import annotations

import _thread
from time import perf_counter_ns

from ..errors import InternalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .runtime import Runtime, Waiter

# What a request does.
READ = "read"
WRITE = "write"
FLUSH = "flush"
DISCARD = "discard"
ZERO = "write-zeroes"
RESIZE = "resize"
VM_STATE = "vm-state"
BATCH = "batch"

ALL = float("inf")  # as a number to wait for: whatever comes

# Where a request is in its life.
SUBMITTED = "submitted"
WAITING = "waiting"
IN_FLIGHT = "in flight"
DONE = "done"
FAILED = "failed"
CANCELLED = "cancelled"


class Request:
    """One guest request. `started_ns` is on the monotonic clock, in nanoseconds."""

    __slots__ = ("length", "number", "offset", "operation", "started_ns", "state")

    def __init__(self, number: int, operation: str, offset: int, length: int) -> None:
        self.number = number
        self.operation = operation
        self.offset = offset
        self.length = length
        self.state = SUBMITTED
        self.started_ns = perf_counter_ns()

    @property
    def age_ns(self) -> int:
        return perf_counter_ns() - self.started_ns

    def __repr__(self) -> str:
        return f"<{self.operation} #{self.number} {self.offset:#x}+{self.length:#x} {self.state}>"


class Ledger:
    """All requests of one disk. Thread-safe.

    started, done, failed, cancelled: how many requests. newest: number of the newest entry.
    """

    __slots__ = (
        "_active",
        "_batches",
        "_drainers",
        "_guard",
        "_runtime",
        "cancelled",
        "done",
        "failed",
        "newest",
        "started",
    )

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._guard = _thread.allocate_lock()
        self._active: dict[int, Request] = {}  # by number, oldest first
        self._batches = 0
        self._drainers: list[tuple[float, Waiter]] = []  # (newest number waited for, who waits)
        self.newest = 0
        self.started = 0
        self.done = 0
        self.failed = 0
        self.cancelled = 0

    def begin(self, operation: str, offset: int, length: int) -> Request:
        with self._guard:
            self.started += 1
            self.newest = number = self.newest + 1
            request = self._active[number] = Request(number, operation, offset, length)
        return request

    def begin_batch(self, batch: Request | None = None) -> Request:
        """From here to `end_batch` the caller answers requests by the node's short cuts: what
        `locate` and `locate_write` tell it in between stays in place. Requests of the batch
        that pass the door after all are entered there like any other. batch: one that has
        ended, to be used again."""
        if batch is None:
            batch = Request(0, BATCH, 0, 0)
        else:
            batch.started_ns = perf_counter_ns()
        batch.state = IN_FLIGHT
        with self._guard:
            self.newest = batch.number = self.newest + 1
            self._active[batch.number] = batch
            self._batches += 1
        return batch

    def end_batch(self, batch: Request, done: int) -> None:
        """`done` requests were answered by short cuts, all of them successfully."""
        with self._guard:
            if self._active.pop(batch.number, None) is None:
                raise InternalError(f"{batch!r} ended twice", hint="please report this")
            self._batches -= 1
            self.started += done
            self.done += done
            batch.state = DONE
            if self._drainers:
                self._wake()

    def end(self, request: Request, error: BaseException | None = None) -> None:
        """Close a request's book. A second end is a bug and is refused."""
        with self._guard:
            if self._active.pop(request.number, None) is None:
                raise InternalError(f"{request!r} ended twice", hint="please report this")
            if error is None:
                self.done += 1
                request.state = DONE
            elif isinstance(error, Exception):
                self.failed += 1
                request.state = FAILED
            else:  # asyncio.CancelledError, KeyboardInterrupt, GeneratorExit
                self.cancelled += 1
                request.state = CANCELLED
            if self._drainers:
                self._wake()

    def withdraw(self, request: Request) -> None:
        """The request has to wait before it begins; it was never here."""
        with self._guard:
            del self._active[request.number]
            self.started -= 1
            if self._drainers:
                self._wake()

    def _wake(self) -> None:
        oldest, idle = self._oldest(), len(self._active) == self._batches
        waiting = self._drainers
        self._drainers = []
        for entry in waiting:
            if entry[0] < oldest or (idle and entry[0] == ALL):
                entry[1].set()
            else:
                self._drainers.append(entry)

    def _oldest(self) -> int:
        for number in self._active:
            return number
        return self.newest + 1

    @property
    def oldest(self) -> int:
        """Number of the oldest request in flight; one more than the newest if there is none."""
        with self._guard:
            return self._oldest()

    @property
    def in_flight(self) -> list[Request]:
        """What is in flight now, oldest first."""
        with self._guard:
            return list(self._active.values())

    async def drain(self) -> None:
        """Wait until every request that had begun before this call has ended."""
        with self._guard:
            if not self._active:
                return
            waiter = self._runtime.waiter()
            entry = (self.newest, waiter)
            self._drainers.append(entry)
        await self._wait(entry)

    async def rest(self) -> None:
        """Wait for a moment at which no request is in flight (batches apart)."""
        with self._guard:
            if len(self._active) == self._batches:
                return
            waiter = self._runtime.waiter()
            entry = (ALL, waiter)
            self._drainers.append(entry)
        await self._wait(entry)

    async def _wait(self, entry: tuple[float, Waiter]) -> None:
        waiter = entry[1]
        try:
            await waiter.wait()
        finally:
            with self._guard:
                if entry in self._drainers:
                    self._drainers.remove(entry)
