"""Copy a disk with asyncio, several pieces at a time.

    python examples/copy_async.py disk.qcow2 copy.qcow2

Shows the asyncio face: `async for` over the extents, reads and writes of many tasks in flight on one
disk, zeros never read. (For real work there is `enban convert`, which is faster and makes the new file
appear only when it is complete.)
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import enban
import enban.aio
from enban.extent import UNALLOCATED, ZERO

PIECE = 1 << 20
TASKS = 8


async def pieces(disk: enban.aio.AsyncDisk) -> AsyncIterator[tuple[int, int]]:
    """The ranges (offset, length) of a disk that may hold something else than zeros."""
    async for extent in disk.map():
        if extent.kind in (ZERO, UNALLOCATED):
            continue
        end = extent.start + extent.length
        for offset in range(extent.start, end, PIECE):
            yield offset, min(PIECE, end - offset)


async def copy(source: str, target: str) -> int:
    """Copy a disk into a new qcow2 image; the number of bytes that were not known to be zero."""
    async with await enban.aio.open(source) as disk:
        enban.create(target, "qcow2", size=disk.size)
        async with await enban.aio.open(target, writable=True) as new:
            todo = pieces(disk)
            turn = asyncio.Lock()  # an async generator serves one task at a time
            copied = 0

            async def work() -> None:
                nonlocal copied
                buffer = memoryview(bytearray(PIECE))
                while True:
                    async with turn:
                        piece = await anext(todo, None)
                    if piece is None:
                        return
                    offset, length = piece
                    await disk.readinto(buffer[:length], offset)
                    await new.pwrite(buffer[:length], offset)
                    copied += length

            async with asyncio.TaskGroup() as group:  # the first error cancels the other tasks
                for _ in range(TASKS):
                    group.create_task(work())
            await new.flush()
            return copied


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: copy_async.py SOURCE TARGET.qcow2", file=sys.stderr)
        return 2
    failed: list[BaseException] = []
    try:
        print(f"{asyncio.run(copy(*arguments))} bytes copied")
    except* enban.EnbanError as group:  # of several tasks, or of none
        failed += group.exceptions
    for error in failed[:1]:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(f"copy_async: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
