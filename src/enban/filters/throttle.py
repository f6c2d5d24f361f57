"""A storage with a speed limit: so many bytes and calls a second.

Each limit is a line of slots, as at a single counter: a call takes as many as it is large, and
goes when its turn comes. A burst of `burst_s` seconds' worth passes at once after a pause. Reads
and writes have limits of their own and one for both; flushes count as a call of neither.
"""

from __future__ import annotations

import _thread
import time

from ..errors import UsageError
from .base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..block.storage import ReadBuffer, Storage, WriteBuffer
    from ..units import HostOffset


class Limit:
    """A rate in units a second; 0 is no limit. Safe from many threads."""

    __slots__ = ("_burst_s", "_free_at", "_guard", "rate")

    def __init__(self, rate: float, burst_s: float = 0.1) -> None:
        if rate < 0 or burst_s < 0:
            raise UsageError("a limit cannot be negative")
        self.rate = rate
        self._burst_s = burst_s
        self._free_at = 0.0
        self._guard = _thread.allocate_lock()

    def take(self, units: int, now: float) -> float:
        """Seconds to wait before `units` may pass."""
        if not self.rate:
            return 0.0
        with self._guard:
            # What was not used for a while may be used at once, up to the burst.
            start = max(self._free_at, now - self._burst_s)
            self._free_at = start + units / self.rate
        return max(0.0, start - now)


class Throttle(Filter):
    """Limits in bytes (bps) and calls (iops) a second, for all, for reads, for writes; 0 is none.
    Zeroes and discards are calls without bytes."""

    def __init__(
        self,
        below: Storage,
        *,
        bps_total: float = 0,
        bps_read: float = 0,
        bps_write: float = 0,
        iops_total: float = 0,
        iops_read: float = 0,
        iops_write: float = 0,
        burst_s: float = 0.1,
    ) -> None:
        super().__init__(below)
        self._bytes, self._calls = Limit(bps_total, burst_s), Limit(iops_total, burst_s)
        self._read = Limit(bps_read, burst_s), Limit(iops_read, burst_s)
        self._write = Limit(bps_write, burst_s), Limit(iops_write, burst_s)

    async def _wait(self, own: tuple[Limit, Limit] | None, length: int) -> None:
        now = time.monotonic()
        seconds = max(self._bytes.take(length, now), self._calls.take(1, now))
        if own is not None:
            seconds = max(seconds, own[0].take(length, now), own[1].take(1, now))
        if seconds <= 0:
            return
        if self.runtime.blocking:
            await self.runtime.offload(time.sleep, seconds)
        else:
            import asyncio

            await asyncio.sleep(seconds)

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        return False

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        await self._wait(self._read, len(buffer))
        await self.below.read_into(buffer, offset)

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        await self._wait(self._write, len(buffer))
        await self.below.write(buffer, offset)

    async def flush(self) -> None:
        await self._wait(None, 0)
        await self.below.flush()

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        await self._wait(self._write, 0)
        await self.below.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: HostOffset, length: int) -> None:
        await self._wait(self._write, 0)
        await self.below.discard(offset, length)
