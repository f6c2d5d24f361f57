"""How large a file a new image will need.

`required` is enough for the data there is now, `fully-allocated` for a disk written all over.
The sums follow qemu-img measure, so that tools get the same numbers: metadata is always
counted for the fully allocated disk.
"""

from __future__ import annotations

from enban.errors import UnsupportedOperationError, UsageError
from enban.jobs.create import read_options
from enban.jobs.map import PRESENT, READS_ZERO, disk_size, walk
from enban.units import SECTOR, align_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from enban.block.disk import Disk

_HEADER_FIELDS = 24  # bytes of a bitmap directory entry before its name


def measure(
    format: str = "raw",
    options: Mapping[str, str] | None = None,
    *,
    size: int | None = None,
    source: Disk | None = None,
) -> dict[str, int]:
    """Bytes that an image of `format` needs, by qemu-img measure's keys.

    size: of an empty disk. source: the disk that will be converted.
    Raises UsageError, ImageError, HostError.
    """
    values = read_options(format, options or {})
    given = values.pop("size", None)
    if source is not None:
        if size is not None or given is not None:
            raise UsageError("give a size or an image, not both")
        size = disk_size(source.node)
    elif given is not None:
        if size is not None:
            raise UsageError("the size is given twice")
        size = int(given)
    if size is None:
        raise UsageError("give --size or an image to measure")
    if format == "raw":
        size = align_up(size, SECTOR)
        return {"required": size, "fully-allocated": size}
    if format != "qcow2":
        raise UnsupportedOperationError(f"format {format} cannot be measured", hint="use -O raw or -O qcow2")
    from enban.formats.qcow2.create import Qcow2Options, largest_size

    chosen: Any = dict(values)
    header = Qcow2Options(size, **chosen).header()
    if size > largest_size(header):
        raise UsageError(
            f"a size of {size} bytes is too large for clusters of {header.cluster_size} bytes",
            hint="use a larger cluster size",
        )
    cluster = header.cluster_size
    virtual = align_up(size, cluster)
    full = virtual + _metadata(virtual, cluster, header.l2_entry_size, header.refcount_bits)
    if values.get("preallocation") in ("falloc", "full") or (
        source is not None and values.get("backing_file")
    ):
        data = virtual
    else:
        data = _data_clusters(source, cluster) if source is not None else 0
    result = {"required": full - virtual + data, "fully-allocated": full}
    if source is not None and header.version > 2:
        bitmaps = _bitmaps(source, cluster)
        if bitmaps is not None:
            result["bitmaps"] = bitmaps
    return result


def _metadata(virtual: int, cluster: int, entry_size: int, refcount_bits: int) -> int:
    """Bytes of header, tables and refcounts of a fully allocated image."""
    per_table = cluster // entry_size
    l2_entries = align_up(virtual // cluster, per_table)
    l1_entries = align_up(l2_entries // per_table, cluster // 8)
    size = cluster + l2_entries * entry_size + l1_entries * 8
    counted = (size + virtual) // cluster
    per_block = cluster * 8 // refcount_bits
    blocks = tables = 0
    while True:  # refcounts count themselves: until nothing is added any more
        need = -(-(counted + blocks + tables) // per_block)
        need_tables = -(-need * 8 // cluster)
        if (need, need_tables) == (blocks, tables):
            return size + (blocks + tables) * cluster
        blocks, tables = need, need_tables


def _data_clusters(source: Disk, cluster: int) -> int:
    """Bytes of the clusters that hold anything but known zeros."""
    data = counted_to = 0
    size = disk_size(source.node)
    for start, length, _, flags, _, _ in walk(source.node, 0, size):
        if flags & READS_ZERO or not flags & PRESENT:
            continue
        first = max(start // cluster * cluster, counted_to)
        counted_to = max(counted_to, align_up(start + length, cluster))
        data += max(0, counted_to - first)
    return data


def _bitmaps(source: Disk, cluster: int) -> int | None:
    """Bytes that the source's bitmaps would take; None if its format has none."""
    from enban.block.runtime import drive

    specific = drive(source.node.describe()).get("format-specific", {})
    data = specific.get("data", {})
    if specific.get("type") != "qcow2" or data.get("compat") == "0.10":
        return None
    total = directory = 0
    for bitmap in data.get("bitmaps", []):
        if "in-use" in bitmap["flags"]:
            continue
        bits = -(-source.size // bitmap["granularity"])
        clusters = -(-bits // (8 * cluster))
        total += clusters * cluster + align_up(clusters * 8, cluster)
        directory += align_up(_HEADER_FIELDS + len(bitmap["name"].encode()), 8)
    return total + align_up(directory, cluster)
