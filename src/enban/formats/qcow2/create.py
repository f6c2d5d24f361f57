"""Making a new qcow2 image.

    cluster 0        header
    then             refcount table, refcount blocks, L1 table

Everything else grows behind. The caller makes the file appear under its name only when
it is complete.
"""

from __future__ import annotations

from ...errors import UsageError
from ...wire.qcow2 import (
    AUTOCLEAR_RAW_DATA,
    COMPRESSION_NUMBERS,
    COMPRESSION_TYPE,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXT_FEATURE_NAMES,
    EXTENDED_L2,
    EXTERNAL_DATA,
    LAZY_REFCOUNTS,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    Header,
    feature_table,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.storage import Storage


class Qcow2Options:
    """Creation options, named as qemu-img's -o; sizes in bytes. `check` raises UsageError."""

    def __init__(
        self,
        size: int,
        *,
        compat: str = "1.1",
        cluster_size: int = 65536,
        refcount_bits: int = 16,
        lazy_refcounts: bool = False,
        compression_type: str = "zlib",
        extended_l2: bool = False,
        backing_file: str = "",
        backing_fmt: str = "",
        data_file: str = "",
        data_file_raw: bool = False,
        preallocation: str = "off",
    ) -> None:
        self.size = size
        self.compat = compat
        self.cluster_size = cluster_size
        self.refcount_bits = refcount_bits
        self.lazy_refcounts = lazy_refcounts
        self.compression_type = compression_type
        self.extended_l2 = extended_l2
        self.backing_file = backing_file
        self.backing_fmt = backing_fmt
        self.data_file = data_file
        self.data_file_raw = data_file_raw
        self.preallocation = preallocation

    def header(self) -> Header:
        """The header these options ask for, tables not placed yet. Raises UsageError."""
        header = Header()
        if self.compat not in ("0.10", "1.1", "v2", "v3"):
            raise UsageError(f"compat level '{self.compat}' is not known", hint="use 0.10 or 1.1")
        header.version = 2 if self.compat in ("0.10", "v2") else 3
        header.cluster_bits = self.cluster_size.bit_length() - 1
        if (
            not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS
            or 1 << header.cluster_bits != self.cluster_size
        ):
            raise UsageError(
                f"cluster size {self.cluster_size} is not possible",
                hint="use a power of two from 512 to 2M",
            )
        header.refcount_order = self.refcount_bits.bit_length() - 1
        if self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
            raise UsageError(
                f"refcount width {self.refcount_bits} is not possible", hint="use a power of two from 1 to 64"
            )
        if header.version == 2:
            self._refuse_in_version_2()
        if self.compression_type not in COMPRESSION_NUMBERS:
            raise UsageError(
                f"compression type '{self.compression_type}' is not known", hint="use zlib or zstd"
            )
        if self.extended_l2 and header.cluster_bits < 14:
            raise UsageError("extended L2 entries need clusters of at least 16 KiB")
        if self.preallocation not in ("off", "metadata", "falloc", "full"):
            raise UsageError(
                f"preallocation '{self.preallocation}' is not known", hint="use off, metadata, falloc or full"
            )
        if self.backing_file and self.preallocation != "off" and not self.extended_l2:
            raise UsageError("a backing file and preallocation go together only with extended_l2=on")
        if self.data_file_raw and not self.data_file:
            raise UsageError("data_file_raw=on needs a data_file")
        if self.data_file_raw and self.backing_file:
            raise UsageError("a raw data file and a backing file do not go together")
        header.size = self.size
        header.compression = COMPRESSION_NUMBERS[self.compression_type]
        if header.compression:
            header.incompatible |= COMPRESSION_TYPE
        if self.extended_l2:
            header.incompatible |= EXTENDED_L2
        if self.data_file:
            header.incompatible |= EXTERNAL_DATA
        if self.data_file_raw:
            header.autoclear |= AUTOCLEAR_RAW_DATA
        if self.lazy_refcounts:
            header.compatible |= LAZY_REFCOUNTS
        self._add_names(header)
        return header

    def _refuse_in_version_2(self) -> None:
        for wanted, name in (
            (self.refcount_bits != 16, "a refcount width other than 16"),
            (self.lazy_refcounts, "lazy_refcounts"),
            (self.compression_type != "zlib", f"compression type {self.compression_type}"),
            (self.extended_l2, "extended_l2"),
            (bool(self.data_file), "data_file"),
        ):
            if wanted:
                raise UsageError(f"{name} needs compat level 1.1", hint="use -o compat=1.1")

    def _add_names(self, header: Header) -> None:
        name = self.backing_file.encode("utf-8", "surrogateescape")
        if len(name) > MAX_BACKING_NAME:
            raise UsageError(f"backing file name is longer than {MAX_BACKING_NAME} bytes")
        if self.backing_fmt and not name:
            raise UsageError("a backing format needs a backing file")
        header.backing_name = name
        if self.backing_fmt:
            header.set_extension(EXT_BACKING_FORMAT, self.backing_fmt.encode())
        if self.data_file:
            header.set_extension(EXT_DATA_FILE, self.data_file.encode("utf-8", "surrogateescape"))
        if header.version > 2:
            header.set_extension(EXT_FEATURE_NAMES, feature_table())


def largest_size(header: Header) -> int:
    """The largest virtual size in bytes that the L1 table's limit allows."""
    return MAX_L1_BYTES // 8 * header.l2_entries * header.cluster_size


async def write_empty(file: Storage, header: Header) -> None:
    """Write an image without data to an empty storage. Raises UsageError, HostError."""
    cluster, entries_per_block = header.cluster_size, header.refcount_block_entries
    if header.size > largest_size(header):
        raise UsageError(
            f"a size of {header.size} bytes is too large for clusters of {cluster} bytes",
            path=file.name,
            hint=f"the limit is {largest_size(header)}; use a larger cluster size",
        )
    l1_clusters = max(1, -(-header.l1_needed * 8 // cluster))
    blocks = table = 1
    while True:
        total = 1 + table + blocks + l1_clusters
        need_blocks = -(-total // entries_per_block)
        need_table = -(-need_blocks * 8 // cluster)
        if (need_blocks, need_table) == (blocks, table):
            break
        blocks, table = max(blocks, need_blocks), max(table, need_table)
    if table * cluster > MAX_REFCOUNT_TABLE_BYTES:
        raise UsageError(
            "the refcount table would be too large", path=file.name, hint="use a larger cluster size"
        )
    header.refcount_table_offset, header.refcount_table_clusters = cluster, table
    first_block = (1 + table) * cluster
    header.l1_offset = first_block + blocks * cluster
    header.l1_entries = max(1, header.l1_needed)
    content = header.build()
    entries = b"".join((first_block + i * cluster).to_bytes(8, "big") for i in range(blocks))
    # Every table is written whole, zeros too: a full disk must show here and not when they come into use.
    await file.write(entries + bytes(table * cluster - len(entries)), cluster)
    for number in range(blocks):
        used = min(entries_per_block, total - number * entries_per_block)
        block = _ones(used, header.refcount_order)
        await file.write(block + bytes(cluster - len(block)), first_block + number * cluster)
    l1_bytes = header.l1_entries * 8
    for start in range(0, l1_bytes, 1 << 20):
        await file.write(bytes(min(1 << 20, l1_bytes - start)), header.l1_offset + start)
    await file.write(content + bytes(cluster - len(content)), 0)


def _ones(count: int, order: int) -> bytes:
    """The start of a refcount block whose first `count` entries are 1."""
    if order >= 3:
        return (b"\0" * ((1 << order - 3) - 1) + b"\1") * count
    from .refcounts import PackedCounts

    counts = PackedCounts(bytes(-(-count << order >> 3)), order)
    for index in range(count):
        counts[index] = 1
    return counts.big_endian(0, -(-count << order >> 3))
