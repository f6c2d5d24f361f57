"""A second, independent reader of qcow2 for the tests: slow, plain, straight from the specification.

It shares no code with enban, so that both being wrong in the same way is unlikely. It takes
the bytes of an image and gives the guest's view and a check: how often each cluster is
referenced against how often it is counted, and the COPIED flags.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
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


@dataclass
class Snapshot:
    name: str
    l1_offset: int
    l1_entries: int
    disk_size: int


class Qcow2Reader:
    """An image in memory. `data_file`: the bytes of an external data file. Raises ValueError if broken."""

    def __init__(self, image: bytes | bytearray, *, data_file: bytes | bytearray | None = None) -> None:
        self.image = image
        self.data_file = data_file
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

    def table(self, offset: int, entries: int) -> array[int]:
        raw = self.image[offset : offset + entries * 8]
        return _numbers(raw + bytes(entries * 8 - len(raw)))

    # -- the guest's view ------------------------------------------------------------------

    def read(self, *, backing: bytes = b"", snapshot: str = "") -> bytes:
        """The whole disk; `backing` is what the backing file shows (zeros after its end)."""
        l1_offset, l1_entries, size = self.l1_offset, self.l1_entries, self.size
        if snapshot:
            shot = next(s for s in self.snapshots if s.name == snapshot)
            l1_offset, l1_entries, size = shot.l1_offset, shot.l1_entries, shot.disk_size
        guest = bytearray(backing[:size])
        guest.extend(bytes(size - len(guest)))
        numbers = 2 if self.extended else 1
        for i, l1 in enumerate(self.table(l1_offset, l1_entries)):
            base = i * self.per_table * self.cluster
            if not l1 & OFFSET or base >= size:
                continue
            l2 = self.table(l1 & OFFSET, self.per_table * numbers)
            for j in range(self.per_table):
                at = base + j * self.cluster
                if at >= size:
                    break
                entry, bits = l2[j * numbers], l2[j * numbers + 1] if self.extended else 0
                if entry or bits:
                    self._put(guest, at, entry, bits)
        return bytes(guest[:size])

    def _put(self, guest: bytearray, at: int, entry: int, bits: int) -> None:
        if entry & COMPRESSED:
            self._place(guest, at, self._unpack(entry))
            return
        host = entry & OFFSET
        source = self.image if self.data_file is None else self.data_file
        if not self.extended:
            if entry & 1:
                self._place(guest, at, bytes(self.cluster))
            elif host or (self.data_file is not None and entry & COPIED):
                self._place(guest, at, self._bytes(source, host, self.cluster))
            return
        part = self.cluster // 32
        for sub in range(32):
            if bits >> (32 + sub) & 1:
                self._place(guest, at + sub * part, bytes(part))
            elif bits >> sub & 1:
                self._place(guest, at + sub * part, self._bytes(source, host + sub * part, part))

    def _place(self, guest: bytearray, at: int, content: bytes) -> None:
        content = content[: max(0, len(guest) - at)]
        guest[at : at + len(content)] = content

    @staticmethod
    def _bytes(source: bytes | bytearray, offset: int, length: int) -> bytes:
        raw = bytes(source[offset : offset + length])
        return raw + bytes(length - len(raw))

    def _packed_place(self, entry: int) -> tuple[int, int]:
        shift = 62 - (self.cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> shift
        return offset, (offset // 512 + sectors + 1) * 512

    def _unpack(self, entry: int) -> bytes:
        start, end = self._packed_place(entry)
        packed = bytes(self.image[start:end])
        if self.zstd:
            import io

            import zstandard

            return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read(self.cluster)
        return zlib.decompressobj(-12).decompress(packed, self.cluster)

    # -- the check -------------------------------------------------------------------------

    def check(self) -> Report:
        """Refcounts against references, and COPIED flags of the active tables."""
        report = Report()
        counts = self._counts(report)
        references: dict[int, int] = {}

        def refer(offset: int, length: int, what: str) -> None:
            if offset % self.cluster and what != "packed data":
                report.corruptions.append(f"{what} at {offset:#x} is not at a cluster boundary")
            if offset + length - len(self.image) >= self.cluster:
                report.corruptions.append(f"{what} at {offset:#x} lies past the end of the file")
            for cluster in range(offset // self.cluster, (offset + length - 1) // self.cluster + 1):
                references[cluster] = references.get(cluster, 0) + 1

        refer(0, self.cluster, "header")
        refer(self.table_offset, self.table_clusters * self.cluster, "refcount table")
        for entry in self.table(self.table_offset, self.table_clusters * self.cluster // 8):
            if entry:
                refer(entry, self.cluster, "refcount block")
        tables = [(self.l1_offset, self.l1_entries, True)]
        tables += [(s.l1_offset, s.l1_entries, False) for s in self.snapshots]
        if self.snapshots:
            refer(self.snapshots_offset, self.snapshots_length, "snapshot table")
        flags: list[tuple[int, bool, str]] = []
        for l1_offset, l1_entries, active in tables:
            if l1_entries:
                refer(l1_offset, l1_entries * 8, "L1 table")
            for i, l1 in enumerate(self.table(l1_offset, l1_entries)):
                if not l1 & OFFSET:
                    continue
                refer(l1 & OFFSET, self.cluster, f"L2 table {i}")
                if active:
                    flags.append((l1 & OFFSET, bool(l1 & COPIED), f"L2 table {i}"))
                self._check_l2(i, l1 & OFFSET, active, refer, flags, report)
        for cluster, wanted in references.items():
            if counts.get(cluster, 0) < wanted:
                report.corruptions.append(
                    f"cluster {cluster} has {wanted} references but is counted {counts.get(cluster, 0)}"
                )
        report.leaks = sorted(c for c, n in counts.items() if n > references.get(c, 0))
        for offset, copied, what in flags:
            if copied != (counts.get(offset // self.cluster, 0) == 1):
                report.corruptions.append(f"{what} at {offset:#x}: COPIED is {copied}, which is wrong")
        return report

    def _check_l2(
        self,
        i: int,
        offset: int,
        active: bool,
        refer: object,
        flags: list[tuple[int, bool, str]],
        report: Report,
    ) -> None:
        assert callable(refer)
        numbers = 2 if self.extended else 1
        l2 = self.table(offset, self.per_table * numbers)
        for j in range(self.per_table):
            entry = l2[j * numbers]
            bits = l2[j * numbers + 1] if self.extended else 0
            if not entry and not bits:
                continue
            what = f"entry {j} of L2 table {i}"
            if entry & COMPRESSED:
                start, end = self._packed_place(entry)
                refer(start, end - start, "packed data")
                if entry & COPIED or bits:
                    report.corruptions.append(f"{what} is compressed with COPIED or subclusters")
                continue
            if bits & bits >> 32:
                report.corruptions.append(f"{what} has subclusters that are both data and zero")
            if bits & 0xFFFFFFFF and not entry & OFFSET and self.data_file is None:
                report.corruptions.append(f"{what} has data subclusters without a cluster")
            if entry & 1 and (self.version == 2 or self.extended):
                report.corruptions.append(f"{what} has a zero flag where there is none")
            if self.data_file is not None:
                at = (i * self.per_table + j) * self.cluster
                if entry & COPIED and entry & OFFSET != at:
                    report.corruptions.append(f"{what} does not lie at its guest offset in the data file")
                continue
            if entry & OFFSET:
                refer(entry & OFFSET, self.cluster, what)
                if active:
                    flags.append((entry & OFFSET, bool(entry & COPIED), what))
            elif entry & COPIED:
                report.corruptions.append(f"{what} has COPIED without a cluster")

    def _counts(self, report: Report) -> dict[int, int]:
        bits = self.refcount_bits
        per_block = self.cluster * 8 // bits
        counts = {}
        table = self.table(self.table_offset, self.table_clusters * self.cluster // 8)
        for index, offset in enumerate(table):
            if not offset:
                continue
            if offset % self.cluster or offset + self.cluster > len(self.image):
                report.corruptions.append(f"refcount block {index} at {offset:#x} is not inside the file")
                continue
            raw = bytes(self.image[offset : offset + self.cluster]).rstrip(b"\0")
            raw += bytes(-len(raw) % 8)  # counts are mostly zero behind the last one
            values: list[int] | array[int]
            if bits < 8:
                values = [byte >> shift & (1 << bits) - 1 for byte in raw for shift in range(0, 8, bits)]
            else:
                values = array({8: "B", 16: "H", 32: "I", 64: "Q"}[bits], raw)
                if sys.byteorder == "little":
                    values.byteswap()
            for place, value in enumerate(values):
                if value:
                    counts[index * per_block + place] = value
        return counts
