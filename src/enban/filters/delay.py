"""A storage that takes its time: a random wait before each call and another after it.

The wait after the call is what makes a slow disk interesting: the bytes have arrived and the
caller does not know yet. The times follow from a seed, so a run can be repeated. Inside an
event loop the task sleeps and others run; in the blocking runtime the thread sleeps.

A read never completes at once (`read_now` says no), so that reads are delayed as well.
"""

from __future__ import annotations

from random import Random

from .base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..block.storage import ReadBuffer, Storage, WriteBuffer
    from ..units import HostOffset


class Delay(Filter):
    """seed: of the times. most_s: the longest single wait in seconds. share: the part of the waits
    that is longer than nothing, 0 to 1; the others let other tasks run once and go on."""

    def __init__(self, below: Storage, seed: int = 0, *, most_s: float = 0.002, share: float = 1.0) -> None:
        super().__init__(below)
        self.most_s = most_s
        self.share = share
        self._random = Random(seed)

    async def wait(self) -> None:
        random = self._random
        seconds = random.random() * self.most_s if random.random() < self.share else 0.0
        if self.runtime.blocking:
            import time

            await self.runtime.offload(time.sleep, seconds)
        else:
            import asyncio

            await asyncio.sleep(seconds)

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        return False

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        await self.wait()
        await self.below.read_into(buffer, offset)
        await self.wait()

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        await self.wait()
        await self.below.write(buffer, offset)
        await self.wait()

    async def flush(self) -> None:
        await self.wait()
        await self.below.flush()
        await self.wait()

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        await self.wait()
        await self.below.write_zeroes(offset, length, unmap=unmap)
        await self.wait()

    async def discard(self, offset: HostOffset, length: int) -> None:
        await self.wait()
        await self.below.discard(offset, length)
        await self.wait()

    async def truncate(self, size: int) -> None:
        await self.wait()
        await self.below.truncate(size)
        await self.wait()

    async def allocate(self, offset: HostOffset, length: int) -> None:
        await self.wait()
        await self.below.allocate(offset, length)
        await self.wait()
