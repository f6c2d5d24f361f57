"""What is on a disk: its partition table and its ext2/3/4 file systems.

    python examples/partitions.py disk.qcow2

Works on any image enban can open, compressed or in a chain of overlays, without root and without
mounting anything: only the few sectors that are asked for are read.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import enban

SECTOR = 512
PROTECTIVE = 0xEE  # the MBR type that says: look at the GPT
EXTENDED = (0x05, 0x0F, 0x85)
MOST_ENTRIES = 1024  # a GPT with more is taken for a broken one


@dataclass(frozen=True, slots=True)
class Partition:
    """A run of a disk, in bytes. kind: the MBR type in hex, or the GPT type's UUID."""

    number: int
    start: int
    length: int
    kind: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Ext:
    """What an ext superblock says."""

    version: int
    label: str
    block_size: int
    blocks: int
    free_blocks: int
    uuid: UUID


def partitions(disk: enban.Disk) -> Iterator[Partition]:
    """The partitions of a disk; none if it has no table."""
    if disk.size < SECTOR:
        return
    sector = disk.pread(SECTOR, 0)
    if sector[510:] != b"\x55\xaa":
        return
    entries = [struct.unpack_from("<B3xB3xII", sector, 446 + 16 * slot) for slot in range(4)]
    if any(status not in (0x00, 0x80) for status, *_ in entries):
        return  # a boot sector of something else
    if any(kind == PROTECTIVE for _, kind, _, _ in entries):
        yield from gpt_partitions(disk)
        return
    for slot, (_, kind, first, count) in enumerate(entries):
        if kind and kind not in EXTENDED and count:
            yield Partition(slot + 1, first * SECTOR, count * SECTOR, f"{kind:#04x}")


def gpt_partitions(disk: enban.Disk) -> Iterator[Partition]:
    header = disk.pread(SECTOR, SECTOR)
    table, count, size = struct.unpack_from("<QII", header, 72)
    if header[:8] != b"EFI PART" or not 128 <= size <= 4096 or count > MOST_ENTRIES:
        return
    for slot in range(count):
        offset = table * SECTOR + slot * size
        if offset + size > disk.size:
            return
        entry = disk.pread(size, offset)
        kind, first, last = UUID(bytes_le=entry[:16]), *struct.unpack_from("<QQ", entry, 32)
        if kind.int and first <= last:
            label = entry[56:128].decode("utf-16-le", "replace").rstrip("\0")
            yield Partition(slot + 1, first * SECTOR, (last - first + 1) * SECTOR, str(kind), label)


def ext_superblock(disk: enban.Disk, start: int) -> Ext | None:
    """The ext file system that begins at a byte of the disk, if there is one."""
    if start + 2048 > disk.size:
        return None
    block = disk.pread(1024, start + 1024)
    (magic,) = struct.unpack_from("<H", block, 56)
    if magic != 0xEF53:
        return None
    blocks, _, free = struct.unpack_from("<III", block, 4)
    (log_block_size,) = struct.unpack_from("<I", block, 24)
    compatible, incompatible = struct.unpack_from("<II", block, 92)
    extents, journal = incompatible & 0x40, compatible & 0x4
    if log_block_size > 6:
        return None
    return Ext(
        version=4 if extents else 3 if journal else 2,
        label=block[120:136].split(b"\0")[0].decode("utf-8", "replace"),
        block_size=1024 << log_block_size,
        blocks=blocks,
        free_blocks=free,
        uuid=UUID(bytes=block[104:120]),
    )


def describe(disk: enban.Disk) -> Iterator[str]:
    yield f"{disk.name}: {disk.format}, {disk.size} bytes"
    found = list(partitions(disk)) or [Partition(0, 0, disk.size, "whole disk")]
    for part in found:
        yield f"  {part.number or '-'}: {part.start:#x} + {part.length:#x}  {part.kind} {part.label}".rstrip()
        ext = ext_superblock(disk, part.start)
        if ext is not None:
            used = 100 * (ext.blocks - ext.free_blocks) // max(1, ext.blocks)
            size = f"{ext.blocks} blocks of {ext.block_size} bytes"
            yield f"     ext{ext.version} '{ext.label}' {ext.uuid}, {size}, {used} % used"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: partitions.py IMAGE", file=sys.stderr)
        return 2
    try:
        with enban.open(arguments[0]) as disk:
            print("\n".join(describe(disk)))
    except enban.EnbanError as error:
        print(f"partitions: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
