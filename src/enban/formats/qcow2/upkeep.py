"""Changing what an image is based on: another backing file, or no data of its own.

Naming another backing file must not leave, after a crash, a header that names a third thing.
The name may stand anywhere in the header cluster behind the extensions, and the fields that
point to it are in the first sector, which a disk writes whole:

    1  write the new name where the old header has nothing                      sync
    2  write the first sector: it points to the new name (or to none)           sync

The backing format is in the first sector too if its extension is the first and keeps its
length; otherwise the extensions move, and the cluster is written in one piece.
"""

from __future__ import annotations

from ...errors import UnsupportedOperationError, UsageError
from ...units import align_up
from ...wire.qcow2 import (
    AUTOCLEAR_RAW_DATA,
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_FEATURE_NAMES,
    MAX_BACKING_NAME,
)
from ...wire.qcow2_entries import OFFSET_MASK
from .barrier import barrier
from .leaving import release_quarantine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .node import Qcow2Node

SECTOR = 512
_TABLES_AT_ONCE = 64


async def set_backing(node: Qcow2Node, name: str, format: str) -> None:
    header = node.header
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > MAX_BACKING_NAME:
        raise UsageError(f"backing file name is longer than {MAX_BACKING_NAME} bytes", path=node.name)
    if encoded and header.autoclear & AUTOCLEAR_RAW_DATA:
        raise UnsupportedOperationError(
            "a raw data file and a backing file do not go together", path=node.name
        )
    await node.flush()
    async with node.mutex:
        await node.prepare_change()
        before = header.backing_name, list(header.extensions)
        old = bytes(await node.file.read(0, node.cluster_size))
        try:
            if format:
                header.set_extension(EXT_BACKING_FORMAT, format.encode("utf-8"))
                header.extensions.sort(key=lambda extension: extension[0] != EXT_BACKING_FORMAT)
            elif encoded:
                header.set_extension(EXT_BACKING_FORMAT, None)
            # Without a backing file the format stays as it was: it says nothing then, and nothing moves.
            header.backing_name = b""
            body = header.build()
            if header.version == 2 and not header.extensions:
                body += bytes(8)  # or what follows would be taken for an extension
            place = _free_place(old, body, len(encoded))
            if place:
                await _switch(node, body, place, encoded)
                header.backing_name = encoded
            else:
                header.backing_name = encoded
                await node.write_header()
        except BaseException:
            header.backing_name, header.extensions = before
            raise
    node.backing_name = name
    node.backing_format = format if name else ""


def _free_place(old: bytes, body: bytes, length: int) -> int:
    """Where in the header cluster a name of `length` bytes can stand beside the old one; 0 if nowhere,
    or if more than the first sector would change."""
    if body[SECTOR:] != old[SECTOR : max(SECTOR, len(body))]:
        return 0
    name_at = int.from_bytes(old[8:16], "big")
    name_end = name_at + int.from_bytes(old[16:20], "big")
    place = align_up(len(body), 8)
    if length and name_at < place + length and place < name_end:
        place = align_up(name_end, 8)
    return place if place + length <= len(old) and not any(old[place : place + length]) else 0


async def _switch(node: Qcow2Node, body: bytes, place: int, name: bytes) -> None:
    file = node.file
    if name:
        await file.write(name, place)
        await file.flush()
        body = body[:8] + place.to_bytes(8, "big") + len(name).to_bytes(4, "big") + body[20:]
    old_at, old_length = (int.from_bytes(part, "big") for part in await _name_fields(node))
    # What of the name shares the first sector is written with it, unchanged.
    sector = bytearray(await file.read(0, SECTOR))
    sector[: min(SECTOR, len(body))] = body[:SECTOR]
    await file.write(sector, 0)
    await file.flush()
    if old_at >= len(body):  # nobody reads the old name any more; leave no trace of it
        await file.write(bytes(old_length), old_at)
        await file.flush()


async def _name_fields(node: Qcow2Node) -> tuple[bytes, bytes]:
    fields = bytes(await node.file.read(8, 12))
    return fields[:8], fields[8:]


async def write_first_sector(node: Qcow2Node) -> None:
    """Bring the header's fields and extensions to the disk in one write of one sector, durably; mutex held.

    The bitmaps extension comes first, the feature name table last; of that, which only helps error
    messages, as much is kept as the sector has room for. The backing file's name stays where it is,
    or is copied first to where it is not in the way. Raises UnsupportedOperationError (nothing was
    written) if the rest does not fit, HostError.
    """
    header, file = node.header, node.file
    old = bytes(await file.read(0, node.cluster_size))
    order = {EXT_BITMAPS: 0, EXT_FEATURE_NAMES: 2}
    header.extensions.sort(key=lambda extension: order.get(extension[0], 1))
    name, header.backing_name = header.backing_name, b""
    try:
        body = header.build()
        while len(body) > SECTOR and header.extension(EXT_FEATURE_NAMES) is not None:
            names = header.extension(EXT_FEATURE_NAMES) or b""
            header.set_extension(EXT_FEATURE_NAMES, names[: (len(names) - 1) // 48 * 48] or None)
            body = header.build()
    finally:
        header.backing_name = name
    if header.version == 2 and not header.extensions:
        body += bytes(8)  # or what follows would be taken for an extension
    if len(body) > SECTOR:
        raise UnsupportedOperationError(
            f"the first sector of the header has no room for this ({len(body)} bytes)", path=node.name
        )
    place = int.from_bytes(old[8:16], "big") if name else 0
    sector = bytearray(old[:SECTOR])
    if place and place < len(body):
        end = place + len(name)
        place = align_up(max(end, len(body)), 8)
        if place + len(name) > node.cluster_size:
            raise UnsupportedOperationError(
                "the header cluster has no room to move the backing file's name", path=node.name
            )
        await file.write(name, place)
        await file.flush()
        sector[place : place + len(name)] = name[: max(0, SECTOR - place)]
        del sector[SECTOR:]
    sector[: len(body)] = body
    sector[8:20] = place.to_bytes(8, "big") + len(name).to_bytes(4, "big")
    await file.write(sector, 0)
    await file.flush()


async def make_empty(node: Qcow2Node) -> None:
    """Give back every data cluster and every L2 table, a few tables at a time, each step durable."""
    await node.flush()  # from here on no table is known to memory alone
    index = node.vm_state_size = 0
    while index < len(node.l1):
        async with node.mutex:
            await node.prepare_change()
            done = 0
            while index < len(node.l1) and done < _TABLES_AT_ONCE:
                if node.l1[index] & OFFSET_MASK:
                    await drop_table(node, index)
                    done += 1
                index += 1
        await barrier(node)
    async with node.mutex:
        await release_quarantine(node)
    await barrier(node)


async def drop_table(node: Qcow2Node, index: int) -> None:
    """Give up an L2 table and all it points to; the mutex is held."""
    table = await node.load_table(index)
    entries = table.entries[::2] if node.extended else table.entries
    for entry in filter(None, entries):
        node.unlink_entry(entry)
    node.unlink(table.offset >> node.cluster_bits, 1)
    node.cache.remove(index)
    node.l1[index] = 0
    node.l1_dirty.add(index)
