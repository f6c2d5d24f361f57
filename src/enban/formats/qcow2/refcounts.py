"""Which host clusters are in use, and how often.

Refcounts live in refcount blocks, found through the refcount table. Everything here
changes memory only (under the image's mutex); `barrier` writes it out in order. New blocks
and tables are the exception: their space is written once when they are allocated, so that
a full disk shows at the write that needs them and not at the flush.

The rule kept here: a cluster handed out has a refcount of 0 everywhere, is no known
metadata, and is not in quarantine, because a freed cluster keeps its count until its
unlinking is durable and every request that might still use it has ended.
"""

from __future__ import annotations

import sys
from array import array

from ...errors import CorruptImageError, NoSpaceError, UnsupportedOperationError
from ...wire.qcow2 import MAX_REFCOUNT_TABLE_BYTES
from ...wire.qcow2_entries import REFTABLE_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.storage import Storage
    from ...units import Cluster, HostOffset
    from ...wire.qcow2 import Header

    # The refcount table, the places of metadata, and of each changed block: index, place, bytes, sectors.
    Memory = tuple[array[int], set[HostOffset], list[tuple[int, HostOffset, bytes, set[int]]]]

SECTOR_SHIFT = 9
_CACHE_BYTES = 16 << 20
_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}


class PackedCounts:
    """Refcounts of less than a byte; entry 0 is in the lowest bits of byte 0."""

    __slots__ = ("_bits", "_full", "_mask", "_raw", "_shift")

    def __init__(self, raw: bytes | bytearray, order: int) -> None:
        self._raw = bytearray(raw)
        self._bits = 1 << order
        self._shift = 3 - order  # log2 of the entries in a byte
        self._mask = (1 << self._bits) - 1
        fields = range(0, 8, self._bits)
        self._full = frozenset(b for b in range(256) if all(b >> f & self._mask for f in fields))

    def __len__(self) -> int:
        return len(self._raw) << self._shift

    def __getitem__(self, index: int) -> int:
        place = index & (1 << self._shift) - 1
        return self._raw[index >> self._shift] >> place * self._bits & self._mask

    def __setitem__(self, index: int, value: int) -> None:
        place = (index & (1 << self._shift) - 1) * self._bits
        byte = index >> self._shift
        self._raw[byte] = self._raw[byte] & ~(self._mask << place) | value << place

    def index(self, value: int, start: int = 0) -> int:
        """Position of the first entry equal to `value` (0); ValueError if there is none."""
        index = start
        while index < len(self):
            if value == 0 and self._raw[index >> self._shift] in self._full:
                index = (index >> self._shift) + 1 << self._shift
            elif self[index] == value:
                return index
            else:
                index += 1
        raise ValueError

    def uniform(self, first: int, count: int) -> bool:
        """Whether a run of entries is known to be all the same."""
        return False

    def values(self, first: int, count: int) -> list[int]:
        """A run of entries."""
        inside, per_byte = first & (1 << self._shift) - 1, 1 << self._shift
        raw = self._raw[first >> self._shift : (first + count - 1 >> self._shift) + 1]
        found = bytearray(len(raw) * per_byte)
        for place in range(per_byte):  # all the entries in one place of their bytes, at once
            found[place::per_byte] = raw.translate(
                bytes(byte >> place * self._bits & self._mask for byte in range(256))
            )
        return list(found[inside : inside + count])

    def store(self, values: list[int]) -> None:
        """Set the entries of an empty block, from the first one on."""
        per_byte = 1 << self._shift
        planes = bytes(values) + bytes(-len(values) % per_byte)
        packed = 0
        for place in range(per_byte):
            packed |= int.from_bytes(planes[place::per_byte], "big") << place * self._bits
        length = len(planes) // per_byte
        self._raw[:length] = packed.to_bytes(length, "big")

    def fill(self, first: int, count: int, value: int) -> None:
        for index in range(first, first + count):
            self[index] = value

    def big_endian(self, start: int, end: int) -> bytes:
        return bytes(self._raw[start:end])


class WideCounts:
    """Refcounts of one to eight bytes."""

    __slots__ = ("_items",)

    def __init__(self, raw: bytes | bytearray, order: int) -> None:
        self._items = array(_TYPECODES[order], bytes(raw))
        if sys.byteorder == "little":
            self._items.byteswap()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> int:
        return self._items[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._items[index] = value

    def index(self, value: int, start: int = 0) -> int:
        """Position of the first entry equal to `value` from `start` on; ValueError if there is none."""
        items = self._items
        if items[start : start + 64].count(value):
            return items.index(value, start)
        # In a full block the low bytes alone say that none is 0, at the speed of memory.
        size = items.itemsize
        lows = items[start:].tobytes()[0 if sys.byteorder == "little" else size - 1 :: size]
        position = lows.find(value & 0xFF)
        while position >= 0 and items[start + position] != value:
            position = lows.find(value & 0xFF, position + 1)
        if position < 0:
            raise ValueError("no such entry")
        return start + position

    def uniform(self, first: int, count: int) -> bool:
        """Whether a run of entries is known to be all the same."""
        items = self._items
        return items[first : first + count] == array(items.typecode, items[first : first + 1]) * count

    def values(self, first: int, count: int) -> list[int]:
        """A run of entries."""
        return self._items[first : first + count].tolist()

    def store(self, values: list[int]) -> None:
        """Set the entries of an empty block, from the first one on."""
        self._items[: len(values)] = array(self._items.typecode, values)

    def fill(self, first: int, count: int, value: int) -> None:
        self._items[first : first + count] = array(self._items.typecode, (value,)) * count

    def big_endian(self, start: int, end: int) -> bytes:
        size = self._items.itemsize
        part = self._items[start // size : end // size]
        if sys.byteorder == "little":
            part.byteswap()
        return part.tobytes()


def new_counts(raw: bytes | bytearray, order: int) -> PackedCounts | WideCounts:
    """The refcounts in the bytes of a block; each is 1 << order bits wide."""
    return PackedCounts(raw, order) if order < 3 else WideCounts(raw, order)


class Block:
    """A refcount block in memory. `dirty` holds the numbers of changed sectors; `fresh`
    means that the refcount table on disk does not know the block yet."""

    __slots__ = ("busy", "counts", "dirty", "fresh", "offset")

    def __init__(self, offset: HostOffset, counts: PackedCounts | WideCounts, *, fresh: bool) -> None:
        self.offset = offset
        self.counts = counts
        self.dirty: set[int] = set()
        self.fresh = fresh
        self.busy = 0  # a barrier is writing it: must stay in memory


class Refcounts:
    """The refcounts of one image.

    table: host offset of each refcount block, 0 where there is none.
    end: clusters from here on were never used; on a file they read as zeros.
    moved: where the refcount table is moving to, (offset, clusters), or None.
    metadata: offsets of clusters that hold tables; nothing else may be put there.
    """

    def __init__(self, file: Storage, header: Header, table: array[int], name: str) -> None:
        self.file = file
        self.header = header
        self.name = name
        self.table = table
        self.table_dirty: set[int] = set()
        self.moved: tuple[HostOffset, int] | None = None
        self.blocks: dict[int, Block] = {}
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.per_block = header.refcount_block_entries
        self.largest = (1 << header.refcount_bits) - 1
        self.hint: Cluster = 0
        self.end: Cluster = -(-file.size() // self.cluster_size)
        self.metadata: set[HostOffset] = set()

    # -- reading ---------------------------------------------------------------------------

    async def block(self, index: int) -> Block | None:
        """The block of clusters [index * per_block, ...), or None if there is none yet."""
        block = self.blocks.get(index)
        if block is not None:
            return block
        offset = self.table[index] & REFTABLE_MASK if index < len(self.table) else 0
        if not offset:
            return None
        if offset % self.cluster_size or offset + self.cluster_size > self.file.size():
            raise CorruptImageError(
                f"refcount block {index} at {offset:#x} is not inside the file",
                path=self.name,
                offset=self.header.refcount_table_offset + index * 8,
                hint="run: enban check -r all",
            )
        raw = await self.file.read(offset, self.cluster_size)
        block = self.blocks[index] = Block(offset, self._counts(raw), fresh=False)
        self._trim(index)
        return block

    def _counts(self, raw: bytes | bytearray) -> PackedCounts | WideCounts:
        return new_counts(raw, self.header.refcount_order)

    def _trim(self, keep: int) -> None:
        excess = len(self.blocks) - max(4, _CACHE_BYTES >> self.cluster_bits)
        if excess > 0:
            clean = [i for i, b in self.blocks.items() if not (b.dirty or b.fresh or b.busy) and i != keep]
            for index in clean[: excess + 8]:
                del self.blocks[index]

    async def get(self, cluster: Cluster) -> int:
        block = await self.block(cluster // self.per_block)
        return block.counts[cluster % self.per_block] if block else 0

    # -- changing --------------------------------------------------------------------------

    def _set(self, block: Block, first: int, count: int, value: int) -> None:
        block.counts.fill(first, count, value)
        self._touch(block, first, count)

    def _touch(self, block: Block, first: int, count: int) -> None:
        shift = SECTOR_SHIFT + 3 - self.header.refcount_order
        block.dirty.update(range(first >> shift, ((first + count - 1) >> shift) + 1))

    async def add(self, cluster: Cluster, change: int) -> int:
        """Change one count by +1 or -1; the new count. Raises CorruptImageError on an impossible one."""
        block = await self.block(cluster // self.per_block)
        index = cluster % self.per_block
        count = (block.counts[index] if block else 0) + change
        if block is None or count < 0:
            raise CorruptImageError(
                "a cluster in use has refcount 0",
                path=self.name,
                offset=cluster << self.cluster_bits,
                hint="run: enban check -r all",
            )
        if count > self.largest:
            raise UnsupportedOperationError(
                f"refcount would exceed {self.largest}",
                path=self.name,
                offset=cluster << self.cluster_bits,
                hint="use an image with a larger refcount width",
            )
        self._set(block, index, 1, count)
        if not count:
            self.hint = min(self.hint, cluster)
        return count

    async def add_run(self, cluster: Cluster, count: int, change: int) -> None:
        """`add` for adjacent clusters that all stay in use, at once where they have equal counts."""
        while count:
            first = cluster % self.per_block
            span = min(count, self.per_block - first)
            block = await self.block(cluster // self.per_block)
            value = block.counts[first] + change if block else 0
            if block is None or not 0 < value <= self.largest or not block.counts.uniform(first, span):
                span = 1
                await self.add(cluster, change)
            else:
                self._set(block, first, span, value)
            cluster += span
            count -= span

    async def drop_span(self, cluster: Cluster, count: int) -> tuple[int, int]:
        """Count adjacent clusters once less, as many as have equal counts: (how many, their count now)."""
        first = cluster % self.per_block
        span = min(count, self.per_block - first)
        block = await self.block(cluster // self.per_block)
        if block is None or not block.counts.uniform(first, span):
            span = 1
        left = (block.counts[first] if block else 0) - 1
        if block is None or left < 0:
            return 1, await self.add(cluster, -1)  # raises
        self._set(block, first, span, left)
        if not left:
            self.hint = min(self.hint, cluster)
        return span, left

    async def release(self, cluster: Cluster, count: int = 1) -> None:
        """Undo an allocation that nothing ever pointed to."""
        for position in range(cluster, cluster + count):
            await self.add(position, -1)
            self.metadata.discard(position << self.cluster_bits)

    def remember(self) -> Memory:
        """What `forget` goes back to: the disk's state and the counts that a barrier has yet to write."""
        size = self.cluster_size
        waiting = [
            (index, block.offset, block.counts.big_endian(0, size), set(block.dirty))
            for index, block in self.blocks.items()
            if block.dirty
        ]
        return array("Q", self.table), set(self.metadata), waiting

    def forget(self, memory: Memory) -> None:
        """Undo what was changed since `remember`; no block was written since, and no table moved."""
        self.table, self.metadata, waiting = memory
        self.blocks.clear()
        for index, offset, raw, dirty in waiting:
            block = self.blocks[index] = Block(offset, self._counts(raw), fresh=False)
            block.dirty = dirty
        self.table_dirty.clear()
        self.moved = None
        self.hint = 0

    # -- allocation ------------------------------------------------------------------------

    async def allocate(self, want: int) -> tuple[Cluster, int, bool]:
        """Up to `want` adjacent free clusters, first fit: (first, how many, read as zeros already).

        Raises NoSpaceError on a device that is full, CorruptImageError.
        """
        cluster = self.hint
        while True:
            index, first = divmod(cluster, self.per_block)
            block = await self.block(index)
            if block is None:
                await self._add_block(index, cluster)
                continue
            found = self._take(block, cluster, first, want)
            if found is not None:
                return found
            cluster = (index + 1) * self.per_block

    def allocate_now(self, want: int) -> tuple[Cluster, int, bool] | None:
        """As `allocate`, if the block it begins with is in memory and has room, else None."""
        index, first = divmod(self.hint, self.per_block)
        block = self.blocks.get(index)
        return None if block is None else self._take(block, self.hint, first, want)

    def _take(self, block: Block, start: Cluster, first: int, want: int) -> tuple[Cluster, int, bool] | None:
        """Free clusters of a block, whose entry `first` counts the cluster `start`; None if it has none."""
        counts = block.counts
        try:
            place = counts.index(0, first)
        except ValueError:
            return None
        cluster = start + place - first
        count = 1
        if want > 1:
            limit = min(want, self.per_block - place)
            if self.file.fixed_size:
                limit = min(limit, (self.file.size() >> self.cluster_bits) - cluster)
            while count < limit and not counts[place + count]:
                count += 1
        clean = self._claim(block, cluster, count)
        self.hint = cluster + count
        return cluster, count, clean

    def _vet(self, cluster: Cluster, count: int) -> None:
        """Refuse space that is not there, or that is free only because a count was lost."""
        end = cluster + count
        if self.file.fixed_size and end << self.cluster_bits > self.file.size():
            raise NoSpaceError("cannot allocate: the device is full", path=self.name, errno=28)
        if cluster < self.end:
            for position in range(cluster, end):
                if not position or position << self.cluster_bits in self.metadata:
                    raise CorruptImageError(
                        "metadata has refcount 0",
                        path=self.name,
                        offset=position << self.cluster_bits,
                        hint="run: enban check -r all",
                    )

    def _claim(self, block: Block, cluster: Cluster, count: int) -> bool:
        end = cluster + count
        self._vet(cluster, count)
        self._set(block, cluster % self.per_block, count, 1)
        clean = cluster >= self.end and not self.file.fixed_size
        self.end = max(self.end, end)
        return clean

    async def allocate_table(self, content: bytes) -> HostOffset:
        """One cluster of metadata, written with `content` at once so that its space is real."""
        cluster, _, _ = await self.allocate(1)
        offset = cluster << self.cluster_bits
        try:
            await self.file.write(content, offset)
        except BaseException:
            await self.release(cluster)
            raise
        self.metadata.add(offset)
        return offset

    async def allocate_adjacent(self, count: int) -> HostOffset:
        """`count` adjacent clusters of metadata, several at the end of the file; content undefined."""
        if count == 1:
            cluster, _, _ = await self.allocate(1)
            self.metadata.add(cluster << self.cluster_bits)
            return cluster << self.cluster_bits
        start = position = self.end
        while position < start + count:
            block = await self.block(position // self.per_block)
            if block is None:
                await self._add_block(position // self.per_block, position)
                start = position = self.end
                continue
            if block.counts[position % self.per_block]:  # leaked past the end of the file by a crash
                start = position + 1
            position += 1
        self._vet(start, count)
        for position in range(start, start + count):
            block = await self.block(position // self.per_block)
            assert block is not None
            self._claim(block, position, 1)
            self.metadata.add(position << self.cluster_bits)
        return start << self.cluster_bits

    async def _add_block(self, index: int, cluster: Cluster) -> None:
        """A refcount block for a range without one, at `cluster` in that range: it counts itself."""
        if index >= len(self.table):
            await self._grow_table(index)
            if index < len(self.table) and self.table[index]:
                return  # growing needed the same block
        offset = cluster << self.cluster_bits
        self._vet(cluster, 1)
        content = bytes(self.cluster_size)
        await self.file.write(content, offset)
        block = Block(offset, self._counts(content), fresh=True)
        self._claim(block, cluster, 1)
        self.blocks[index] = block
        self.table[index] = offset
        self.table_dirty.add(index)
        self.metadata.add(offset)

    async def _grow_table(self, index: int) -> None:
        """Make room in the refcount table for entry `index`; the move is completed by `barrier`.

        While the new table's own clusters are being allocated the table is already long in
        memory; if that fails, all that was added beyond the old length is forgotten again.
        """
        if (index + 1) * 8 > MAX_REFCOUNT_TABLE_BYTES:
            raise NoSpaceError(
                "the image cannot grow further: its refcount table is full",
                path=self.name,
                hint="use a larger cluster size",
                errno=27,
            )
        per_cluster = self.cluster_size // 8
        clusters = -(-(index + 1) // per_cluster)
        clusters = min(clusters + clusters // 2 + 1, MAX_REFCOUNT_TABLE_BYTES >> self.cluster_bits)
        old_length, old_end, old_moved = len(self.table), self.end, self.moved
        self.table.extend([0] * (clusters * per_cluster - old_length))
        offset = -1
        try:
            offset = await self.allocate_adjacent(clusters)
            await self.file.write(bytes(clusters << self.cluster_bits), offset)
        except BaseException:
            for position in range(clusters if offset >= 0 else 0):
                cluster = (offset >> self.cluster_bits) + position
                self.metadata.discard(cluster << self.cluster_bits)
                if cluster // self.per_block < old_length:
                    await self.release(cluster)
            for added in range(old_length, len(self.table)):
                if self.table[added]:
                    self.metadata.discard(self.table[added])
                    self.table_dirty.discard(added)
                    self.blocks.pop(added, None)
            del self.table[old_length:]
            # Only zeros were written there. Going on from further out each time would need more room
            # with each attempt, and never end on a disk that gets a little room now and then.
            self.end, self.moved = old_end, old_moved
            raise
        before, self.moved = self.moved, (offset, clusters)
        if before is not None:
            await self.release(before[0] >> self.cluster_bits, before[1])
