"""Guest memory and the split virtqueues in it, as a device sees them.

    descriptors   16 bytes each: 8 address, 4 length, 2 flags, 2 next
    available     2 flags, 2 index, 2 a descriptor's number ..., 2 used_event      the driver writes it
    used          2 flags, 2 index, (4 number, 4 length) ..., 2 avail_event        the device writes it

A driver is a stranger: it may change anything at any time. So each field is taken once and judged after that;
nothing is reached by an index or address that was not checked, and a chain ends after as many steps as the
ring has descriptors. What cannot be answered at all is a BrokenRing.

Source: VIRTIO 1.2, 2.7 "Split Virtqueues".
"""

from __future__ import annotations

from struct import Struct

from ..errors import PeerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Chain = list[tuple[int, int, int]]  # address, length, flags

DESCRIPTOR = Struct("<QIHH")
DESCRIPTOR_SIZE = DESCRIPTOR.size
_THREE = Struct("<QIHHQIHHQIHH")

NEXT = 1
WRITE = 2  # the device writes it
INDIRECT = 4

NO_NOTIFY = 1  # flag of the used ring: the driver need not kick
NO_INTERRUPT = 1  # flag of the available ring: the device need not call

MOST = 32768  # descriptors of a ring
MOST_INDIRECT = 1024  # descriptors of a table that one descriptor stands for
_U16 = 0xFFFF


class BrokenRing(PeerError):
    """The driver broke a rule so that there is no telling what it wants: the ring is stopped."""


class Memory:
    """Guest memory. parts: (first address, address behind, bytes), not overlapping."""

    __slots__ = ("parts",)

    def __init__(self, parts: Iterable[tuple[int, int, memoryview]] = ()) -> None:
        self.parts = tuple(parts)

    def at(self, address: int, length: int) -> memoryview | None:
        """The bytes of a range that lies in one part, else None."""
        for start, end, view in self.parts:
            if start <= address < end:
                if address + length > end:
                    return None
                return view[address - start : address - start + length]
        return None

    def pieces(self, address: int, length: int) -> list[memoryview] | None:
        """The bytes of a range that may go on in the next part; None if it leaves the memory."""
        found = []
        while length:
            for start, end, view in self.parts:
                if start <= address < end:
                    n = min(length, end - address)
                    found.append(view[address - start : address - start + n])
                    address += n
                    length -= n
                    break
            else:
                return None
        return found


class Ring:
    """One virtqueue's place in memory.

    size: descriptors. descriptors, available, used: its parts, exactly as long as they are.
    event_idx, indirect: what was negotiated.
    """

    __slots__ = (
        "_available",
        "_descriptors",
        "_used",
        "_used_pairs",
        "event_idx",
        "indirect",
        "mask",
        "memory",
        "size",
    )

    def __init__(
        self,
        size: int,
        memory: Memory,
        descriptors: memoryview,
        available: memoryview,
        used: memoryview,
        *,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        check_size(size)
        wanted = part_sizes(size)
        for part, length in zip((descriptors, available, used), wanted, strict=True):
            if len(part) != length:
                raise BrokenRing(f"a ring of {size} descriptors in parts of the wrong size")
        self.size = size
        self.mask = size - 1
        self.memory = memory
        self.event_idx = event_idx
        self.indirect = indirect
        self._descriptors = descriptors
        # Items of a cast view are loaded and stored whole, as the driver's counterpart expects.
        self._available = available.cast("H")
        self._used = used.cast("H")
        self._used_pairs = used[4 : 4 + 8 * size].cast("I")

    @property
    def available_index(self) -> int:
        """How many chains the driver has ever made available, modulo 2**16."""
        return self._available[1]

    @property
    def used_index(self) -> int:
        return self._used[1]

    def head(self, position: int) -> int:
        """The first descriptor of the chain at a position, which counts on and on."""
        return self._available[2 + (position & self.mask)]

    def waiting(self, position: int) -> int:
        """How many chains from `position` on are available. Raises BrokenRing if there cannot be so many."""
        count = (self._available[1] - position) & _U16
        if count > self.size:
            raise BrokenRing(f"{count} requests are said to be in a ring of {self.size}")
        return count

    def chain(self, head: int) -> Chain:
        """The descriptors of a chain: (address, length, flags). Raises BrokenRing."""
        table, index, count, steps = self._descriptors, head, self.size, self.size
        unpack = DESCRIPTOR.unpack_from
        found: Chain = []
        while steps:
            if index >= count:
                raise BrokenRing(f"descriptor {index} of {count}")
            address, length, flags, following = unpack(table, index << 4)
            if flags & INDIRECT:
                if not self.indirect or table is not self._descriptors or flags & NEXT:
                    raise BrokenRing("an indirect descriptor where there may be none")
                count, rest = divmod(length, DESCRIPTOR_SIZE)
                inner = None if rest or not 0 < count <= MOST_INDIRECT else self.memory.at(address, length)
                if inner is None:
                    raise BrokenRing(f"a table of descriptors of {length} bytes at {address:#x}")
                table, index, steps = inner, 0, count
                continue
            found.append((address, length, flags))
            if not flags & NEXT:
                return found
            index = following
            steps -= 1
        raise BrokenRing("a chain of descriptors without an end")

    def plain(self, head: int) -> tuple[int, int, int, int, int] | None:
        """A chain of the form that most have: 16 bytes to read, one piece of data, one byte to write, their
        descriptors side by side. (address of the first, of the data, its length, its flags, address of the
        byte); None if it is another or none at all, which `chain` tells."""
        if head + 2 >= self.size:
            return None
        a, al, af, an, b, bl, bf, bn, c, cl, cf, _ = _THREE.unpack_from(self._descriptors, head << 4)
        if af == INDIRECT and al == _THREE.size and self.indirect:
            start, end, view = self.memory.parts[0]
            if not start <= a <= end - al:
                return None
            head = 0
            a, al, af, an, b, bl, bf, bn, c, cl, cf, _ = _THREE.unpack_from(view, a - start)
        if af != NEXT or bf & ~WRITE != NEXT or cf != WRITE or al != 16 or cl != 1:
            return None
        return (a, b, bl, bf, c) if an == head + 1 and bn == head + 2 else None

    def put(self, position: int, head: int, written: int) -> None:
        """Give a chain back: `written` bytes were written into it. The driver sees it after `publish`."""
        place = (position & self.mask) * 2
        self._used_pairs[place] = head
        self._used_pairs[place + 1] = written

    def publish(self, position: int) -> None:
        """Everything before `position` is used."""
        self._used[1] = position & _U16

    def quiet(self) -> None:
        """The driver need not kick: we look by ourselves. (With event_idx this is the case anyway, until
        the index that `listen` named is passed.)"""
        if not self.event_idx:
            self._used[0] = NO_NOTIFY

    def listen(self, position: int) -> None:
        """The driver shall kick when it makes the chain at `position` available. The caller then has to
        look, with a full memory barrier in between, whether it is there already."""
        if self.event_idx:
            self._used[2 + 4 * self.size] = position & _U16
        else:
            self._used[0] = 0

    def wants_call(self, before: int, after: int) -> bool:
        """Whether the driver wants to be told that the used index went from `before` to `after`. A full
        memory barrier has passed since `publish`."""
        if self.event_idx:
            event = self._available[2 + self.size]
            return (after - event - 1) & _U16 < (after - before) & _U16
        return not self._available[0] & NO_INTERRUPT


def check_size(size: int) -> None:
    if not 0 < size <= MOST or size & (size - 1):
        raise BrokenRing(f"a ring of {size} descriptors; their number is a power of two, up to {MOST}")


def part_sizes(size: int) -> tuple[int, int, int]:
    """Bytes of the descriptors, the available and the used ring."""
    return DESCRIPTOR_SIZE * size, 6 + 2 * size, 6 + 8 * size
