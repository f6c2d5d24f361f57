"""Where the guest's bytes lie: the read side of an image, and the short cuts of the hot path.

`locate`, `locate_write` and `lookup` answer from tables in memory and never wait; what they need and do
not find, `load` brings in. The rule: they take no lock. An entry is read once, or looked at again where
another thread may change it meanwhile, and the tables in `cache.overwritable` are those that may be
written through without a look at anything else.
"""

from __future__ import annotations

from ...block.locks import Mutex
from ...block.node import Node
from ...errors import CorruptImageError
from ...extent import UNALLOCATED, Extent
from ...wire.qcow2 import COMPRESSION_NAMES, EXTERNAL_DATA
from ...wire.qcow2_entries import ALL_ZERO, COMPRESSED, COPIED, OFFSET_MASK
from ..common.tables import L2Table, TableCache, from_big_endian
from .mapping import lookup_extended, lookup_standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array

    from ...block.bitmaps import Bits
    from ...block.runtime import Runtime
    from ...block.storage import Storage
    from ...units import GuestOffset, HostOffset
    from ...wire.qcow2 import Header
    from ...wire.qcow2_snapshots import SnapshotEntry

NOT_PLAIN = COMPRESSED | ALL_ZERO


class Places(Node):
    """An image's header and tables, as far as finding takes them.

    mutex: guards the tables in memory. tracked: the bits of dirty bitmaps in which writes are recorded.
    """

    format = "qcow2"

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        file: Storage,
        header: Header,
        l1: array[int],
        snapshots: list[SnapshotEntry],
        *,
        writable: bool,
    ) -> None:
        super().__init__(name, runtime, file, writable=writable)
        self.header = header
        self.snapshots = snapshots
        self.size = header.size
        self.cluster_bits = header.cluster_bits
        self.cluster_size = self.unit = header.cluster_size
        self.cluster_mask = self.cluster_size - 1
        self.extended = header.extended_l2
        self.grain_bits = self.cluster_bits - 5 if self.extended else self.cluster_bits
        self.grain = 1 << self.grain_bits
        self.l2_shift = self.cluster_bits + header.l2_entries.bit_length() - 1
        self.l2_mask = header.l2_entries - 1
        self.numbers = 2 if self.extended else 1  # array items an L2 entry takes
        self.codec = COMPRESSION_NAMES[header.compression]
        self.backing_name = header.backing_name.decode("utf-8", "surrogateescape")
        self.external = bool(header.incompatible & EXTERNAL_DATA)
        # Without an external data file no cluster can lie at offset 0, so the offset alone tells.
        self.present_mask = OFFSET_MASK | COPIED if self.external else OFFSET_MASK
        self.l1 = l1
        self.l1_dirty: set[int] = set()
        self.cache = TableCache(self.cluster_size)
        self.mutex = Mutex(runtime)
        self.tracked: tuple[Bits, ...] = ()

    def present(self, entry: int) -> bool:
        """Whether a standard L2 entry has a host cluster."""
        return bool(entry & self.present_mask)

    @property
    def may_show_backing(self) -> bool:
        """Whether unallocated clusters may read as something else than zeros."""
        return bool(self.header.backing_name) or self.backing is not None

    def locate(self, offset: GuestOffset, length: int) -> HostOffset:
        return self._place(self.cache.readable, offset, length)

    def locate_write(self, offset: GuestOffset, length: int) -> HostOffset:
        entries = self.cache.overwritable.get(offset >> self.l2_shift)
        if entries is None:
            return -1
        if not entries[(offset >> self.cluster_bits & self.l2_mask) * self.numbers] >> 63:
            return -1
        if self.tracked:
            self.mark(offset, length)
        return self._place(self.cache.overwritable, offset, length)

    def _place(self, tables: dict[int, array[int]], offset: GuestOffset, length: int) -> HostOffset:
        entries = tables.get(offset >> self.l2_shift)
        if entries is None:
            return -1
        inside = offset & self.cluster_mask
        if inside + length > self.cluster_size:
            return -1 if self.extended else self._place_run(entries, offset, inside + length)
        if self.extended:
            index = (offset >> self.cluster_bits & self.l2_mask) * 2
            entry = entries[index]
            first = inside >> self.grain_bits
            count = (inside + length - 1 >> self.grain_bits) - first + 1
            wanted = (1 << count) - 1 << first
            if entry & COMPRESSED or entries[index + 1] & (wanted | wanted << 32) != wanted:
                return -1
            if entries[index] != entry:  # changed meanwhile by another thread
                return -1
        else:
            entry = entries[offset >> self.cluster_bits & self.l2_mask]
            if entry & NOT_PLAIN:
                return -1
        host = entry & OFFSET_MASK
        if host & self.cluster_mask or not entry & self.present_mask:
            return -1
        return host + inside

    def _place_run(self, entries: array[int], offset: GuestOffset, length: int) -> HostOffset:
        """The place of several clusters that follow one another on the host too, with equal flags;
        `length` is from the start of the first."""
        bits = self.cluster_bits
        index = offset >> bits & self.l2_mask
        end = index + (length + self.cluster_mask >> bits)
        entry = expected = entries[index]
        host = entry & OFFSET_MASK
        if (
            end > len(entries)
            or entry & NOT_PLAIN
            or host & self.cluster_mask
            or not entry & self.present_mask
        ):
            return -1
        for found in entries[index + 1 : end]:
            expected += self.cluster_size
            if found != expected:
                return -1
        return host + (offset & self.cluster_mask)

    def lookup(self, offset: GuestOffset, length: int) -> Extent | None:
        index = offset >> self.l2_shift
        entries = self.cache.readable.get(index)
        if entries is None:
            if self.l1[index] & OFFSET_MASK:
                return None
            last = offset + length - 1 >> self.l2_shift
            while index < last and not self.l1[index + 1] & OFFSET_MASK:
                index += 1
            return Extent(offset, min(length, (index + 1 << self.l2_shift) - offset), UNALLOCATED, self)
        length = min(length, (index + 1 << self.l2_shift) - offset)
        if self.extended:
            return lookup_extended(self, entries, offset, length)
        return lookup_standard(self, entries, offset, length)

    async def load(self, offset: GuestOffset) -> None:
        async with self.mutex:
            await self.load_table(offset >> self.l2_shift)

    async def load_table(self, index: int) -> L2Table:
        """The L2 table of an L1 entry that has one; the mutex is held."""
        table = self.cache.tables.get(index)
        if table is None:
            offset = self.l1[index] & OFFSET_MASK
            table = L2Table(offset, await self.read_l2(offset), fresh=False)
            self.cache.insert(index, table)
        return table

    async def read_l2(self, offset: HostOffset) -> array[int]:
        """The entries of the L2 table at a host offset, from the file."""
        buffer = bytearray(self.cluster_size)
        await self.read_stored_l2(buffer, offset)
        return from_big_endian(buffer)

    async def read_stored_l2(self, buffer: bytearray, offset: HostOffset) -> None:
        """The L2 table at a host offset, as it is in the file, into a buffer of a cluster's size."""
        if offset & self.cluster_mask or not offset or offset + self.cluster_size > self.file.size():
            raise CorruptImageError(
                f"L2 table at {offset:#x} is not inside the file",
                path=self.name,
                hint="run: enban check -r all",
            )
        await self.file.read_into(buffer, offset)

    def mark(self, offset: GuestOffset, length: int) -> None:
        """Record in the bitmaps that a range is about to change."""
        for bits in self.tracked:
            bits.set(offset, length)
