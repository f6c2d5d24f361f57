"""One disk, or a slice of it, under a name: what it offers and where its bytes are allocated."""

from __future__ import annotations

from ...block.runtime import drive
from ...errors import UsageError
from ...extent import COMPRESSED, DATA, UNALLOCATED, ZERO
from ...storage.host import will_need
from ...units import align_down, align_up
from ...wire.nbd import Export
from ...wire.nbd.constants import (
    BASE_ALLOCATION,
    DEFAULT_MAX_PAYLOAD,
    FLAG_CAN_MULTI_CONN,
    FLAG_READ_ONLY,
    FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    STATE_HOLE,
    STATE_ZERO,
)
from .mapped import MappedReads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...block.bitmaps import Bits
    from ...block.door import Door
    from ...extent import Extent
    from ...units import GuestOffset
    from ...wire.nbd.messages import StatusExtent

ALLOCATION, DEPTH = 1, 2  # ids of the metadata contexts
ALLOCATION_DEPTH = "qemu:allocation-depth"
BITMAP_CONTEXT = "qemu:dirty-bitmap:"
CONTEXTS = {ALLOCATION: BASE_ALLOCATION, DEPTH: ALLOCATION_DEPTH}
FIRST_BITMAP = 3  # those of bitmaps follow
STATE_DIRTY = 1  # flag of a bitmap's context

# A block status reply stops at whichever comes first; the client asks again from there.
MOST_EXTENTS = 1 << 14
MOST_STEPS = 1 << 16


class ServedExport:
    """A disk behind its door, as it is offered to clients.

    name: "" is the default export. base, size: the slice, in bytes.
    bitmaps: names of the dirty bitmaps that clients can ask for, as contexts of their own.
    mapped: the connections that only read, answered from the file's pages.
    stable: whether a place in the image's file keeps its meaning while the export lives. Replies may then
        refer to the pages of the file: a write that comes before the client has read its reply is one
        that the read overlapped, but never bytes that belong to another part of the disk.
    """

    def __init__(
        self,
        door: Door,
        name: str = "",
        *,
        read_only: bool = False,
        offset: int = 0,
        size: int | None = None,
        description: str = "",
        multi_conn: bool = True,
        bitmaps: Sequence[str] = (),
    ) -> None:
        room = door.node.size - offset
        if offset < 0 or room < 0 or (size is not None and not 0 <= size <= room):
            raise UsageError(
                f"slice {offset}+{size or 0} is outside the disk of {door.node.size} bytes",
                path=door.node.name,
            )
        self.door = door
        self.bitmaps = list(dict.fromkeys(bitmaps))
        self.contexts = dict(CONTEXTS)  # names by number
        for number, bitmap in enumerate(self.bitmaps, FIRST_BITMAP):
            self._bits(bitmap)  # there must be such a bitmap, and it must be sound
            self.contexts[number] = BITMAP_CONTEXT + bitmap
        self.name = name
        self.description = description
        self.base = offset
        self._whole = size is None
        self.size = room if size is None else size
        self.read_only = read_only or not door.writable
        self.stable = not door.writable or door.node.format == "raw"
        self._multi_conn = multi_conn
        self.mapped = MappedReads(self)

    def follow_disk(self) -> None:
        """Take the size that the disk has now, if its end is the export's. Clients do not notice."""
        if self._whole:
            self.size = max(0, self.door.node.size - self.base)

    def offer(self) -> Export:
        """What a client is told. A flush on one connection covers what was written on all of
        them, because all go through one door: so several connections are always safe."""
        flags = FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_CACHE
        if self._multi_conn:
            flags |= FLAG_CAN_MULTI_CONN
        if self.read_only:
            flags |= FLAG_READ_ONLY
        else:
            flags |= FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO
        return Export(
            self.name,
            self.size,
            flags,
            description=self.description,
            min_block=1,
            preferred_block=4096,
            max_block=DEFAULT_MAX_PAYLOAD,
        )

    def _bits(self, name: str) -> Bits:
        return drive(drive(self.door.bitmaps()).bits(name))

    def _dirty(self, name: str, offset: GuestOffset, length: int, *, only_one: bool) -> list[StatusExtent]:
        end = offset + length
        bits = self._bits(name)
        extents: list[StatusExtent] = []
        while offset < end and len(extents) < (1 if only_one else MOST_EXTENTS):
            dirty, stop = bits.run(offset, end)
            extents.append((stop - offset, STATE_DIRTY if dirty else 0))
            offset = stop
        return extents

    def block_status(
        self, offset: GuestOffset, length: int, contexts: Sequence[int] = (), *, only_one: bool = False
    ) -> dict[int, list[StatusExtent]]:
        """By context, the extents of a range of the disk, which may end early, lengths in bytes."""
        end = offset + length
        found: dict[int, list[StatusExtent]] = {
            context: self._dirty(self.bitmaps[context - FIRST_BITMAP], offset, length, only_one=only_one)
            for context in contexts
            if context >= FIRST_BITMAP
        }
        if contexts and len(found) == len(contexts):
            return found
        found |= {ALLOCATION: [], DEPTH: []}
        closed: set[int] = set()  # with `only_one`: contexts whose first extent is complete
        steps = 0
        while offset < end and len(closed) < 2 and steps < MOST_STEPS:
            extent = drive(self.door.extent(offset, end - offset))
            run, allocation = _allocation(extent)
            depth = 0 if extent.kind == UNALLOCATED else extent.depth + 1
            for context, state in ((ALLOCATION, allocation), (DEPTH, depth)):
                extents = found[context]
                if context in closed:
                    continue
                if extents and extents[-1][1] == state:
                    extents[-1] = (extents[-1][0] + run, state)
                elif extents and (only_one or len(extents) >= MOST_EXTENTS):
                    closed.add(context)
                else:
                    extents.append((run, state))
            offset += run
            steps += 1
        return found

    def zeroes_fast(self, offset: GuestOffset, length: int, *, unmap: bool) -> bool:
        """Whether zeroing a range is sure to be faster than writing it: by tables, but for its edges."""
        node, end = self.door.node, offset + length
        last = end if end == node.size else align_down(end, node.grain)
        return align_up(offset, node.grain) < last and node.zeroes_fast(unmap=unmap)

    def prefetch(self, offset: GuestOffset, length: int) -> None:
        """Let the host read a range ahead, where it can."""
        end = offset + length
        while offset < end:
            extent = drive(self.door.extent(offset, end - offset))
            if extent.kind in (DATA, COMPRESSED) and extent.storage is not None:
                fd = extent.storage.plain_fd()
                if fd >= 0:
                    will_need(fd, extent.host, extent.packed or extent.length)
            offset += extent.length


def _allocation(extent: Extent) -> tuple[int, int]:
    """(bytes, flags of base:allocation). A hole in the file below a data extent is a hole too."""
    if extent.kind == UNALLOCATED:
        return extent.length, STATE_HOLE | STATE_ZERO
    if extent.kind == ZERO:
        return extent.length, STATE_ZERO if extent.storage is not None else STATE_HOLE | STATE_ZERO
    if extent.kind == DATA and extent.storage is not None:
        zero, run = drive(extent.storage.status(extent.host, extent.length))
        return min(run, extent.length), STATE_HOLE | STATE_ZERO if zero else 0
    return extent.length, 0
