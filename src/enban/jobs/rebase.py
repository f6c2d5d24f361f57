"""Basing an image on another backing file.

A safe rebase first copies into the image whatever the new backing file would show
differently, makes that durable, and only then names the new file; interrupted anywhere, the
image reads as before. An unsafe one changes the name alone.

    range not allocated in the image:
        old backing file (or zeros)  ==  new one (or zeros)   nothing to do
                                     !=                       the old bytes are written to the image
"""

from __future__ import annotations

from enban.block.disk import Disk
from enban.block.door import Door
from enban.block.gate import TRUSTED
from enban.block.runtime import BLOCKING, drive
from enban.catalog import Opener
from enban.errors import UsageError
from enban.jobs.copying import GRAIN, pieces
from enban.jobs.create import open_backing
from enban.jobs.map import PRESENT, READS_ZERO, padded, pairs, same_place, walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from typing import Any

    from enban.block.gate import Gate
    from enban.block.node import Node
    from enban.jobs.progress import Progress


def rebase(
    reference: str | dict[str, Any],
    backing: str,
    backing_format: str = "",
    *,
    format: str = "",
    unsafe: bool = False,
    cache: str = "writeback",
    gate: Gate = TRUSTED,
    progress: Progress | None = None,
) -> int:
    """Make `backing` the backing file of an image; "" makes the image stand alone.

    backing: as it will be stored: a relative name starts at the image's directory.
    unsafe: the new file is known to hold the same (it was moved, say); nothing is opened or copied.
    cache: cache mode of the image and of its present backing files.
    Returns the number of guest bytes copied into the image.
    Raises UsageError, HostError (LockedError if a file is in use), ImageError.
    """
    if backing_format and not backing:
        raise UsageError("a backing format needs a backing file")
    if unsafe and backing and not backing_format:
        raise UsageError("a backing file needs its format", path=backing, hint="add -F FORMAT")
    opener = Opener(BLOCKING, gate=gate, cache=cache, metadata_only=unsafe)
    node = drive(opener.open_chain(reference, format=format, writable=True, backing=not unsafe))
    with Disk(Door(node, writable=True)) as disk:
        if unsafe:
            drive(node.set_backing(backing, backing_format))
            return 0
        if not backing:
            return _switch(disk, None, "", "", progress)
        # Looked at without locks first: the image itself, which we hold, may be in that chain.
        with open_backing(node.name, backing, backing_format, gate=gate, force_share=True) as new:
            if node.file.identity in _identities(new.node):
                raise UsageError("the image itself is below the new backing file", path=node.name)
        with open_backing(node.name, backing, backing_format, gate=gate) as new:
            return _switch(disk, new, backing, backing_format, progress)


def _switch(
    disk: Disk, new: Disk | None, backing: str, backing_format: str, progress: Progress | None
) -> int:
    copied = _copy_differences(disk, new, progress)
    disk.flush()
    drive(disk.node.set_backing(backing, backing_format))
    return copied


def _identities(node: Node | None) -> Iterator[Hashable]:
    while node is not None:
        yield node.file.identity
        node = node.backing


def _copy_differences(disk: Disk, new: Disk | None, progress: Progress | None) -> int:
    """Write into the image what it would lose; the number of bytes."""
    copied = 0
    for start, length in _doubtful(disk, new):
        for place, n in pieces(start, length):
            copied += _copy_piece(disk, new, place, n)
        if progress is not None:
            progress.update(start + length, disk.size)
    if progress is not None:
        progress.update(disk.size, disk.size)
    return copied


def _doubtful(disk: Disk, new: Disk | None) -> Iterator[tuple[int, int]]:
    """Ranges that the image leaves to its backing file and that the tables do not prove equal."""
    end = disk.size
    if new is None:
        for start, length, depth, flags, _, _ in walk(disk.node, 0, end):
            if depth and not flags & READS_ZERO:
                yield start, length
        return
    for start, length, ours, theirs in pairs(walk(disk.node, 0, end), padded(new.node, 0, end)):
        if ours[2] == 0 and ours[3] & PRESENT:
            continue
        if not (ours[3] & theirs[3] & READS_ZERO or same_place(ours, theirs)):
            yield start, length


def _copy_piece(disk: Disk, new: Disk | None, place: int, length: int) -> int:
    ours, theirs = bytearray(length), bytearray(length)
    disk.readinto(ours, place)
    if new is not None and place < new.size:
        inside = min(length, new.size - place)
        with memoryview(theirs) as view:
            new.readinto(view[:inside], place)
    if ours == theirs:
        return 0
    copied = 0
    for start, end in _differing(ours, theirs):
        part = ours[start:end]
        if part.count(0) == len(part):
            disk.write_zeroes(place + start, end - start)
        else:
            disk.pwrite(part, place + start)
        copied += end - start
    return copied


def _differing(ours: bytearray, theirs: bytearray) -> Iterator[tuple[int, int]]:
    """The parts [start, end) in which two buffers differ, in whole grains."""
    begin = -1
    for start in range(0, len(ours), GRAIN):
        differs = ours[start : start + GRAIN] != theirs[start : start + GRAIN]
        if differs and begin < 0:
            begin = start
        elif not differs and begin >= 0:
            yield begin, start
            begin = -1
    if begin >= 0:
        yield begin, len(ours)
