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
from enban.block.mover import fill_zeroes
from enban.block.runtime import BLOCKING, drive
from enban.catalog import Opener
from enban.errors import UsageError
from enban.jobs.copying import PIECE, Writer, pieces
from enban.jobs.create import open_backing
from enban.jobs.map import PRESENT, READS_ZERO, padded, pairs, same_place, walk
from enban.jobs.zeroes import find_data, is_zero
from enban.units import SECTOR, align_down, align_up

_EQUAL, _ZERO, _DATA = 0, 1, 2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from typing import Any

    from enban.block.cipher import Passphrase
    from enban.block.gate import Gate
    from enban.block.node import Node
    from enban.jobs.progress import Report


def rebase(
    reference: str | dict[str, Any],
    backing: str,
    backing_format: str = "",
    *,
    format: str = "",
    unsafe: bool = False,
    cache: str = "writeback",
    gate: Gate = TRUSTED,
    force_share: bool = False,
    passphrase: Passphrase = None,
    progress: Report | None = None,
) -> int:
    """Make `backing` the backing file of an image; "" makes the image stand alone.

    backing: as it will be stored: a relative name starts at the image's directory.
    unsafe: the new file is known to hold the same (it was moved, say); nothing is opened or copied.
    cache: cache mode of the image and of its present backing files.
    force_share: read backing files although another process has them open; what it writes there
        meanwhile may or may not be seen.
    passphrase: of encrypted images, as for `enban.open`.
    Returns the number of guest bytes copied into the image.
    Raises UsageError, HostError (LockedError if a file is in use), ImageError.
    """
    if backing_format and not backing:
        raise UsageError("a backing format needs a backing file")
    if unsafe and backing and not backing_format:
        raise UsageError("a backing file needs its format", path=backing, hint="add -F FORMAT")
    opener = Opener(
        BLOCKING,
        gate=gate,
        cache=cache,
        share_below=force_share,
        metadata_only=unsafe,
        passphrase=passphrase,
    )
    node = drive(opener.open_chain(reference, format=format, writable=True, backing=not unsafe))
    with Disk(Door(node, writable=True)) as disk:
        if unsafe:
            drive(node.set_backing(backing, backing_format))
            return 0
        if node.snapshots_here():
            raise UsageError(
                "the internal snapshots of the image need its present backing file",
                path=node.name,
                hint="delete them, or change the name alone with -u",
            )
        if not backing:
            return _switch(disk, None, "", "", progress)
        # Looked at without locks first: the image itself, which we hold, may be in that chain.
        with open_backing(
            node.name, backing, backing_format, gate=gate, force_share=True, keyless=True
        ) as new:
            if node.file.identity in _identities(new.node):
                raise UsageError("the image itself is below the new backing file", path=node.name)
        with open_backing(
            node.name, backing, backing_format, gate=gate, force_share=force_share, passphrase=passphrase
        ) as new:
            return _switch(disk, new, backing, backing_format, progress)


def _switch(disk: Disk, new: Disk | None, backing: str, backing_format: str, progress: Report | None) -> int:
    copied = _copy_differences(disk, new, progress)
    disk.flush()
    drive(disk.node.set_backing(backing, backing_format))
    return copied


def _identities(node: Node | None) -> Iterator[Hashable]:
    while node is not None:
        yield node.file.identity
        node = node.backing


def _copy_differences(disk: Disk, new: Disk | None, progress: Report | None) -> int:
    """Write into the image what it would lose; the number of bytes."""
    copier = _Copier(disk, new)
    for start, length, zero in _units(_doubtful(disk, new), copier.unit, disk.size):
        for place, n in pieces(start, length):
            copier.copy(place, n, zero)
        if progress is not None:
            progress(start + length, disk.size)
    if progress is not None:
        progress(disk.size, disk.size)
    return copier.copied


def _doubtful(disk: Disk, new: Disk | None) -> Iterator[tuple[int, int, bool]]:
    """Ranges (start, length, whether the new backing file reads as zeros there) that the image leaves to
    its backing file and that the tables do not prove equal."""
    if new is None:
        for start, length, depth, flags, _, _ in walk(disk.node, 0, disk.size):
            if depth and not flags & READS_ZERO:
                yield start, length, True
        return
    for start, length, ours, theirs in pairs(walk(disk.node, 0, disk.size), padded(new.node, 0, disk.size)):
        if ours[2] == 0 and ours[3] & PRESENT:
            continue
        if not (ours[3] & theirs[3] & READS_ZERO or same_place(ours, theirs)):
            yield start, length, bool(theirs[3] & READS_ZERO)


def _units(ranges: Iterator[tuple[int, int, bool]], unit: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """The same ranges grown to whole units, none of them twice. Of what they grew by nothing is known."""
    done = 0
    for start, length, zero in ranges:
        end = start + length
        first = max(done, align_down(start, unit))
        done = max(done, min(size, align_up(end, unit)))
        if first < done:
            yield first, done - first, zero and start <= first and done <= end


class _Copier:
    """Copies what differs, unit by unit: a unit is allocated whole anyway.

    Zeros are marked where the format can do that, otherwise written; leaving them out because the
    old backing file reads as zeros there would show the new one.
    """

    def __init__(self, disk: Disk, new: Disk | None) -> None:
        self.disk = disk
        self.new = new
        self.unit = max(disk.node.grain, SECTOR)
        self.marks = disk.node.state_zeroes()
        self.writer = Writer(disk)
        self.ours, self.theirs = bytearray(PIECE), bytearray(PIECE)
        self.copied = 0

    def copy(self, place: int, length: int, zero: bool) -> None:
        """Compare a range, made of whole units, and write what of it differs. zero: the new backing file
        reads as zeros there."""
        with memoryview(self.ours) as space, memoryview(self.theirs) as their_space:
            ours, theirs = space[:length], their_space[:length]
            self.disk.readinto(ours, place)
            if zero:
                for first, end in find_data(ours, self.unit):
                    self._write(ours, place, first, end, _DATA)
                return
            fill_zeroes(theirs)
            if self.new is not None and place < self.new.size:
                self.new.readinto(theirs[: min(length, self.new.size - place)], place)
            begin, before = 0, _EQUAL
            for start in range(0, length, self.unit):
                end = min(start + self.unit, length)
                kind = self._kind(bytearray(ours[start:end]), theirs[start:end])
                if kind != before:
                    self._write(ours, place, begin, start, before)
                    begin, before = start, kind
            self._write(ours, place, begin, length, before)

    def _kind(self, ours: bytearray, theirs: memoryview) -> int:
        if ours == theirs:
            return _EQUAL
        return _ZERO if self.marks and is_zero(memoryview(ours)) else _DATA

    def _write(self, ours: memoryview, place: int, start: int, end: int, kind: int) -> None:
        if kind == _ZERO:
            self.disk.write_zeroes(place + start, end - start)
        elif kind == _DATA:
            self.writer.write(ours[start:end], place + start)
        if kind != _EQUAL:
            self.copied += end - start
