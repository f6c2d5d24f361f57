"""The qcow2 header (versions 2 and 3) and its extensions, bytes to fields and back.

Entries of its tables are in `qcow2_entries`, the snapshot table in `qcow2_snapshots`, bitmaps in
`qcow2_bitmaps`. Rule kept: what is parsed is checked against the limits, and what is not understood is
carried along or refused by name.

All numbers are big-endian. The section names in the docstrings are those of the format's
published specification (docs/interop/qcow2.txt of QEMU); docs/formats/qcow2.md tells it in
our words.

    header        offset  size
    magic              0     4  "QFI\\xfb"
    version            4     4  2 or 3
    backing offset     8     8  where the backing file's name stands, 0 if none
    backing length    16     4  at most 1023
    cluster bits      20     4  cluster size = 1 << bits, 9..21
    size              24     8  virtual size in bytes
    crypt method      32     4  0 none, 1 AES, 2 LUKS
    L1 entries        36     4
    L1 offset         40     8
    refcount table    48     8  offset
      its clusters    56     4
    snapshots         60     4  number
      table offset    64     8
    -- version 3 --
    incompatible      72     8  feature bits
    compatible        80     8
    autoclear         88     8
    refcount order    96     4  refcount width = 1 << order bits, 0..6
    header length    100     4
    compression      104     1  0 zlib, 1 zstd
"""

from __future__ import annotations

from struct import Struct

from ..errors import CorruptImageError, UnsupportedFeatureError, UnsupportedOperationError

MAGIC = b"QFI\xfb"
HEADER_V2 = Struct(">4sIQIIQIIQQIIQ")
HEADER_V3 = Struct(">QQQII")
HEADER_V3_LENGTH = 104

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_BACKING_NAME = 1023
MAX_SNAPSHOTS = 65536

# Incompatible features: an image with one we do not know must not be opened.
DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = 1, 2, 4, 8, 16
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2
# Compatible features.
LAZY_REFCOUNTS = 1
# Autoclear features: a writer that does not know one clears it.
AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA = 1, 2

FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)

# Header extensions.
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

COMPRESSION_NAMES = {0: "zlib", 1: "zstd"}
COMPRESSION_NUMBERS = {name: number for number, name in COMPRESSION_NAMES.items()}


class Header:
    """The header's fields, its extensions in order as found, and the backing file's name.

    extensions: (type, data) pairs; unknown ones are carried along untouched.
    extra: bytes of a header longer than we know, kept.
    """

    __slots__ = (
        "autoclear",
        "backing_name",
        "cluster_bits",
        "compatible",
        "compression",
        "crypt_method",
        "extensions",
        "extra",
        "header_length",
        "incompatible",
        "l1_entries",
        "l1_offset",
        "refcount_order",
        "refcount_table_clusters",
        "refcount_table_offset",
        "size",
        "snapshot_count",
        "snapshots_offset",
        "version",
    )

    def __init__(self) -> None:
        self.version = 3
        self.backing_name = b""
        self.cluster_bits = 16
        self.size = 0
        self.crypt_method = 0
        self.l1_entries = 0
        self.l1_offset = 0
        self.refcount_table_offset = 0
        self.refcount_table_clusters = 0
        self.snapshot_count = 0
        self.snapshots_offset = 0
        self.incompatible = 0
        self.compatible = 0
        self.autoclear = 0
        self.refcount_order = 4
        self.header_length = 112
        self.compression = 0
        self.extra = b""
        self.extensions: list[tuple[int, bytes]] = []

    # Derived figures.

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Clusters that one L2 table maps."""
        return self.cluster_size // self.l2_entry_size

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def refcount_block_entries(self) -> int:
        return self.cluster_size * 8 >> self.refcount_order

    @property
    def l1_needed(self) -> int:
        """L1 entries that the virtual size needs."""
        return -(-self.size // (self.cluster_size * self.l2_entries))

    def extension(self, kind: int) -> bytes | None:
        for found, data in self.extensions:
            if found == kind:
                return data
        return None

    def set_extension(self, kind: int, data: bytes | None) -> None:
        """Replace an extension where it stands, add it at the end, or remove it (None)."""
        for index, (found, _) in enumerate(self.extensions):
            if found == kind:
                if data is None:
                    del self.extensions[index]
                else:
                    self.extensions[index] = (kind, data)
                return
        if data is not None:
            self.extensions.append((kind, data))

    def _fields(self, name_offset: int) -> bytes:
        return HEADER_V2.pack(
            MAGIC,
            self.version,
            name_offset,
            len(self.backing_name),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_entries,
            self.l1_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.snapshot_count,
            self.snapshots_offset,
        )

    def state(self) -> bytes:
        """Bytes 24 to 72 of the header: the size and where the tables are. All in one sector."""
        return self._fields(0)[24:]

    def build(self) -> bytes:
        """The header cluster's used part: fields, extensions, backing name.

        The feature name table, which only helps error messages, gives way where a cluster has no
        room for it. Raises UnsupportedOperationError if the rest does not fit in one cluster.
        """
        length = 72 if self.version == 2 else self.header_length
        tail = bytearray()
        for kind, data in self.extensions:
            tail += kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data + bytes(-len(data) % 8)
        if self.version > 2 or self.extensions:
            tail += bytes(8)
        name_offset = length + len(tail) if self.backing_name else 0
        out = bytearray(self._fields(name_offset))
        if self.version > 2:
            out += HEADER_V3.pack(
                self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length
            )
            if length > HEADER_V3_LENGTH:
                out += bytes([self.compression]) + self.extra
                out += bytes(length - len(out))
        out += tail + self.backing_name
        if len(out) > self.cluster_size:
            if self.extension(EXT_FEATURE_NAMES) is not None:
                self.set_extension(EXT_FEATURE_NAMES, None)
                return self.build()
            raise UnsupportedOperationError(
                f"the header needs {len(out)} bytes but a cluster has {self.cluster_size}",
                hint="use a larger cluster size or a shorter backing file name",
            )
        return bytes(out)


def feature_table() -> bytes:
    """The content of the feature name table extension, all features we know."""
    return b"".join(bytes((kind, bit)) + name.encode().ljust(46, b"\0") for kind, bit, name in FEATURE_NAMES)


def parse_header(data: bytes | bytearray, *, path: str = "") -> Header:
    """Read a header from the first cluster (or as much of it as there is).

    `data` should be at least min(cluster size, file size) bytes; call `header_span` first to
    learn how much that is. Raises CorruptImageError or UnsupportedFeatureError, by name.
    """

    def bad(what: str, offset: int | None = None) -> CorruptImageError:
        return CorruptImageError(what, path=path, offset=offset)

    header = Header()
    if len(data) < HEADER_V2.size or data[:4] != MAGIC:
        raise bad("not a qcow2 image (no header)")
    (
        _,
        header.version,
        name_offset,
        name_length,
        header.cluster_bits,
        header.size,
        header.crypt_method,
        header.l1_entries,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.snapshot_count,
        header.snapshots_offset,
    ) = HEADER_V2.unpack_from(data)
    if header.version not in (2, 3):
        raise UnsupportedFeatureError(f"qcow2 version {header.version} is not known", path=path)
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        raise bad(f"cluster size 2^{header.cluster_bits} is outside 2^9..2^21", 20)
    cluster_size = header.cluster_size
    if header.version == 2:
        header.header_length = 72
    else:
        if len(data) < HEADER_V3_LENGTH:
            raise bad("header is cut short")
        (
            header.incompatible,
            header.compatible,
            header.autoclear,
            header.refcount_order,
            header.header_length,
        ) = HEADER_V3.unpack_from(data, HEADER_V2.size)
        if header.header_length < HEADER_V3_LENGTH or header.header_length % 8:
            raise bad(f"header length {header.header_length} is not valid", 100)
        if header.header_length > min(cluster_size, len(data)):
            raise bad(f"header length {header.header_length} is more than a cluster", 100)
        if header.refcount_order > 6:
            raise bad(f"refcount width 2^{header.refcount_order} bits is more than 64", 96)
        if header.header_length > HEADER_V3_LENGTH:
            header.compression = data[HEADER_V3_LENGTH]
            header.extra = bytes(data[HEADER_V3_LENGTH + 1 : header.header_length])
    _parse_extensions(header, data, name_offset, bad)
    unknown = header.incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        raise UnsupportedFeatureError(
            f"the image needs {_feature_names(header, unknown)}",
            path=path,
            hint="use a newer program to open it",
        )
    if header.compression not in COMPRESSION_NAMES:
        raise UnsupportedFeatureError(f"compression type {header.compression} is not known", path=path)
    if header.compression and not header.incompatible & COMPRESSION_TYPE:
        raise bad("a compression type is set without its feature bit", 104)
    if header.extended_l2 and header.cluster_bits < 14:
        raise bad("extended L2 entries need clusters of 16 KiB or more", 72)
    if header.crypt_method > 2:
        raise UnsupportedFeatureError(f"encryption method {header.crypt_method} is not known", path=path)
    if name_offset:
        if name_length > MAX_BACKING_NAME:
            raise bad(f"backing file name of {name_length} bytes is longer than {MAX_BACKING_NAME}", 16)
        if name_offset + name_length > min(cluster_size, len(data)):
            raise bad("backing file name lies outside the header cluster", 8)
        header.backing_name = bytes(data[name_offset : name_offset + name_length])
        if b"\0" in header.backing_name:
            raise bad("backing file name holds a NUL byte", name_offset)
    _check_tables(header, bad)
    return header


def header_span(start: bytes | bytearray) -> int:
    """How many bytes of the file `parse_header` wants, from the first 512 of it."""
    if len(start) < HEADER_V2.size:
        return len(start)
    bits = int.from_bytes(start[20:24], "big")
    return 1 << bits if MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS else len(start)


def _parse_extensions(header: Header, data: bytes | bytearray, name_offset: int, bad: object) -> None:
    assert callable(bad)
    position = header.header_length
    end = min(header.cluster_size, len(data))
    if name_offset and position <= name_offset < end:  # a name may follow the header directly
        end = name_offset
    while position + 8 <= end:
        kind = int.from_bytes(data[position : position + 4], "big")
        length = int.from_bytes(data[position + 4 : position + 8], "big")
        if kind == EXT_END:
            return
        position += 8
        if length > end - position:
            raise bad(f"header extension {kind:#x} of {length} bytes does not fit", position - 8)
        header.extensions.append((kind, bytes(data[position : position + length])))
        position += -(-length // 8) * 8


def _feature_names(header: Header, bits: int) -> str:
    """Names of incompatible feature bits, from the image's own table where it has one."""
    table = header.extension(EXT_FEATURE_NAMES) or b""
    names = {
        table[i + 1]: table[i + 2 : i + 48].split(b"\0")[0].decode("ascii", "replace")
        for i in range(0, len(table) - 47, 48)
        if table[i] == 0
    }
    found = [
        f"feature '{name}' (bit {bit})" if (name := names.get(bit)) else f"an unnamed feature (bit {bit})"
        for bit in range(64)
        if bits >> bit & 1
    ]
    return ", ".join(found)


def _check_tables(header: Header, bad: object) -> None:
    assert callable(bad)
    cluster_size = header.cluster_size
    if header.size >= 1 << 63:
        raise bad(f"virtual size {header.size} is too large", 24)
    if header.l1_entries * 8 > MAX_L1_BYTES:
        raise bad(f"L1 table of {header.l1_entries} entries is larger than {MAX_L1_BYTES >> 20} MiB", 36)
    if header.l1_entries < header.l1_needed:
        raise bad(f"L1 table of {header.l1_entries} entries is too small for {header.size} bytes", 36)
    if header.l1_offset % cluster_size or header.l1_offset >= 1 << 56:
        raise bad("L1 table is not at a cluster boundary", 40)
    if header.l1_entries and not header.l1_offset:
        raise bad("L1 table lies on the header", 40)
    table_bytes = header.refcount_table_clusters * cluster_size
    if table_bytes > MAX_REFCOUNT_TABLE_BYTES:
        raise bad(
            f"refcount table of {table_bytes} bytes is larger than {MAX_REFCOUNT_TABLE_BYTES >> 20} MiB", 56
        )
    if not table_bytes:
        raise bad("the image has no refcount table", 56)
    if header.refcount_table_offset % cluster_size or not 0 < header.refcount_table_offset < 1 << 56:
        raise bad("refcount table is not at a cluster boundary", 48)
    if header.snapshot_count > MAX_SNAPSHOTS:
        raise bad(f"{header.snapshot_count} snapshots are more than {MAX_SNAPSHOTS}", 60)
    if header.snapshot_count and (header.snapshots_offset % cluster_size or not header.snapshots_offset):
        raise bad("snapshot table is not at a cluster boundary", 64)
