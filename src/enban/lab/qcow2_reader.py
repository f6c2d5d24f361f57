"""A second, independent reader of qcow2: plain, straight from the specification.

It shares no code with the engine, so that both being wrong in the same way is unlikely. It takes
the bytes of an image and gives the guest's view and a check: how often each cluster is
referenced against how often it is counted, and the COPIED flags.

Thousands of images that differ in a few sectors are read with one `Memo`: what a table means is
worked out once for its bytes, and looked up when the same bytes come again.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

OFFSET = 0x00FFFFFFFFFFFE00
COPIED = 1 << 63
COMPRESSED = 1 << 62


@dataclass
class Report:
    """corruptions: one line each. leaks: cluster numbers counted higher than referenced."""

    corruptions: list[str] = field(default_factory=list)
    leaks: list[int] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.corruptions and not self.leaks


def _numbers(raw: bytes | bytearray | memoryview) -> array[int]:
    numbers = array("Q", bytes(raw))
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


class Table:
    """What the bytes of one L2 table say, whatever else is in the image.

    refers: (offset, length, what) of everything it points to. clusters: the same as host clusters,
    once for each reference. top: where the last of it ends. copied, plain: clusters whose entry has
    the COPIED flag, or has not. wrong: corruptions. holds: (guest offset inside the table's range,
    kind, place, length), kind "data", "zero" or "packed" (place: the entry)."""

    __slots__ = ("clusters", "copied", "holds", "plain", "refers", "top", "wrong")

    def __init__(self) -> None:
        self.refers: list[tuple[int, int, str]] = []
        self.clusters: list[int] = []
        self.top = 0
        self.copied: set[int] = set()
        self.plain: set[int] = set()
        self.wrong: list[str] = []
        self.holds: list[tuple[int, str, int, int]] = []


class Memo:
    """Tables and packed clusters by their bytes, for images of one geometry. Bounded."""

    __slots__ = ("blocks", "packed", "tables")

    MOST = 20_000

    def __init__(self) -> None:
        self.tables: dict[tuple[int, bytes], Table] = {}
        self.blocks: dict[tuple[int, bytes], dict[int, int]] = {}
        self.packed: dict[bytes, bytes] = {}

    def trim(self) -> None:
        for kept in (self.tables, self.blocks, self.packed):
            if len(kept) > self.MOST:
                kept.clear()


@dataclass
class Snapshot:
    name: str
    l1_offset: int
    l1_entries: int
    disk_size: int


@dataclass
class StoredBitmap:
    """in_use, auto: its flags. granularity: bytes a bit. table: its place and entries."""

    name: str
    in_use: bool
    auto: bool
    granularity: int
    table_offset: int
    table_entries: int


class Qcow2Reader:
    """An image in memory. `data_file`: the bytes of an external data file. Raises ValueError if broken."""

    def __init__(
        self,
        image: bytes | bytearray,
        *,
        data_file: bytes | bytearray | None = None,
        memo: Memo | None = None,
    ) -> None:
        self.image = image
        self.data_file = data_file
        self.memo = Memo() if memo is None else memo
        self.memo.trim()
        if image[:4] != b"QFI\xfb":
            raise ValueError("no magic")
        (
            self.version,
            backing_offset,
            backing_length,
            self.cluster_bits,
            self.size,
            self.crypt,
            self.l1_entries,
            self.l1_offset,
            self.table_offset,
            self.table_clusters,
            snapshot_count,
            snapshots_offset,
        ) = struct.unpack_from(">IQIIQIIQQIIQ", image, 4)
        self.backing_name = bytes(image[backing_offset : backing_offset + backing_length]).decode()
        self.incompatible = self.compatible = self.autoclear = 0
        self.refcount_bits, self.zstd = 16, False
        if self.version == 3:
            self.incompatible, self.compatible, self.autoclear, order, length = struct.unpack_from(
                ">QQQII", image, 72
            )
            self.refcount_bits = 1 << order
            self.zstd = length > 104 and image[104] == 1
        self.extended = bool(self.incompatible & 16)
        self.cluster = 1 << self.cluster_bits
        self.per_table = self.cluster // (16 if self.extended else 8)
        self.snapshots = self._read_snapshots(snapshots_offset, snapshot_count)

    def _read_snapshots(self, offset: int, count: int) -> list[Snapshot]:
        found = []
        self.snapshots_offset, at = offset, offset
        for _ in range(count):
            l1_offset, l1_entries, id_length, name_length = struct.unpack_from(">QIHH", self.image, at)
            (extra,) = struct.unpack_from(">I", self.image, at + 36)
            size = self.size
            if extra >= 16:
                (size,) = struct.unpack_from(">Q", self.image, at + 48)
            start = at + 40 + extra + id_length
            name = bytes(self.image[start : start + name_length]).decode()
            found.append(Snapshot(name, l1_offset, l1_entries, size))
            at = -(-(start + name_length) // 8) * 8
        self.snapshots_length = at - offset
        return found

    def bitmaps(self) -> list[StoredBitmap]:
        """The bitmap directory, if the header says that it counts. Raises ValueError if it is broken."""
        self.directory, self.directory_length = 0, 0
        if self.version < 3 or not self.autoclear & 1:
            return []
        (at,) = struct.unpack_from(">I", self.image, 100)
        while True:
            kind, length = struct.unpack_from(">II", self.image, at)
            if kind == 0:
                return []
            if kind == 0x23852875:
                break
            at += 8 + -(-length // 8) * 8
            if at > self.cluster:
                raise ValueError("a header extension does not fit")
        count, zero, self.directory_length, self.directory = struct.unpack_from(">IIQQ", self.image, at + 8)
        if zero or not count:
            raise ValueError("bitmaps extension")
        found, at = [], self.directory
        for _ in range(count):
            table, entries, flags, kind, bits, name_length, extra = struct.unpack_from(
                ">QIIBBHI", self.image, at
            )
            start = at + 24 + extra
            name = bytes(self.image[start : start + name_length]).decode()
            if kind != 1 or flags & ~3 or extra or not 9 <= bits <= 31 or not name:
                raise ValueError(f"bitmap {name!r}")
            found.append(StoredBitmap(name, bool(flags & 1), bool(flags & 2), 1 << bits, table, entries))
            at = -(-(start + name_length) // 8) * 8
        if at != self.directory + self.directory_length:
            raise ValueError("length of the bitmap directory")
        return found

    def dirty(self, bitmap: StoredBitmap) -> set[int]:
        """The granules that a bitmap says have changed."""
        bits = -(-self.size // bitmap.granularity)
        if bitmap.table_entries != max(1, -(-bits // (8 * self.cluster))):
            raise ValueError(f"bitmap {bitmap.name!r} has {bitmap.table_entries} entries")
        found = set()
        for index, entry in enumerate(self.table(bitmap.table_offset, bitmap.table_entries)):
            content = bytes([255 if entry == 1 else 0]) * self.cluster
            if entry > 1:
                content = bytes(self.image[entry : entry + self.cluster]).ljust(self.cluster, b"\0")
            first = index * self.cluster * 8
            for place in [place for place, byte in enumerate(content) if byte]:
                found |= {first + place * 8 + bit for bit in range(8) if content[place] >> bit & 1}
        return {bit for bit in found if bit < bits}

    def table(self, offset: int, entries: int) -> array[int]:
        raw = self.image[offset : offset + entries * 8]
        return _numbers(raw + bytes(entries * 8 - len(raw)))

    # -- tables ----------------------------------------------------------------------------

    def _l2(self, index: int, offset: int) -> Table:
        """The L2 table of an L1 entry."""
        raw = bytes(self.image[offset : offset + self.cluster])
        table = self.memo.tables.get((index, raw))
        if table is None:
            table = self.memo.tables[index, raw] = self._decode(index, raw)
        return table

    def _decode(self, index: int, raw: bytes) -> Table:
        table = Table()
        numbers = 2 if self.extended else 1
        words = _numbers(raw + bytes(self.cluster - len(raw)))
        for j in range(self.per_table):
            entry, bits = words[j * numbers], words[j * numbers + 1] if self.extended else 0
            if entry or bits:
                self._judge(table, index, j, entry, bits)
                self._hold(table, j * self.cluster, entry, bits)
        for offset, length, _ in table.refers:
            table.clusters.extend(range(offset // self.cluster, (offset + length - 1) // self.cluster + 1))
            table.top = max(table.top, offset + length)
        return table

    def _judge(self, table: Table, index: int, j: int, entry: int, bits: int) -> None:
        """What an entry refers to, and whether it may."""
        what, wrong = f"entry {j} of L2 table {index}", table.wrong
        if entry & COMPRESSED:
            start, end = self._packed_place(entry)
            table.refers.append((start, end - start, "packed data"))
            if entry & COPIED or bits:
                wrong.append(f"{what} is compressed with COPIED or subclusters")
            return
        if bits & bits >> 32:
            wrong.append(f"{what} has subclusters that are both data and zero")
        if bits & 0xFFFFFFFF and not entry & OFFSET and self.data_file is None:
            wrong.append(f"{what} has data subclusters without a cluster")
        if entry & 1 and (self.version == 2 or self.extended):
            wrong.append(f"{what} has a zero flag where there is none")
        if self.data_file is not None:
            at = (index * self.per_table + j) * self.cluster
            if entry & COPIED and entry & OFFSET != at:
                wrong.append(f"{what} does not lie at its guest offset in the data file")
        elif entry & OFFSET:
            offset = entry & OFFSET
            if offset % self.cluster:
                wrong.append(f"{what} at {offset:#x} is not at a cluster boundary")
            table.refers.append((offset, self.cluster, what))
            (table.copied if entry & COPIED else table.plain).add(offset // self.cluster)
        elif entry & COPIED:
            wrong.append(f"{what} has COPIED without a cluster")

    def _hold(self, table: Table, at: int, entry: int, bits: int) -> None:
        """What the guest sees through an entry; pieces that follow one another are joined."""
        host, holds = entry & OFFSET, table.holds

        def add(at: int, kind: str, place: int, length: int) -> None:
            if holds:
                last_at, last_kind, last_place, last = holds[-1]
                follows = kind == last_kind and last_at + last == at
                if follows and kind != "packed" and (kind == "zero" or last_place + last == place):
                    holds[-1] = (last_at, kind, last_place, last + length)
                    return
            holds.append((at, kind, place, length))

        if entry & COMPRESSED:
            add(at, "packed", entry, self.cluster)
        elif not self.extended:
            if entry & 1:
                add(at, "zero", 0, self.cluster)
            elif host or (self.data_file is not None and entry & COPIED):
                add(at, "data", host, self.cluster)
        else:
            part = self.cluster // 32
            for sub in range(32):
                if bits >> (32 + sub) & 1:
                    add(at + sub * part, "zero", 0, part)
                elif bits >> sub & 1:
                    add(at + sub * part, "data", host + sub * part, part)

    # -- the guest's view ------------------------------------------------------------------

    def read(self, *, backing: bytes = b"", snapshot: str = "") -> bytes:
        """The whole disk; `backing` is what the backing file shows (zeros after its end)."""
        l1_offset, l1_entries, size = self.l1_offset, self.l1_entries, self.size
        if snapshot:
            shot = next(s for s in self.snapshots if s.name == snapshot)
            l1_offset, l1_entries, size = shot.l1_offset, shot.l1_entries, shot.disk_size
        guest = bytearray(backing[:size])
        guest.extend(bytes(size - len(guest)))
        source = self.image if self.data_file is None else self.data_file
        span = self.per_table * self.cluster
        for i, l1 in enumerate(self.table(l1_offset, l1_entries)):
            base = i * span
            if not l1 & OFFSET or base >= size:
                continue
            for inside, kind, place, length in self._l2(i, l1 & OFFSET).holds:
                at = base + inside
                if at >= size:
                    break
                if kind == "data":
                    content: bytes | bytearray = source[place : place + length]
                    if len(content) < length:
                        content = content + bytes(length - len(content))
                elif kind == "zero":
                    content = bytes(length)
                else:
                    content = self._unpack(place)
                if at + length > size:
                    content = content[: size - at]
                guest[at : at + len(content)] = content
        return bytes(guest)

    def _packed_place(self, entry: int) -> tuple[int, int]:
        shift = 62 - (self.cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> shift
        return offset, (offset // 512 + sectors + 1) * 512

    def _unpack(self, entry: int) -> bytes:
        start, end = self._packed_place(entry)
        packed = bytes(self.image[start:end])
        content = self.memo.packed.get(packed)
        if content is None:
            if self.zstd:
                import io

                import zstandard

                content = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read(self.cluster)
            else:
                content = zlib.decompressobj(-12).decompress(packed, self.cluster)
            self.memo.packed[packed] = content
        return content

    # -- the check -------------------------------------------------------------------------

    def check(self) -> Report:
        """Refcounts against references, and COPIED flags of the active tables."""
        report = Report()
        wrong = report.corruptions
        size, length_of_file = self.cluster, len(self.image)
        counts = self._counts(report)
        used: list[int] = []  # host clusters, once for each reference

        def refer(offset: int, length: int, what: str) -> None:
            if offset % size:
                wrong.append(f"{what} at {offset:#x} is not at a cluster boundary")
            if offset + length - length_of_file >= size:
                wrong.append(f"{what} at {offset:#x} lies past the end of the file")
            used.extend(range(offset // size, (offset + length - 1) // size + 1))

        refer(0, size, "header")
        refer(self.table_offset, self.table_clusters * size, "refcount table")
        for entry in filter(None, self.table(self.table_offset, self.table_clusters * size // 8)):
            refer(entry, size, "refcount block")
        tables = [(self.l1_offset, self.l1_entries, True)]
        tables += [(s.l1_offset, s.l1_entries, False) for s in self.snapshots]
        if self.snapshots:
            refer(self.snapshots_offset, self.snapshots_length, "snapshot table")
        for bitmap in self.bitmaps():
            refer(bitmap.table_offset, bitmap.table_entries * 8, "bitmap table")
            for entry in self.table(bitmap.table_offset, bitmap.table_entries):
                if entry > 1:
                    refer(entry, self.cluster, "bitmap data")
        if self.directory_length:
            refer(self.directory, self.directory_length, "bitmap directory")
        copied: set[int] = set()
        single: set[int] = set()
        for l1_offset, l1_entries, active in tables:
            if l1_entries:
                refer(l1_offset, l1_entries * 8, "L1 table")
            for i, l1 in enumerate(self.table(l1_offset, l1_entries)):
                offset = l1 & OFFSET
                if not offset:
                    continue
                refer(offset, size, f"L2 table {i}")
                table = self._l2(i, offset)
                used += table.clusters
                wrong += table.wrong
                if table.top - length_of_file >= size:
                    wrong += self._past_the_end(table.refers)
                if active:
                    (copied if l1 & COPIED else single).add(offset // size)
                    copied |= table.copied
                    single |= table.plain
        self._compare(dict(Counter(used)), counts, report)
        ones = {cluster for cluster, count in counts.items() if count == 1}
        if not copied <= ones:
            wrong += self._flags(copied - ones, "set")
        if not single.isdisjoint(ones):
            wrong += self._flags(single & ones, "not set")
        return report

    def _past_the_end(self, refers: list[tuple[int, int, str]]) -> Iterable[str]:
        for offset, length, what in refers:
            if offset + length - len(self.image) >= self.cluster:
                yield f"{what} at {offset:#x} lies past the end of the file"

    def _flags(self, clusters: set[int], how: str) -> Iterable[str]:
        for cluster in sorted(clusters):
            yield f"COPIED is {how} for the cluster at {cluster * self.cluster:#x}, which is wrong"

    def _compare(self, references: dict[int, int], counts: dict[int, int], report: Report) -> None:
        if references == counts:
            return
        for cluster, wanted in references.items():
            if counts.get(cluster, 0) < wanted:
                report.corruptions.append(
                    f"cluster {cluster} has {wanted} references but is counted {counts.get(cluster, 0)}"
                )
        report.leaks = sorted(c for c, n in counts.items() if n > references.get(c, 0))

    def _counts(self, report: Report) -> dict[int, int]:
        """Clusters with a refcount that is not 0."""
        counts: dict[int, int] = {}
        for index, offset in enumerate(
            self.table(self.table_offset, self.table_clusters * self.cluster // 8)
        ):
            if not offset:
                continue
            if offset % self.cluster or offset + self.cluster > len(self.image):
                report.corruptions.append(f"refcount block {index} at {offset:#x} is not inside the file")
                continue
            raw = bytes(self.image[offset : offset + self.cluster])
            block = self.memo.blocks.get((index, raw))
            if block is None:
                block = self.memo.blocks[index, raw] = self._count_block(index, raw)
            counts.update(block)
        return counts

    def _count_block(self, index: int, raw: bytes) -> dict[int, int]:
        bits = self.refcount_bits
        first = index * (self.cluster * 8 // bits)
        raw = raw.rstrip(b"\0")  # counts are mostly zero behind the last one
        raw += bytes(-len(raw) % 8)
        values: list[int] | array[int]
        if bits < 8:
            values = [byte >> shift & (1 << bits) - 1 for byte in raw for shift in range(0, 8, bits)]
        else:
            values = array({8: "B", 16: "H", 32: "I", 64: "Q"}[bits], raw)
            if sys.byteorder == "little":
                values.byteswap()
        return {first + place: value for place, value in enumerate(values) if value}
