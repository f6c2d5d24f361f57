"""A storage whose calls fail when they are told to.

Before each call a decision is asked for: a function that sees the call and answers with a
`Fault` or with None. `fail_at` makes the usual one: the N-th call fails, once or from then on.
A torn write or a short read is a fault with `done`: so many bytes are moved before the error.

Every read is a call of its own, exactly once: `read_now` always says that it must wait, and
the decision is made in `read_into`. A `write_now` is a call too; if it fails or cannot, the
engine comes again with `write`, which is the next call.
"""

from __future__ import annotations

import _thread
import errno
import os

from ..errors import FlushFailedError, HostError, from_oserror
from .base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from ..block.storage import ReadBuffer, Storage, WriteBuffer
    from ..units import HostOffset

    Decide = Callable[["Call"], "Fault | None"]

READ = "read"
WRITE = "write"
FLUSH = "flush"
ZERO = "write zeroes"
DISCARD = "discard"
TRUNCATE = "set the size"
ALLOCATE = "reserve space"
CHANGES = (WRITE, FLUSH, ZERO, DISCARD, TRUNCATE, ALLOCATE)


class Call:
    """A call about to be made. number: 1 for the storage's first call, and so on.
    offset, length: its range in bytes; 0, 0 for a flush, the new size as offset for TRUNCATE."""

    __slots__ = ("length", "number", "offset", "operation")

    def __init__(self, number: int, operation: str, offset: HostOffset, length: int) -> None:
        self.number = number
        self.operation = operation
        self.offset = offset
        self.length = length

    def __repr__(self) -> str:
        return f"<#{self.number} {self.operation} {self.offset:#x}+{self.length:#x}>"


class Fault:
    """How a call fails. errno: EIO, ENOSPC, ...; done: bytes moved before the failure."""

    __slots__ = ("done", "errno")

    def __init__(self, errno: int = errno.EIO, *, done: int = 0) -> None:
        self.errno = errno
        self.done = done

    def error(self, call: Call, name: str) -> HostError:
        if call.operation == FLUSH:
            return FlushFailedError(
                f"flush failed: {os.strerror(self.errno).lower()}", path=name, errno=self.errno
            )
        return from_oserror(OSError(self.errno, ""), call.operation, name, call.offset)


def fail_at(
    number: int,
    *,
    operations: Container[str] = CHANGES,
    errno: int = errno.EIO,
    sticky: bool = False,
    done: int = 0,
) -> Decide:
    """A decision: of the calls that are one of `operations`, the `number`-th (from 1) fails,
    and with `sticky` every later one too."""
    seen = 0

    def decide(call: Call) -> Fault | None:
        nonlocal seen
        if call.operation not in operations:
            return None
        seen += 1
        if seen == number or (sticky and seen > number):
            return Fault(errno, done=done)
        return None

    return decide


class Faults(Filter):
    """decide: asked before each call, one call at a time, may be replaced at any time; None lets all
        succeed.
    calls: how many calls were made. injected: how many of them failed."""

    def __init__(self, below: Storage, decide: Decide | None = None) -> None:
        super().__init__(below)
        self.decide = decide
        self.calls = 0
        self.injected = 0
        self._guard = _thread.allocate_lock()

    def _ask(self, operation: str, offset: HostOffset, length: int) -> tuple[Call, Fault | None]:
        with self._guard:
            self.calls += 1
            call = Call(self.calls, operation, offset, length)
            fault = self.decide(call) if self.decide is not None else None
            if fault is not None:
                self.injected += 1
        return call, fault

    def _check(self, operation: str, offset: HostOffset, length: int) -> None:
        call, fault = self._ask(operation, offset, length)
        if fault is not None:
            raise fault.error(call, self.name)

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        return False

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        call, fault = self._ask(READ, offset, len(buffer))
        if fault is None:
            await self.below.read_into(buffer, offset)
            return
        if fault.done:
            await self.below.read_into(memoryview(buffer)[: fault.done], offset)
        raise fault.error(call, self.name)

    def write_now(self, buffer: ReadBuffer, offset: HostOffset) -> bool:
        call, fault = self._ask(WRITE, offset, len(buffer))
        if fault is None:
            return self.below.write_now(buffer, offset)
        if fault.done:
            self.below.write_now(memoryview(buffer)[: fault.done], offset)
        raise fault.error(call, self.name)

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        call, fault = self._ask(WRITE, offset, len(buffer))
        if fault is None:
            await self.below.write(buffer, offset)
            return
        if fault.done:
            await self.below.write(memoryview(buffer)[: fault.done], offset)
        raise fault.error(call, self.name)

    async def flush(self) -> None:
        self._check(FLUSH, 0, 0)
        await self.below.flush()

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        call, fault = self._ask(ZERO, offset, length)
        if fault is None:
            await self.below.write_zeroes(offset, length, unmap=unmap)
            return
        if fault.done:
            await self.below.write_zeroes(offset, min(fault.done, length), unmap=unmap)
        raise fault.error(call, self.name)

    async def discard(self, offset: HostOffset, length: int) -> None:
        self._check(DISCARD, offset, length)
        await self.below.discard(offset, length)

    async def truncate(self, size: int) -> None:
        self._check(TRUNCATE, size, 0)
        await self.below.truncate(size)

    async def allocate(self, offset: HostOffset, length: int) -> None:
        self._check(ALLOCATE, offset, length)
        await self.below.allocate(offset, length)
