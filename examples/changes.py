"""What has an overlay changed? Save that alone, and put it back elsewhere.

    python examples/changes.py save overlay.qcow2 changes.bin
    python examples/changes.py load changes.bin copy-of-the-base.qcow2

The file holds, for each changed run: offset and length (8 bytes each, big-endian) and the bytes.
The top layer's tables tell where the changes are, so nothing below it is read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import BinaryIO

import enban
from enban.extent import UNALLOCATED

PIECE = 1 << 20


def changed(disk: enban.Disk) -> Iterator[tuple[int, int]]:
    """The ranges (offset, length) that the top layer answers for, in pieces."""
    for extent in disk.map():
        if extent.depth == 0 and extent.kind != UNALLOCATED:
            end = extent.start + extent.length
            for offset in range(extent.start, end, PIECE):
                yield offset, min(PIECE, end - offset)


def save(image: str, path: str) -> int:
    total = 0
    with enban.open(image, gate=enban.TRUSTED) as disk, open(path, "wb") as file:
        for offset, length in changed(disk):
            file.write(offset.to_bytes(8, "big") + length.to_bytes(8, "big") + disk.pread(length, offset))
            total += length
    return total


def load(file: BinaryIO, image: str) -> int:
    total = 0
    with enban.open(image, writable=True, gate=enban.TRUSTED) as disk:
        while head := file.read(16):
            offset, length = int.from_bytes(head[:8], "big"), int.from_bytes(head[8:], "big")
            content = file.read(length) if len(head) == 16 and length <= PIECE else b""
            if not content or len(content) != length:
                raise enban.EnbanError("this is no complete file of changes", offset=file.tell())
            disk.pwrite(content, offset)
            total += length
    return total


def main(arguments: list[str]) -> int:
    if len(arguments) != 3 or arguments[0] not in ("save", "load"):
        print("usage: changes.py save IMAGE FILE | load FILE IMAGE", file=sys.stderr)
        return 2
    verb, first, second = arguments
    try:
        if verb == "save":
            total = save(first, second)
        else:
            with open(first, "rb") as file:
                total = load(file, second)
    except (enban.EnbanError, OSError) as error:
        print(f"changes: {error}", file=sys.stderr)
        return 1
    print(f"{total} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
