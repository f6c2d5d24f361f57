"""Dirty bitmaps of qcow2 version 3, bytes to fields and back (specification: "Bitmaps
extension", "Bitmaps", "Bitmap directory entry", "Bitmap table").

    header extension 0x23852875, counted only while autoclear bit 0 is set
      number 4 | 0 4 | directory bytes 8 | directory offset 8
    directory entry, padded to 8 bytes
      table offset 8 | table entries 4 | flags 4 | kind 1 | granularity bits 1 | name length 2 |
      extra length 4 | extra | name
    table entry
      0: a cluster of zeros, 1: a cluster of ones, else the offset of a cluster of bits
"""

from __future__ import annotations

from struct import Struct

from ..errors import CorruptImageError
from .qcow2_entries import OFFSET_MASK

_EXTENSION = Struct(">IIQQ")
_ENTRY = Struct(">QIIBBHI")

ENTRY_BYTES = _ENTRY.size  # before extra data and name
MAX_BITMAPS = 65535
MAX_NAME = 1023
MAX_DIRECTORY_BYTES = MAX_BITMAPS * (ENTRY_BYTES + MAX_NAME + 65)
MAX_BITMAP_BYTES = 512 << 20  # of one bitmap; QEMU takes no larger ones either
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31

IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4  # flags of a directory entry
DIRTY_TRACKING = 1  # kind

ALL_ONES = 1  # table entry
TABLE_RESERVED = 0xFF00_0000_0000_01FE


class BitmapEntry:
    """One entry of the bitmap directory. granularity: 1 << granularity_bits bytes a bit.

    place: where the entry begins, in bytes from the directory's start.
    """

    __slots__ = (
        "extra",
        "flags",
        "granularity_bits",
        "kind",
        "name",
        "place",
        "table_entries",
        "table_offset",
    )

    IN_USE, AUTO = IN_USE, AUTO

    def __init__(
        self,
        table_offset: int,
        table_entries: int,
        flags: int,
        kind: int,
        bits: int,
        name: str,
        extra: bytes = b"",
        place: int = 0,
    ) -> None:
        self.table_offset = table_offset
        self.table_entries = table_entries
        self.flags = flags
        self.kind = kind
        self.granularity_bits = bits
        self.name = name
        self.extra = extra
        self.place = place

    def copy(self) -> BitmapEntry:
        return BitmapEntry(
            self.table_offset,
            self.table_entries,
            self.flags,
            self.kind,
            self.granularity_bits,
            self.name,
            self.extra,
            self.place,
        )

    @property
    def encoded_name(self) -> bytes:
        return self.name.encode("utf-8", "surrogateescape")

    @property
    def understood(self) -> bool:
        """Whether it is a bitmap as we know them; any other is kept, but says nothing to us."""
        return (
            self.kind == DIRTY_TRACKING
            and not self.flags & ~(IN_USE | AUTO | EXTRA_COMPATIBLE)
            and (not self.extra or bool(self.flags & EXTRA_COMPATIBLE))
        )

    def fault(self, size: int, cluster_bits: int) -> str:
        """What is wrong with the numbers of an entry for a disk of `size` bytes; "" if nothing is."""
        what = f"bitmap {self.name!r}"
        if not 0 < len(self.encoded_name) <= MAX_NAME:
            return f"a bitmap's name of {len(self.encoded_name)} bytes is not possible"
        if not self.table_offset or self.table_offset & (1 << cluster_bits) - 1 or self.table_offset >> 56:
            return f"the table of {what} at {self.table_offset:#x} is not at a cluster boundary"
        if not 0 < self.table_entries << cluster_bits <= max(MAX_BITMAP_BYTES, 1 << cluster_bits):
            return f"{what} has a table of {self.table_entries} entries"
        if not self.understood:
            return ""
        if not MIN_GRANULARITY_BITS <= self.granularity_bits <= MAX_GRANULARITY_BITS:
            return f"{what} has a granularity of 2^{self.granularity_bits}, outside 2^9..2^31"
        needed = table_entries(size, self.granularity_bits, cluster_bits)
        if not self.flags & IN_USE and self.table_entries != needed:
            return f"{what} has a table of {self.table_entries} entries instead of {needed}"
        return ""


def table_entries(size: int, granularity_bits: int, cluster_bits: int) -> int:
    """Entries that the table of a bitmap has, for a disk of `size` bytes."""
    bits = -(-size >> granularity_bits)
    return max(1, -(-bits >> cluster_bits + 3))


def parse_bitmaps_extension(data: bytes, *, path: str = "") -> tuple[int, int, int]:
    """(number of bitmaps, directory length in bytes, directory offset). Raises CorruptImageError."""
    if len(data) < _EXTENSION.size:
        raise CorruptImageError("bitmaps extension is cut short", path=path)
    count, reserved, length, offset = _EXTENSION.unpack_from(data)
    if reserved or count > MAX_BITMAPS or length > MAX_DIRECTORY_BYTES:
        raise CorruptImageError("bitmaps extension is not valid", path=path)
    return count, length, offset


def build_bitmaps_extension(count: int, length: int, offset: int) -> bytes:
    return _EXTENSION.pack(count, 0, length, offset)


def parse_bitmap_directory(data: bytes | bytearray, count: int, *, path: str = "") -> list[BitmapEntry]:
    """The bitmap directory's entries. Raises CorruptImageError."""
    entries = []
    position = 0
    for number in range(count):
        end = position + ENTRY_BYTES
        if end > len(data):
            raise CorruptImageError(f"bitmap directory ends inside entry {number}", path=path)
        table, size, flags, kind, bits, name_length, extra_length = _ENTRY.unpack_from(data, position)
        extra = bytes(data[end : end + extra_length])
        name = bytes(data[end + extra_length : end + extra_length + name_length])
        if len(name) < name_length or len(extra) < extra_length:
            raise CorruptImageError(f"bitmap directory ends inside entry {number}", path=path)
        text = name.decode("utf-8", "surrogateescape")
        entries.append(BitmapEntry(table, size, flags, kind, bits, text, extra, position))
        position = -(-(end + extra_length + name_length) // 8) * 8
    return entries


def build_bitmap_directory(entries: list[BitmapEntry]) -> bytes:
    """The directory of these entries, whose `place` is set to where they stand in it."""
    out = bytearray()
    for entry in entries:
        entry.place = len(out)
        name = entry.encoded_name
        out += _ENTRY.pack(
            entry.table_offset,
            entry.table_entries,
            entry.flags,
            entry.kind,
            entry.granularity_bits,
            len(name),
            len(entry.extra),
        )
        out += entry.extra + name
        out += bytes(-len(out) % 8)
    return bytes(out)


def valid_table_entry(entry: int, cluster_bits: int) -> bool:
    """Whether a bitmap table's entry is one the specification knows."""
    offset = entry & OFFSET_MASK
    return not (entry & TABLE_RESERVED or (offset and (entry & ALL_ONES or offset & (1 << cluster_bits) - 1)))
