"""Opening a qcow2 image: header, tables and the checks at the door."""

from __future__ import annotations

from array import array

from ...errors import CorruptImageError, UnsupportedFeatureError
from ...wire.qcow2 import CORRUPT, EXT_BACKING_FORMAT, EXT_DATA_FILE, Header, header_span, parse_header
from ..common.tables import from_big_endian
from .node import Qcow2Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.runtime import Runtime
    from ...block.storage import Storage
    from ...wire.qcow2_snapshots import SnapshotEntry


async def read_header(file: Storage, name: str) -> Header:
    """The parsed header. Raises ImageError, HostError."""
    start = await file.read(0, min(512, file.size()))
    data = await file.read(0, min(header_span(start), file.size()))
    return parse_header(data, path=name)


async def open_qcow2(
    name: str, runtime: Runtime, file: Storage, *, writable: bool, metadata_only: bool = False
) -> Qcow2Node:
    """An open image without its backing and data files; the caller attaches those.

    metadata_only: the caller will not touch guest data (info, check), so an image whose data
        cannot be read (encrypted, tables lost) or must not be written (corrupt) opens as well.
    Raises CorruptImageError, UnsupportedFeatureError, HostError.
    """
    header = await read_header(file, name)
    if header.crypt_method and not metadata_only:
        kind = "AES" if header.crypt_method == 1 else "LUKS"
        raise UnsupportedFeatureError(
            f"the image is encrypted ({kind})", path=name, hint="decrypt it with qemu-img"
        )
    if header.incompatible & CORRUPT and writable and not metadata_only:
        raise CorruptImageError(
            "the image is marked corrupt", path=name, hint="run: enban check -r all, or open it read-only"
        )
    try:
        l1 = await read_table(file, header.l1_offset, header.l1_entries, "L1 table", name)
    except CorruptImageError:
        if not metadata_only:
            raise
        l1 = array("Q")
    try:
        entries = header.refcount_table_clusters * header.cluster_size // 8
        refcounts = await read_table(file, header.refcount_table_offset, entries, "refcount table", name)
        snapshots = await read_snapshots(file, header, name) if writable or metadata_only else []
    except CorruptImageError:
        if writable and not metadata_only:
            raise
        refcounts, snapshots = array("Q"), []  # reading guest data needs neither
    node = Qcow2Node(name, runtime, file, header, l1, refcounts, snapshots, writable=writable)
    if not metadata_only and any(l1[header.l1_needed :]):
        from .vm_state import find

        await find(node)
    node.backing_format = (header.extension(EXT_BACKING_FORMAT) or b"").decode("utf-8", "replace")
    return node


async def read_table(file: Storage, offset: int, entries: int, what: str, name: str) -> array[int]:
    """A table of 8-byte entries that must lie inside the file; so the file bounds the memory it takes."""
    if offset + entries * 8 > file.size():
        raise CorruptImageError(
            f"{what} of {entries} entries reaches past the end of the file ({file.size()} bytes)",
            path=name,
            offset=offset,
            hint="the image is cut short or its header is damaged",
        )
    return from_big_endian(await file.read(offset, entries * 8))


async def read_snapshots(file: Storage, header: Header, name: str) -> list[SnapshotEntry]:
    """The snapshot table. Raises CorruptImageError."""
    if not header.snapshot_count:
        return []
    from ...wire.qcow2_snapshots import MAX_SNAPSHOT_TABLE_BYTES, parse_snapshots

    room = min(file.size() - header.snapshots_offset, MAX_SNAPSHOT_TABLE_BYTES)
    span = 64 << 10
    while True:
        data = await file.read(header.snapshots_offset, max(0, min(span, room)))
        try:
            return parse_snapshots(data, header, path=name)[0]
        except CorruptImageError:
            if span >= room:
                raise
        span *= 4


def data_file_name(node: Qcow2Node) -> str:
    """The external data file's name as the image has it; "" if it has none."""
    return (node.header.extension(EXT_DATA_FILE) or b"").decode("utf-8", "surrogateescape")
