"""qcow structures (version 1), bytes to fields and back.

All numbers are big-endian. The format has no published specification of its own; the
layout is that of Mark McLoughlin's page on the QCOW image format and of what QEMU reads
and writes. docs/formats/qcow.md tells it in our words.

    header        offset  size
    magic              0     4  "QFI\\xfb"
    version            4     4  1
    backing offset     8     8  where the backing file's name stands, 0 if none
    backing length    16     4  at most 1023
    mtime             20     4  of the backing file, once; QEMU writes 0
    size              24     8  virtual size in bytes
    cluster bits      32     1  cluster size = 1 << bits, 9..16
    L2 bits           33     1  entries in an L2 table = 1 << bits, 6..13
    padding           34     2
    crypt method      36     4  0 none, 1 AES
    L1 offset         40     8

The number of L1 entries is not stored: it is what the size needs. An L1 entry is the offset of
an L2 table or 0. An L2 entry is 0, the offset of a cluster (a multiple of 512), or, with bit 63,
the place of a packed cluster:

    bits 0 .. 62 - cluster bits      host offset of the packed data, any byte
    bits 63 - cluster bits .. 62     its length in bytes, less than a cluster
    bit 63                           1
"""

from __future__ import annotations

from struct import Struct

from ..errors import CorruptImageError, UnsupportedFeatureError

MAGIC = b"QFI\xfb"
HEADER = Struct(">4sIQIIQBBHIQ")

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 16
MIN_L2_BITS, MAX_L2_BITS = 6, 13
MAX_L1_BYTES = 64 << 20  # 16 TiB of guest with 4 KiB clusters and 512 entries a table
MAX_BACKING_NAME = 1023

CRYPT_NONE, CRYPT_AES = 0, 1
COMPRESSED = 1 << 63
PLACE_UNIT = 512  # plain clusters begin at multiples of this

# Fields that change in the life of an image. Each lies in the first 512 bytes, so one write of it
# is seen whole or not at all.
BACKING_AT, SIZE_AT, L1_AT = 8, 24, 40


class Header:
    """The header's fields. backing_name is filled in by whoever reads it from `backing_offset`."""

    __slots__ = (
        "backing_length",
        "backing_name",
        "backing_offset",
        "cluster_bits",
        "crypt_method",
        "l1_offset",
        "l2_bits",
        "mtime",
        "padding",
        "size",
    )

    def __init__(self) -> None:
        self.backing_offset = 0
        self.backing_length = 0
        self.backing_name = b""
        self.mtime = 0
        self.size = 0
        self.cluster_bits = 12
        self.l2_bits = 9
        self.padding = 0
        self.crypt_method = CRYPT_NONE
        self.l1_offset = 0

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Clusters that one L2 table maps."""
        return 1 << self.l2_bits

    @property
    def table_bytes(self) -> int:
        """Length of an L2 table."""
        return 8 << self.l2_bits

    def l1_entries_for(self, size: int) -> int:
        """L1 entries that a virtual size of `size` bytes needs."""
        return -(-size >> self.cluster_bits + self.l2_bits)

    @property
    def l1_entries(self) -> int:
        return self.l1_entries_for(self.size)

    @property
    def largest_size(self) -> int:
        """The largest virtual size in bytes whose L1 table we take."""
        return MAX_L1_BYTES // 8 << self.cluster_bits + self.l2_bits

    def build(self) -> bytes:
        """The fields and, where the header says so and it fits there, the backing file's name behind them."""
        fields = HEADER.pack(
            MAGIC,
            1,
            self.backing_offset,
            self.backing_length,
            self.mtime,
            self.size,
            self.cluster_bits,
            self.l2_bits,
            self.padding,
            self.crypt_method,
            self.l1_offset,
        )
        return fields + self.backing_name if self.backing_offset == HEADER.size else fields


def parse_header(data: bytes | bytearray, file_size: int, *, path: str = "") -> Header:
    """Read the header from the first 48 bytes of a file of `file_size` bytes.

    Every place it names lies inside the file, so the file bounds what reading it takes.
    Raises CorruptImageError or UnsupportedFeatureError.
    """

    def bad(what: str, offset: int, hint: str = "") -> CorruptImageError:
        return CorruptImageError(what, path=path, offset=offset, hint=hint)

    if len(data) < HEADER.size or data[:4] != MAGIC:
        raise CorruptImageError("not a qcow image (no header)", path=path)
    header = Header()
    (
        _,
        version,
        header.backing_offset,
        header.backing_length,
        header.mtime,
        header.size,
        header.cluster_bits,
        header.l2_bits,
        header.padding,
        header.crypt_method,
        header.l1_offset,
    ) = HEADER.unpack_from(data)
    if version != 1:
        raise UnsupportedFeatureError(f"version {version} is not qcow, which is version 1", path=path)
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        raise bad(f"cluster size 2^{header.cluster_bits} is outside 2^9..2^16", 32)
    if not MIN_L2_BITS <= header.l2_bits <= MAX_L2_BITS:
        raise bad(f"L2 table of 2^{header.l2_bits} entries is outside 2^6..2^13", 33)
    if header.crypt_method not in (CRYPT_NONE, CRYPT_AES):
        raise UnsupportedFeatureError(
            f"encryption method {header.crypt_method} is not known", path=path, offset=36
        )
    if header.size >= 1 << 63:
        raise bad(f"virtual size {header.size} is too large", SIZE_AT)
    l1_bytes = header.l1_entries * 8
    if l1_bytes and header.l1_offset < HEADER.size:
        raise bad("L1 table lies on the header", L1_AT)
    if header.l1_offset + l1_bytes > file_size:
        raise bad(
            f"L1 table of {header.l1_entries} entries at {header.l1_offset:#x}"
            f" reaches past the end of the file ({file_size} bytes)",
            L1_AT,
            "the image is cut short or its header is damaged",
        )
    if l1_bytes > MAX_L1_BYTES:
        raise UnsupportedFeatureError(
            f"virtual size {header.size} needs an L1 table of {l1_bytes} bytes, more than {MAX_L1_BYTES}",
            path=path,
            offset=SIZE_AT,
        )
    if header.backing_offset:
        if header.backing_length > MAX_BACKING_NAME:
            raise bad(
                f"backing file name of {header.backing_length} bytes is longer than {MAX_BACKING_NAME}", 16
            )
        if header.backing_offset + header.backing_length > file_size:
            raise bad("backing file name reaches past the end of the file", BACKING_AT)
    return header


def build_backing(offset: int, length: int) -> bytes:
    """The two fields at BACKING_AT."""
    return offset.to_bytes(8, "big") + length.to_bytes(4, "big")


def unpack_compressed(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, length in bytes) of a packed cluster."""
    shift = 63 - cluster_bits
    return entry & (1 << shift) - 1, (entry ^ COMPRESSED) >> shift


def pack_compressed(host: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of `length` packed bytes at `host`, which fit: less than a cluster, and
    `host` at most `largest_packed_host`."""
    return COMPRESSED | length << 63 - cluster_bits | host


def largest_packed_host(cluster_bits: int) -> int:
    """The largest offset that the L2 entry of a packed cluster can hold."""
    return (1 << 63 - cluster_bits) - 1
