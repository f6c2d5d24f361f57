"""One request of a guest, by all the rules.

What a guest asks for is checked here against the disk; what fails is answered with an error status and a line
in the log, and concerns that request alone. Data that takes more than one plain write is copied before it is
written: the guest may change its memory at any time, and what was judged must be what is written.
"""

from __future__ import annotations

from ...block.runtime import drive
from ...errors import EnbanError, NoSpaceError
from ...wire import virtio_blk as blk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...block.door import Door

    Views = list[memoryview]

BOUNCE = 1 << 20  # data that is not in one piece is moved by so many bytes


class NoRoom(Exception):
    """The host's file system is full, and somebody can make room: the request is to be tried again."""


class Device:
    """A disk as its guest sees it, for all of its queues.

    id: what GET_ID answers. features: those that were negotiated. writeback: the guest flushes by itself;
    else every write is durable when it is answered. on_full: called in a queue's thread when the host has
    no room; the queue then stands still until it is started anew. Without it the guest gets an error.
    """

    def __init__(
        self,
        door: Door,
        id: str,
        *,
        log: Callable[[str], None],
        on_full: Callable[[str], None] | None = None,
    ) -> None:
        self.door = door
        self.id = id
        self.log = log
        self.on_full = on_full
        self.features = 0
        self.writeback = True

    @property
    def writethrough(self) -> bool:
        if self.features & blk.F_CONFIG_WCE:
            return not self.writeback
        return not self.features & blk.F_FLUSH

    def answer(self, readable: Views, writable: Views) -> tuple[int, int]:
        """Carry out a request: (status, bytes written besides it). readable begins with the header; the
        status byte is no longer in writable. Raises NoRoom."""
        head, data = split(readable, blk.REQUEST.size)
        if len(head) < blk.REQUEST.size:
            self.log("a request without a header")
            return blk.IOERR, 0
        kind, _, sector = blk.REQUEST.unpack(head)
        try:
            return self._carry_out(kind, sector, data, writable)
        except (EnbanError, OSError, MemoryError) as error:
            self.log(f"{blk.NAMES.get(kind, kind)} at sector {sector} failed: {error}")
            if isinstance(error, NoSpaceError) and kind != blk.IN and self.on_full is not None:
                raise NoRoom(str(error)) from error
            return blk.IOERR, 0

    def _carry_out(self, kind: int, sector: int, data: Views, writable: Views) -> tuple[int, int]:
        door = self.door
        if kind == blk.IN:
            length = self._range(sector, writable, data)
            if length < 0:
                return blk.IOERR, 0
            self._read(sector << blk.SECTOR_BITS, writable, length)
            return blk.OK, length
        if kind == blk.OUT:
            if self._range(sector, data, writable) < 0:
                return blk.IOERR, 0
            offset = sector << blk.SECTOR_BITS
            for part in gathered(data, BOUNCE):
                drive(door.write(part, offset))
                offset += len(part)
            if self.writethrough:
                drive(door.flush())
            return blk.OK, 0
        if kind == blk.FLUSH:
            drive(door.flush())
            return blk.OK, 0
        if kind == blk.GET_ID:
            return blk.OK, _scatter(blk.pack_id(self.id), writable)
        if kind in (blk.DISCARD, blk.WRITE_ZEROES) and door.writable:
            return self._clear(kind, data), 0
        return blk.UNSUPP, 0

    def _range(self, sector: int, data: Views, others: Views) -> int:
        """Bytes of a read's or write's data, or -1 if it is not one that can be."""
        length = sum(map(len, data))
        outside = (sector << blk.SECTOR_BITS) + length > self.door.node.size
        return -1 if outside or others or not length or length % blk.SECTOR else length

    def _read(self, offset: int, data: Views, length: int) -> None:
        door = self.door
        if len(data) > 1 and length <= BOUNCE:
            buffer = bytearray(length)
            drive(door.read_into(buffer, offset))
            _scatter(buffer, data)
            return
        for part in data:
            drive(door.read_into(part, offset))
            offset += len(part)

    def _clear(self, kind: int, data: Views) -> int:
        """DISCARD and WRITE_ZEROES: all ranges are checked before the first is touched."""
        length = sum(map(len, data))
        count, rest = divmod(length, blk.RANGE.size)
        if rest or not 0 < count <= blk.MOST_RANGES:
            return blk.IOERR
        wanted = list(blk.RANGE.iter_unpack(b"".join(data)))
        for sector, sectors, flags in wanted:
            if flags & ~(blk.UNMAP if kind == blk.WRITE_ZEROES else 0):
                return blk.UNSUPP
            end = sector + sectors << blk.SECTOR_BITS
            if not 0 < sectors <= blk.MOST_RANGE_SECTORS or end > self.door.node.size:
                return blk.IOERR
        for sector, sectors, flags in wanted:
            offset, length = sector << blk.SECTOR_BITS, sectors << blk.SECTOR_BITS
            if kind == blk.DISCARD:
                drive(self.door.discard(offset, length))
            else:
                drive(self.door.write_zeroes(offset, length, unmap=bool(flags & blk.UNMAP)))
        if self.writethrough:
            drive(self.door.flush())
        return blk.OK


def split(views: Views, length: int) -> tuple[bytes, Views]:
    """A copy of the first bytes, `length` of them if there are so many, and the rest."""
    found = b""
    for number, view in enumerate(views):
        missing = length - len(found)
        found += view[:missing]
        if len(view) > missing:
            return found, [view[missing:], *views[number + 1 :]]
        if len(found) == length:
            return found, views[number + 1 :]
    return found, []


def gathered(views: Views, most: int) -> Iterator[bytes]:
    """Copies of all the bytes, in parts of at most `most`."""
    parts: Views = []
    length = 0
    for whole in views:
        view = whole
        while len(view):
            part = view[: most - length]
            parts.append(part)
            length += len(part)
            view = view[len(part) :]
            if length == most:
                yield b"".join(parts)
                parts, length = [], 0
    if parts:
        yield b"".join(parts)


def _scatter(data: bytes | bytearray, views: Views) -> int:
    """Spread bytes over the views; how many found room."""
    done = 0
    for view in views:
        part = data[done : done + len(view)]
        view[: len(part)] = part
        done += len(part)
    return done
