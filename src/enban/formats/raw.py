"""The raw format: the guest's bytes are the storage's bytes, at the same offsets.

Where the format of an image was guessed, a guest could write a header of another format
into the first sector and have the next guess open files of its choice; so a raw image
whose format was guessed refuses such a write, as QEMU does.
"""

from __future__ import annotations

from ..block.node import Node, Piece
from ..errors import UnsupportedOperationError, UsageError
from ..extent import DATA, Extent
from ..units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..block.bitmaps import Bitmaps
    from ..block.runtime import Runtime
    from ..block.storage import Storage
    from ..units import GuestOffset, HostOffset


class RawNode(Node):
    """A raw image, or a slice of one.

    offset, length: the part of the storage that is the disk, in bytes; None means to the end.
    probe: given when the format was guessed: names the format a first sector would be taken for.
    """

    format = "raw"

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        file: Storage,
        *,
        writable: bool,
        offset: int = 0,
        length: int | None = None,
        probe: Callable[[bytes], str] | None = None,
    ) -> None:
        super().__init__(name, runtime, file, writable=writable)
        room = file.size() - offset
        if offset < 0 or room < 0 or (length is not None and not 0 <= length <= room):
            raise UsageError(
                f"slice {offset}+{length} is outside the storage of {file.size()} bytes", path=name
            )
        self.base = offset
        self.sliced = length is not None or offset > 0
        self.size = room if length is None else length
        self._probe = probe
        if probe is not None:
            self.unit = SECTOR  # writes to the first sector are judged one after the other

    def follow_storage(self) -> None:
        """Take the size that the storage has now, of a disk that is all of it. No request is under way."""
        if not self.sliced:
            self.size = self.file.size()

    def locate(self, offset: GuestOffset, length: int) -> HostOffset:
        return self.base + offset

    def lookup(self, offset: GuestOffset, length: int) -> Extent:
        return Extent(offset, length, DATA, self, self.file, self.base + offset)

    def locate_write(self, offset: GuestOffset, length: int) -> HostOffset:
        if offset < SECTOR and self._probe is not None:
            return -1
        return self.base + offset

    async def vet(self, buffer: bytes | bytearray | memoryview, offset: GuestOffset) -> None:
        if offset < SECTOR and self._probe is not None:
            sector = await self.file.read(self.base, SECTOR)
            sector[offset : offset + len(buffer)] = buffer[: SECTOR - offset]
            other = self._probe(bytes(sector))
            if other != "raw":
                raise UsageError(
                    f"this write would make the raw image look like {other}",
                    path=self.name,
                    hint="open it with an explicit format raw if that is wanted",
                )

    async def reserve(self, offset: GuestOffset, length: int) -> list[Piece]:
        return [Piece(offset, length, self.file, self.base + offset, fill=False)]

    async def zero(self, offset: GuestOffset, length: int, *, unmap: bool) -> bool:
        await self.vet(bytes(min(length, SECTOR)), offset)
        await self.file.write_zeroes(self.base + offset, length, unmap=unmap)
        return True

    def zeroes_fast(self, *, unmap: bool) -> bool:
        return self.file.zeroes_fast()

    async def discard(self, offset: GuestOffset, length: int) -> None:
        # Zeros are what a hole reads as; saying so keeps the promise on storages without holes too.
        await self.vet(bytes(min(length, SECTOR)), offset)
        await self.file.write_zeroes(self.base + offset, length, unmap=True)

    async def holes(self) -> bool:
        return True

    async def bitmaps(self) -> Bitmaps:
        return await self.file.bitmaps(self.base, self.size)

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        if self.sliced:
            raise UnsupportedOperationError("a slice of an image cannot be resized", path=self.name)
        old = self.size
        await self.file.truncate(size)
        if size > old and preallocation != "off":
            try:
                await preallocate(self.file, old, size - old, preallocation)
            except BaseException:
                await self.file.truncate(old)
                raise
        self.size = size


async def preallocate(file: Storage, offset: HostOffset, length: int, mode: str) -> None:
    """Give a range of a storage space: `falloc` reserves it, `full` writes zeros to it."""
    if mode == "falloc":
        await file.allocate(offset, length)
    elif mode == "full":
        zeroes = bytes(min(length, 1 << 20))
        for position in range(offset, offset + length, len(zeroes) or 1):
            await file.write(memoryview(zeroes)[: offset + length - position], position)
    elif mode != "off":
        raise UsageError(f"preallocation '{mode}' is not possible here", hint="use off, falloc or full")
