"""What an image's header leads to: which clusters its tables occupy, and which L2 tables there are.

The first part of a check. It reads everything but the L2 tables and the refcount blocks:
L1 tables (the active one and the snapshots'), the snapshot table, the refcount table, the
bitmap directory. Nothing read here is trusted: places outside the file are findings, tables
that share bytes are read once, so the work is bounded by the size of the file.

An L2 table that several L1 entries point to is kept once, with the number of references
from the active L1 table and from snapshots.
"""

from __future__ import annotations

from struct import Struct

from ...errors import CorruptImageError
from ...wire.qcow2 import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_RAW_DATA,
    EXT_BITMAPS,
    EXT_CRYPTO,
    EXTERNAL_DATA,
    MAX_L1_BYTES,
)
from ...wire.qcow2_bitmaps import parse_bitmap_directory, parse_bitmaps_extension, valid_table_entry
from ...wire.qcow2_entries import L1_RESERVED, OFFSET_MASK, REFTABLE_MASK
from ..common.tables import from_big_endian
from .check_counts import sweep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncIterator

    from ...units import Cluster, HostOffset
    from ..common.findings import Findings
    from .node import Qcow2Node

CHUNK = 1 << 20
FROM_SNAPSHOT = 1 << 40  # a reference from a snapshot; one from the active L1 table is 1
_ACTIVE = FROM_SNAPSHOT - 1
_MOST_EXTRA = 1024  # bytes of extra data in a snapshot table entry that QEMU accepts
_NEAR = 64 << 20  # bytes; a file may grow so far over what points past its end
_MOST_WEIGHT = 1 << 24

_SNAPSHOT_HEAD = Struct(">QIHH4s4s8s4sI")  # L1 offset, L1 entries, id length, name length, ..., extra length


class Image:
    """The figures of an image that a check works with.

    clusters: host clusters of the file, the last one perhaps cut short.
    grown: something that begins inside the file ends in the cluster after those.
    beyond: where the last region ends that was found past the end of the file, not too far from it.
    """

    def __init__(self, node: Qcow2Node) -> None:
        header = node.header
        self.name = node.name
        self.file = node.file
        self.header = header
        self.bits = header.cluster_bits
        self.cluster = header.cluster_size
        self.mask = header.cluster_size - 1
        self.set_file_size(node.file.size())
        self.order = header.refcount_order
        self.most_references = (1 << header.refcount_bits) - 1
        self.per_block = header.refcount_block_entries
        self.external = bool(header.incompatible & EXTERNAL_DATA)
        self.extended = header.extended_l2
        self.no_zero_flag = self.extended or header.version < 3
        self.grown = False
        self.beyond: HostOffset = 0

    def set_file_size(self, size: int) -> None:
        """Look at the image as it is, or as it will be, when its file is that long."""
        self.file_size = size
        self.clusters: Cluster = -(-size // self.cluster)

    @property
    def end(self) -> Cluster:
        """The cluster behind the last one that counts."""
        return self.clusters + self.grown

    def outside(self, offset: HostOffset, length: int) -> bool:
        """Whether a region reaches past the end of the file by a whole cluster or more; what
        reaches less far is as good as there (QEMU draws the line in the same place)."""
        if offset + length - self.file_size >= self.cluster:
            if offset < self.file_size + _NEAR:
                self.beyond = max(self.beyond, offset + length)
            return True
        if offset + length > self.clusters << self.bits:
            self.grown = True
        return False

    def span(self, offset: HostOffset, length: int) -> tuple[Cluster, Cluster]:
        """(first, end) of the clusters that a region touches."""
        return offset >> self.bits, (offset + length - 1 >> self.bits) + 1

    async def in_hole(self, offset: HostOffset, length: int) -> bool:
        """Whether a range is known to hold only zeros without reading it."""
        zero, known = await self.file.status(offset, length)
        return zero and known >= length

    async def words(
        self, offset: HostOffset, end: HostOffset, *, holes: bool = True
    ) -> AsyncIterator[tuple[HostOffset, array[int]]]:
        """The 8-byte numbers in a range, a chunk at a time with its offset; none from past the file's
        end. holes: False leaves out chunks that are holes of the file."""
        end = min(end, self.file_size + -self.file_size % 8)
        while offset < end:
            length = min(CHUNK, end - offset)
            if holes or not await self.in_hole(offset, length):
                yield offset, from_big_endian(await self.file.read(offset, length))
            offset += length


def sound(image: Image, entry: int, reserved: int) -> bool:
    """Whether an L1 entry or the L2 entry of a data cluster is what it should be but for its COPIED flag."""
    offset = entry & OFFSET_MASK
    return not (entry & reserved or offset & image.mask or offset >= image.file_size)


def never_durable(image: Image, entry: int) -> bool:
    """Whether an L1 entry is as a crash may leave it: sound, but pointing to a table past the end of
    the file, which therefore never was durable. Anything odder may be a damaged pointer to a good table."""
    offset = entry & OFFSET_MASK
    return not entry & L1_RESERVED and not offset & image.mask and image.outside(offset, image.cluster)


class Layout:
    """Places of all metadata.

    uses: (first, end, what) of clusters that hold anything but L2 tables, refcount blocks and bitmap data.
    l2: references to each L2 table by its offset, see FROM_SNAPSHOT; tables: their offsets in order.
    l1: the active L1 table. blocks: offsets of refcount blocks by index, 0 where there is none.
    block_clusters: how many entries of the refcount table point to each cluster, invalid ones left out.
    unreadable: indexes of blocks that are not at a cluster boundary.
    bitmap_tables: (start, end, weight) of parts of the file that bitmap tables occupy.
    lost: tables that are not, or not wholly, in the file, although something sound points to them.
    doubts: why there may be references that were not found: then nothing may be freed.
    rebuild: the refcount table or its blocks cannot be repaired in place.
    lost_tables: L1 entries to tables that never were durable, see `never_durable`.
    incomplete_snapshots: entries of the snapshot table without the fields that version 3 demands.
    """

    def __init__(self, image: Image, findings: Findings) -> None:
        self.image = image
        self.findings = findings
        self.uses: list[tuple[Cluster, Cluster, str]] = []
        self.l2: dict[HostOffset, int] = {}
        self.tables: list[HostOffset] = []
        self.l1: array[int] = from_big_endian(b"")
        self.l1_parts: list[tuple[HostOffset, HostOffset, int]] = []
        self.blocks: array[int] = from_big_endian(b"")
        self.block_clusters: dict[Cluster, int] = {}
        self.unreadable: set[int] = set()
        self.bitmap_tables: list[tuple[HostOffset, HostOffset, int]] = []
        self.lost: list[str] = []
        self.doubts: list[str] = []
        self.rebuild = False
        self.lost_tables = 0
        self.incomplete_snapshots = 0

    def active(self, offset: HostOffset) -> int:
        """How many entries of the active L1 table point to a table."""
        return min(self.l2[offset] & _ACTIVE, _MOST_WEIGHT)

    def weight(self, offset: HostOffset) -> int:
        """How many L1 entries point to a table, those of snapshots included."""
        references = self.l2[offset]
        return min((references & _ACTIVE) + (references >> 40), _MOST_WEIGHT)

    async def read(self) -> None:
        """Read it all. Raises HostError, PeerError."""
        header, image = self.image.header, self.image
        self._use(0, image.cluster, "header", table=False)
        l1_tables = [(header.l1_offset, header.l1_offset + header.l1_entries * 8, 1)]
        self._use(header.l1_offset, header.l1_entries * 8, "L1 table")
        l1_tables += await self._snapshots()
        await self._l1(l1_tables)
        start, length = header.refcount_table_offset, header.refcount_table_clusters * image.cluster
        self._use(start, length, "refcount table", table=False)
        self.rebuild = start + length > image.file_size
        self._crypto()
        await self._bitmaps()
        await self._blocks()
        if header.autoclear & ~(AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA):
            unknown = header.autoclear & ~(AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA)
            self.findings.add(
                "unknown-autoclear",
                88,
                f"autoclear feature bits {unknown:#x} are set, which this version does not know",
            )
            self.doubt("an unknown feature may own them")

    def _use(self, offset: HostOffset, length: int, what: str, *, table: bool = True) -> bool:
        """Note what occupies a region. False if it is not there. table: what it leads to is lost then,
        and if a part of it is not there."""
        if length <= 0:
            return True
        outside = self.image.outside(offset, length)
        if outside or (table and offset + length > self.image.file_size):
            text = f"{what} at {offset:#x} of {length} bytes reaches past the end of the file"
            self.findings.add("past-end" if outside else "cut-short", offset, text)
            if table:
                self.lost.append(what)
                self.doubt("tables are lost")
        if outside:
            return False
        first, end = self.image.span(offset, length)
        self.uses.append((first, end, what))
        return True

    # -- L1 tables and snapshots -----------------------------------------------------------

    async def _snapshots(self) -> list[tuple[HostOffset, HostOffset, int]]:
        """The snapshots' L1 tables; names are read only where one is needed for a finding."""
        image, header, findings = self.image, self.image.header, self.findings
        tables = []
        position = header.snapshots_offset
        for number in range(header.snapshot_count):
            position += -position % 8
            if position >= image.file_size:
                left = header.snapshot_count - number
                findings.add(
                    "snapshot-table", position, f"snapshot table ends before its last {left} entries"
                )
                self.doubt("snapshots are lost")
                self.lost.append("snapshot table")
                break
            head = await image.file.read(position, _SNAPSHOT_HEAD.size)
            l1_offset, entries, id_length, name_length, _, _, _, _, extra = _SNAPSHOT_HEAD.unpack(head)
            if extra > _MOST_EXTRA:
                findings.add("snapshot-table", position, f"snapshot {number} has {extra} bytes of extra data")
                self.doubt("the snapshot table is damaged")
                break
            if extra < 16 and header.version > 2:
                findings.add(
                    "snapshot-incomplete",
                    position,
                    f"snapshot {number} has no VM state size and disk size of its own",
                )
                self.incomplete_snapshots += 1
            position += _SNAPSHOT_HEAD.size + extra + id_length + name_length
            if image.external:
                findings.add(
                    "snapshot-external", position, f"snapshot {number} in an image with an external data file"
                )
            if l1_offset & image.mask or entries * 8 > MAX_L1_BYTES:
                findings.add(
                    "snapshot-l1",
                    position,
                    f"snapshot {number} has an L1 table of {entries} entries at {l1_offset:#x}",
                )
                self.doubt("a snapshot's tables are lost")
                continue
            if self._use(l1_offset, entries * 8, f"L1 table of snapshot {number}"):
                tables.append((l1_offset, l1_offset + entries * 8, FROM_SNAPSHOT))
        if header.snapshot_count:
            self._use(header.snapshots_offset, position - header.snapshots_offset, "snapshot table")
        return tables

    async def _l1(self, tables: list[tuple[HostOffset, HostOffset, int]]) -> None:
        header = self.image.header
        start, end = header.l1_offset, header.l1_offset + header.l1_entries * 8
        self.l1_parts = sweep([table for table in tables if table[0] < table[1]])
        for part_start, part_end, weight in self.l1_parts:
            async for offset, words in self.image.words(
                part_start, part_end, holes=start <= part_start < end
            ):
                if start <= offset < end:
                    self.l1.extend(words)
                for index, entry in enumerate(words):
                    if entry:
                        self._l1_entry(offset + index * 8, entry, weight)
        self.tables = sorted(self.l2)

    def _l1_entry(self, place: HostOffset, entry: int, weight: int) -> None:
        findings, image = self.findings, self.image
        times = (weight & _ACTIVE) + (weight >> 40)
        if entry & L1_RESERVED:
            findings.add("l1-reserved", place, f"L1 entry {entry:#x} has reserved bits set", times)
        offset = entry & OFFSET_MASK
        if not offset:
            findings.add("l1-no-table", place, f"L1 entry {entry:#x} has flags but no table", times)
            return
        if offset & image.mask:
            findings.add(
                "l1-unaligned", place, f"L1 entry points to {offset:#x}, which is not a cluster", times
            )
        outside = image.outside(offset, image.cluster)
        if outside:
            findings.add(
                "l1-past-end", place, f"L2 table at {offset:#x} lies past the end of the file", times
            )
        if never_durable(image, entry):
            self.lost_tables += 1
        elif outside or offset & image.mask:
            self.doubt("an L2 table is lost")
        if outside:
            return
        if offset + image.cluster > image.file_size:
            text = f"L2 table at {offset:#x} reaches past the end of the file"
            findings.add("cut-short", place, text, times)
            self.lost.append("L2 table")
            self.doubt("an L2 table is lost")
        self.l2[offset] = self.l2.get(offset, 0) + weight

    # -- the rest --------------------------------------------------------------------------

    def _crypto(self) -> None:
        data = self.image.header.extension(EXT_CRYPTO)
        if data is None:
            return
        if len(data) < 16:
            self.findings.add("crypto-header", -1, "the encryption header extension is cut short")
            self.doubt("the encryption header is lost")
            return
        offset, length = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:16], "big")
        self._use(offset, length, "encryption header", table=False)

    async def _bitmaps(self) -> None:
        header, image = self.image.header, self.image
        data = header.extension(EXT_BITMAPS)
        if data is None or not header.autoclear & AUTOCLEAR_BITMAPS:
            return  # without the bit the extension is out of date and owns nothing
        tables = []
        offset = -1
        try:
            count, length, offset = parse_bitmaps_extension(data, path=image.name)
            if offset & image.mask:
                raise CorruptImageError(f"bitmap directory at {offset:#x} is not at a cluster boundary")
            if not self._use(offset, length, "bitmap directory"):
                raise CorruptImageError("bitmap directory lies past the end of the file")
            entries = parse_bitmap_directory(await image.file.read(offset, length), count, path=image.name)
        except CorruptImageError as error:
            self.findings.add("bitmap-directory", offset, error.what)
            self.doubt("bitmaps are lost")
            return
        for entry in entries:
            start, size = entry.table_offset, entry.table_entries * 8
            fault = entry.fault(header.size, image.bits)
            if fault:
                self.findings.add("bitmap-table", offset + entry.place, fault)
                self.doubt("bitmaps are lost")
            elif self._use(start, size, f"table of bitmap {entry.name!r}"):
                tables.append((start, start + size, 1))
        self.bitmap_tables = sweep(tables)

    def bitmap_cluster(self, place: HostOffset, entry: int, weight: int, report: bool) -> Cluster:
        """The cluster that a bitmap table entry points to, -1 if none. report: say what is wrong."""
        image = self.image
        offset = entry & OFFSET_MASK
        if not valid_table_entry(entry, image.bits):
            if report:
                self.findings.add(
                    "bitmap-entry", place, f"bitmap table entry {entry:#x} is not valid", weight
                )
                self.doubt("bitmaps are lost")
            return -1
        if not offset:
            return -1
        if image.outside(offset, image.cluster):
            if report:
                self.findings.add(
                    "past-end", place, f"bitmap data at {offset:#x} lies past the end of the file", weight
                )
            return -1
        return offset >> image.bits

    async def _blocks(self) -> None:
        header, image, findings = self.image.header, self.image, self.findings
        start = header.refcount_table_offset
        blocks = self.blocks
        async for offset, words in image.words(start, start + header.refcount_table_clusters * image.cluster):
            blocks.extend(words)
            base = (offset - start) // 8
            if not any(words):
                continue
            for index, entry in enumerate(words, base):
                if not entry:
                    continue
                place = start + index * 8
                block = blocks[index] = entry & REFTABLE_MASK
                if block & image.mask:
                    self.unreadable.add(index)
                if entry & ~REFTABLE_MASK:
                    findings.add(
                        "block-reserved", place, f"refcount table entry {entry:#x} has reserved bits set"
                    )
                elif block & image.mask:
                    findings.add(
                        "block-unaligned", place, f"refcount block {index} at {block:#x} is not a cluster"
                    )
                elif block >> image.bits >= image.clusters:
                    findings.add(
                        "block-past-end",
                        place,
                        f"refcount block {index} at {block:#x} lies past the end of the file",
                    )
                else:
                    if block + image.cluster > image.file_size:
                        text = f"refcount block {index} at {block:#x} reaches past the end of the file"
                        findings.add("cut-short", place, text)
                        self.rebuild = True
                    cluster = block >> image.bits
                    self.block_clusters[cluster] = self.block_clusters.get(cluster, 0) + 1
                    continue
                self.rebuild = True

    def doubt(self, reason: str) -> None:
        if reason not in self.doubts:
            self.doubts.append(reason)
