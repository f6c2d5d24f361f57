"""What a qcow2 image says of itself, under the names of qemu-img's JSON output."""

from __future__ import annotations

import sys
from array import array

from ...errors import CorruptImageError
from ...wire.qcow2 import AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, CORRUPT, DIRTY, EXT_BITMAPS, LAZY_REFCOUNTS
from ...wire.qcow2_bitmaps import BitmapEntry, parse_bitmap_directory, parse_bitmaps_extension
from ...wire.qcow2_entries import REFTABLE_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .node import Qcow2Node


async def describe(node: Qcow2Node) -> dict[str, Any]:
    header = node.header
    facts: dict[str, Any] = {}
    if node.snapshots:
        facts["snapshots"] = [
            {
                "icount": entry.icount,
                "vm-clock-nsec": entry.vm_clock_ns % 1_000_000_000,
                "name": entry.name,
                "date-sec": entry.date_s,
                "date-nsec": entry.date_ns,
                "vm-clock-sec": entry.vm_clock_ns // 1_000_000_000,
                "id": entry.id,
                "vm-state-size": entry.vm_state_size,
            }
            for entry in node.snapshots
        ]
        for snapshot in facts["snapshots"]:
            if snapshot["icount"] is None:
                del snapshot["icount"]
    facts["cluster-size"] = node.cluster_size
    if header.crypt_method:
        facts["encrypted"] = True
    facts["format-specific"] = {"type": "qcow2", "data": await _specific(node)}
    facts["dirty-flag"] = bool(header.incompatible & DIRTY)
    return facts


async def _specific(node: Qcow2Node) -> dict[str, Any]:
    from .opening import data_file_name

    header = node.header
    modern = header.version > 2
    facts: dict[str, Any] = {"compat": "1.1" if modern else "0.10", "compression-type": node.codec}
    if modern:
        facts["lazy-refcounts"] = bool(header.compatible & LAZY_REFCOUNTS)
        bitmaps = await _bitmaps(node)
        if bitmaps:
            facts["bitmaps"] = bitmaps
    facts["refcount-bits"] = header.refcount_bits
    if node.external:
        facts["data-file"] = data_file_name(node)
        facts["data-file-raw"] = bool(header.autoclear & AUTOCLEAR_RAW_DATA)
    if header.crypt_method:
        facts["encrypt"] = {"format": "aes" if header.crypt_method == 1 else "luks"}
    if modern:
        facts["corrupt"] = bool(header.incompatible & CORRUPT)
        facts["extended-l2"] = node.extended
    return facts


async def _bitmaps(node: Qcow2Node) -> list[dict[str, Any]]:
    extension = node.header.extension(EXT_BITMAPS)
    if extension is None or not node.header.autoclear & AUTOCLEAR_BITMAPS:
        return []  # without the flag the bitmaps are out of date and do not count
    count, length, offset = parse_bitmaps_extension(extension, path=node.name)
    if offset + length > node.file.size():
        raise CorruptImageError(
            "bitmap directory reaches past the end of the file", path=node.name, offset=offset
        )
    directory = parse_bitmap_directory(await node.file.read(offset, length), count, path=node.name)
    return [
        {
            "flags": [
                name
                for bit, name in ((BitmapEntry.IN_USE, "in-use"), (BitmapEntry.AUTO, "auto"))
                if entry.flags & bit
            ],
            "name": entry.name,
            "granularity": 1 << entry.granularity_bits,
        }
        for entry in directory
    ]


async def holes(node: Qcow2Node) -> bool:
    """Whether many more clusters are counted than the file has blocks for on its medium: then
    clusters were allocated ahead of use, and where nothing was written the file has holes.

    QEMU's measure: a tenth more, and at least two. Stops counting when that is reached.
    """
    file = node.file
    real = file.allocated() >> node.cluster_bits
    enough = max(real * 10 // 9, real + 2)
    rest = -(-file.size() >> node.cluster_bits)  # clusters of the file not looked at yet
    order, size = node.header.refcount_order, node.cluster_size
    per_block = size * 8 >> order
    all_ones = _block(per_block, order)
    used = 0
    for entry in node.refcounts.table:
        if rest <= 0 or used >= enough:
            break
        place = entry & REFTABLE_MASK
        if place:
            raw = await file.read(place, size)
            here = min(rest, per_block)
            used += here if here == per_block and raw == all_ones else _count(raw, order, here)
        rest -= per_block
    return used >= enough


_TYPES = {3: "B", 4: "H", 5: "I", 6: "Q"}


def _block(entries: int, order: int) -> bytearray:
    """A refcount block full of ones, as stored."""
    if order < 3:
        return bytearray([sum(1 << shift for shift in range(0, 8, 1 << order))]) * (entries << order >> 3)
    counts = array(_TYPES[order], [1]) * entries
    if sys.byteorder == "little":
        counts.byteswap()
    return bytearray(counts.tobytes())


def _count(raw: bytearray, order: int, entries: int) -> int:
    """How many of the first `entries` refcounts are not 0."""
    if order >= 3:
        counts = array(_TYPES[order], bytes(raw))[:entries]
        return len(counts) - counts.count(0)
    width = 1 << order
    mask = (1 << width) - 1
    used = [sum(1 for shift in range(0, 8, width) if byte >> shift & mask) for byte in range(256)]
    whole, rest = divmod(entries, 8 >> order)
    total = sum(map(used.__getitem__, memoryview(raw)[:whole]))
    return total + sum(1 for place in range(rest) if raw[whole] >> place * width & mask)
