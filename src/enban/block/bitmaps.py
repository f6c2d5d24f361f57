"""Dirty bitmaps: which parts of a disk changed since some moment.

A bitmap has one bit for each granule (a power of two of bytes). A bit that is set says "may
have changed"; a bit that is clear says "has not". The second must always be true, so a write
sets its bits before it changes anything, and whoever clears bits waits for the requests that
set them before it reads what they say.

`Bits` is the content, here in memory; `Bitmaps` is what a format that can keep them offers.
"""

from __future__ import annotations

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..units import GuestOffset

_LOOK = 512  # bytes of a chunk looked at in one go

_full: dict[int, bytes] = {}


def full_chunk(size: int) -> bytes:
    """`size` bytes of ones: the one object that stands for a chunk with every bit set."""
    chunk = _full.get(size)
    if chunk is None:
        chunk = _full[size] = b"\xff" * size
    return chunk


class Bits:
    """The bits of one bitmap, in chunks, of which those that are all clear take no memory and those
    that were set as a whole share theirs. Bit n is bit n % 8 of byte n // 8, as qcow2 stores it.

    size: of the disk in bytes. granularity_bits: 1 << it bytes a bit. chunk_size: bytes of a chunk, a
    power of two. Safe among threads.
    """

    __slots__ = ("_lock", "_mask", "_shift", "chunk_size", "chunks", "granularity_bits", "size")

    def __init__(self, size: int, granularity_bits: int, chunk_size: int) -> None:
        self.size = size
        self.granularity_bits = granularity_bits
        self.chunk_size = chunk_size
        self.chunks: dict[int, bytearray | bytes] = {}
        self._shift = chunk_size.bit_length() + 2  # log2 of the bits in a chunk
        self._mask = (1 << self._shift) - 1
        self._lock = _thread.allocate_lock()

    @property
    def bits(self) -> int:
        """How many bits the disk has."""
        return -(-self.size >> self.granularity_bits)

    def set(self, offset: GuestOffset, length: int) -> None:
        """The range changes. What lies past the disk's end has no bits."""
        first = offset >> self.granularity_bits
        last = offset + length - 1 >> self.granularity_bits
        if first == last:
            chunk = self.chunks.get(first >> self._shift)
            if chunk is not None and chunk[(first & self._mask) >> 3] >> (first & 7) & 1:
                return
        with self._lock:
            self._set(first, min(last, self.bits - 1))

    def _set(self, first: int, last: int) -> None:
        while first <= last:
            number = first >> self._shift
            end = min(last, (number + 1 << self._shift) - 1)
            a, b = first & self._mask, end & self._mask
            first = end + 1
            chunk = self.chunks.get(number)
            if not a and b == self._mask:
                self.chunks[number] = full_chunk(self.chunk_size)
                continue
            if chunk is None:
                chunk = self.chunks[number] = bytearray(self.chunk_size)
            elif isinstance(chunk, bytes):
                continue
            i, j = a >> 3, b >> 3
            low, high = 0xFF << (a & 7) & 0xFF, 0xFF >> 7 - (b & 7)
            if i == j:
                chunk[i] |= low & high
            else:
                chunk[i] |= low
                chunk[i + 1 : j] = b"\xff" * (j - i - 1)
                chunk[j] |= high

    def clear(self) -> None:
        with self._lock:
            self.chunks = {}

    def put(self, number: int, content: bytes | bytearray) -> None:
        """A chunk as it is stored; bits past the end do not count."""
        start = number << self._shift
        if content.count(0) == len(content) or start >= self.bits:
            return
        if start + self._mask < self.bits and content == full_chunk(self.chunk_size):
            self.chunks[number] = full_chunk(self.chunk_size)
            return
        self.chunks[number] = bytearray(content)
        self._cut()

    def _cut(self) -> None:
        """Drop what lies past the last bit."""
        bits = self.bits
        last = bits - 1 >> self._shift
        for number in [number for number in self.chunks if number > last]:
            del self.chunks[number]
        used = bits & self._mask
        chunk = self.chunks.get(last)
        if chunk is not None and used:
            kept = bytearray(chunk)
            if used & 7:
                kept[used >> 3] &= (1 << (used & 7)) - 1
            start = used + 7 >> 3
            kept[start:] = bytes(len(kept) - start)
            self.chunks[last] = kept

    def resize(self, size: int) -> None:
        """The disk has another size now; bits that are new are clear."""
        with self._lock:
            shorter = size < self.size
            self.size = size
            if shorter:
                self._cut()

    def copy(self) -> Bits:
        other = Bits(self.size, self.granularity_bits, self.chunk_size)
        with self._lock:
            other.chunks = {
                number: chunk if isinstance(chunk, bytes) else bytearray(chunk)
                for number, chunk in self.chunks.items()
            }
        return other

    def merge(self, other: Bits) -> None:
        """Set whatever is set in another bitmap of a disk of the same size."""
        if (other.granularity_bits, other.chunk_size) != (self.granularity_bits, self.chunk_size):
            for start, length in other.extents(0, other.size):
                self.set(start, length)
            return
        with self._lock:
            for number, chunk in list(other.chunks.items()):
                mine = self.chunks.get(number)
                if mine is None:
                    self.chunks[number] = chunk if isinstance(chunk, bytes) else bytearray(chunk)
                elif isinstance(chunk, bytes):
                    self.chunks[number] = chunk
                elif not isinstance(mine, bytes):
                    both = int.from_bytes(mine, "little") | int.from_bytes(chunk, "little")
                    mine[:] = both.to_bytes(self.chunk_size, "little")

    def run(self, offset: GuestOffset, end: GuestOffset) -> tuple[bool, GuestOffset]:
        """(whether the bit of `offset` is set, how far that goes on, at most to `end`)."""
        bit = offset >> self.granularity_bits
        stop = (end - 1 >> self.granularity_bits) + 1
        chunk = self.chunks.get(bit >> self._shift)
        dirty = chunk is not None and bool(chunk[(bit & self._mask) >> 3] >> (bit & 7) & 1)
        return dirty, min(end, self._next(bit, stop, not dirty) << self.granularity_bits)

    def _next(self, bit: int, stop: int, value: bool) -> int:
        """The first bit from `bit` on that has a value, or `stop`."""
        other = b"\0" if value else b"\xff"
        while bit < stop:
            chunk = self.chunks.get(bit >> self._shift)
            after = (bit >> self._shift) + 1 << self._shift
            if chunk is None or isinstance(chunk, bytes):
                if (chunk is not None) == value:
                    return bit
                bit = after
                continue
            inside = bit & self._mask
            byte = chunk[inside >> 3] if value else chunk[inside >> 3] ^ 0xFF
            byte >>= inside & 7
            if byte:
                return min(stop, bit + (byte & -byte).bit_length() - 1)
            place = (inside >> 3) + 1
            while place < self.chunk_size:
                part = chunk[place : place + _LOOK]
                same = len(part) - len(part.lstrip(other))
                place += same
                if same < len(part):
                    break
            bit += (place << 3) - inside  # at a bit that may do, or at the next chunk
        return stop

    def extents(self, offset: GuestOffset, length: int) -> Iterator[tuple[GuestOffset, int]]:
        """The parts of a range that are set, as (offset, length) in bytes."""
        end = offset + length
        while offset < end:
            dirty, stop = self.run(offset, end)
            if dirty:
                yield offset, stop - offset
            offset = stop


class BitmapInfo:
    """What is known of one bitmap. granularity: bytes a bit. enabled: writes are recorded.
    inconsistent: it was not closed properly, or is of a kind we do not know: it says nothing."""

    __slots__ = ("enabled", "granularity", "inconsistent", "name")

    def __init__(self, name: str, granularity: int, *, enabled: bool, inconsistent: bool) -> None:
        self.name = name
        self.granularity = granularity
        self.enabled = enabled
        self.inconsistent = inconsistent

    def __repr__(self) -> str:
        state = "inconsistent" if self.inconsistent else "enabled" if self.enabled else "disabled"
        return f"<bitmap {self.name!r} of {self.granularity} bytes, {state}>"


class Bitmaps:
    """The persistent bitmaps of an image. The changes below happen as a whole or not at all, whatever
    fails; during them no allocating write is in flight. All raise UsageError for a name that is not
    there (or, in `add`, is), and, but for `remove`, CorruptImageError for a bitmap that is inconsistent."""

    def infos(self) -> list[BitmapInfo]:
        raise NotImplementedError

    async def bits(self, name: str) -> Bits:
        """The content, alive: what is written to an enabled bitmap's disk shows in it."""
        raise NotImplementedError

    def vet(self, name: str, granularity: int) -> None:
        """Whether there could be such a bitmap: for who has other work to do before making it.
        Raises UsageError, UnsupportedOperationError."""
        raise NotImplementedError

    async def add(self, name: str, granularity: int, *, enabled: bool) -> None:
        """Make an empty bitmap."""
        raise NotImplementedError

    async def remove(self, name: str) -> None:
        raise NotImplementedError

    async def clear(self, name: str) -> None:
        raise NotImplementedError

    async def enable(self, name: str, on: bool) -> None:
        raise NotImplementedError

    async def merge(self, name: str, source: Bits) -> None:
        """Set in a bitmap whatever is set in `source`."""
        raise NotImplementedError

    async def restart(self, name: str, granularity: int) -> None:
        """A new, empty, enabled bitmap, in place of one of that name whatever state it is in."""
        raise NotImplementedError
