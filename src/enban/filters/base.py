"""A storage that stands in front of another one and passes everything on.

A filter overrides only what it changes. Short cuts past `write` are not passed on (`write_now`,
`copy_from`, `plain_fd`): a filter answers that it cannot, and the bytes come through `write` like
all others. As a source a filter cannot be copied from either, because a storage only copies from
its own kind. A filter that changes reading overrides `read_now` and `read_into` together.
"""

from __future__ import annotations

from ..block.storage import Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable

    from ..block.bitmaps import Bitmaps
    from ..block.storage import ReadBuffer, WriteBuffer
    from ..units import HostOffset


class Filter(Storage):
    """below: the storage behind this one; closing the filter closes it."""

    def __init__(self, below: Storage) -> None:
        self.below = below
        self.name = below.name
        self.runtime = below.runtime
        self.writable = below.writable
        self.fixed_size = below.fixed_size

    @property
    def identity(self) -> Hashable:
        return self.below.identity

    def size(self) -> int:
        return self.below.size()

    def allocated(self) -> int:
        return self.below.allocated()

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        return self.below.read_now(buffer, offset)

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        await self.below.read_into(buffer, offset)

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        await self.below.write(buffer, offset)

    async def flush(self) -> None:
        await self.below.flush()

    def zeroes_fast(self) -> bool:
        return self.below.zeroes_fast()

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        await self.below.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: HostOffset, length: int) -> None:
        await self.below.discard(offset, length)

    async def truncate(self, size: int) -> None:
        await self.below.truncate(size)

    async def allocate(self, offset: HostOffset, length: int) -> None:
        await self.below.allocate(offset, length)

    async def bitmaps(self, offset: HostOffset, length: int) -> Bitmaps:
        return await self.below.bitmaps(offset, length)

    async def status(self, offset: HostOffset, length: int) -> tuple[bool, int]:
        return await self.below.status(offset, length)

    def lay_out(self, offset: HostOffset, length: int) -> bool:
        return self.below.lay_out(offset, length)

    def write_behind(self, offset: HostOffset, length: int) -> None:
        self.below.write_behind(offset, length)

    async def hold(self, *, writing: bool) -> None:
        await self.below.hold(writing=writing)

    async def close(self) -> None:
        await self.below.close()
