"""Backups of a disk: a full one, and then only what changed.

    full            copy the whole disk to TARGET          then start the bitmap anew
    incremental     copy what the bitmap says to TARGET,   then clear the bitmap
                    an overlay of the backup before

TARGET has its name and is durable before the bitmap is touched, and the bitmap changes in one
step. So whatever fails, and wherever the machine stops, no change is lost: either the bitmap
still has it, or TARGET does. (If TARGET is there and the bitmap was not cleared, the next backup
copies some of it once more.) Nobody else writes meanwhile: the image is open and locked.
"""

from __future__ import annotations

import os

from enban.block.disk import Disk
from enban.block.gate import TRUSTED
from enban.block.runtime import BLOCKING, drive
from enban.catalog import open_door
from enban.errors import EnbanError, UsageError
from enban.extent import UNALLOCATED, ZERO
from enban.jobs.copying import PIECE, copy_piece, pieces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from enban.block.cipher import Passphrase
    from enban.block.gate import Gate
    from enban.jobs.progress import Report

GRANULARITY = 65536


class BackupResult:
    """What a backup did. size: of the disk. copied: guest bytes in the target. full: whether that is all."""

    __slots__ = ("copied", "full", "size")

    def __init__(self, size: int, copied: int, *, full: bool) -> None:
        self.size = size
        self.copied = copied
        self.full = full


def backup(
    source: str | os.PathLike[str] | dict[str, Any],
    target: str | os.PathLike[str],
    *,
    bitmap: str,
    base: str | os.PathLike[str] = "",
    format: str = "",
    options: dict[str, str] | None = None,
    granularity: int = 0,
    cache: str = "writeback",
    gate: Gate = TRUSTED,
    passphrase: Passphrase = None,
    verify: bool = False,
    progress: Report | None = None,
) -> BackupResult:
    """Copy a disk to the new qcow2 image `target`, and have `bitmap` record what changes from now on.

    base: the backup before this one; only what changed since is copied, and `target` is an overlay of it.
        Without it everything is copied, and the bitmap is made, or made anew.
    options: creation options of the target, named as qemu-img's -o.
    verify: read the whole backup, with all it is based on, and compare it with the disk; a base that is not
        the backup before this one shows here.
    granularity: bytes for each bit of a new bitmap; 0 is that of the old one, or 64 KiB.

    Raises UsageError (there is no such bitmap to go by), ImageError (it is inconsistent: make a full
    backup), HostError; then the bitmap has lost nothing.
    """
    target, base = os.fspath(target), os.fspath(base)
    if not bitmap:
        raise UsageError("a backup needs the name of a bitmap", hint="say --bitmap NAME")
    if granularity and base:
        raise UsageError("a granularity is for a full backup, which makes the bitmap anew")
    door = open_door(
        source if isinstance(source, dict) else os.fspath(source),
        BLOCKING,
        format=format,
        writable=True,
        cache=cache,
        gate=gate,
        passphrase=passphrase,
    )
    with Disk(drive(door)) as disk:
        known = {info.name: info for info in disk.bitmaps()}
        if base:
            if bitmap not in known:
                raise UsageError(
                    f"there is no bitmap {bitmap!r} to tell what changed",
                    path=disk.name,
                    hint="make a full backup first, without --base",
                )
            if not known[bitmap].enabled:
                raise UsageError(
                    f"bitmap {bitmap!r} is disabled and does not know of later changes", path=disk.name
                )
            extents = list(disk.dirty(bitmap))
            result = copy_changes(disk, target, extents, base, dict(options or {}), gate, verify, progress)
            disk.clear_bitmap(bitmap)
            return result
        if not granularity:
            granularity = known[bitmap].granularity if bitmap in known else GRANULARITY
        drive(disk.door.bitmaps()).vet(bitmap, granularity)
        result = copy_all(disk, target, dict(options or {}), gate, verify, progress)
        drive(disk.door.change_bitmaps(lambda found: found.restart(bitmap, granularity)))
        return result


def copy_all(
    disk: Disk, target: str, options: dict[str, str], gate: Gate, verify: bool, progress: Report | None
) -> BackupResult:
    """All of a disk."""
    from enban.jobs.convert import convert_disk

    result = convert_disk(
        disk, target, target_format="qcow2", options=options, gate=gate, verify=verify, progress=progress
    )
    return BackupResult(disk.size, result.bytes_written, full=True)


def copy_changes(
    disk: Disk,
    target: str,
    extents: list[tuple[int, int]],
    base: str,
    options: dict[str, str],
    gate: Gate,
    verify: bool,
    progress: Report | None,
) -> BackupResult:
    """The ranges of a disk that changed since the backup `base`, as an overlay of it."""
    from enban.jobs.create import prepare_target
    from enban.jobs.info import image_info

    for name in ("backing_file", "backing_fmt"):
        if name in options:
            raise UsageError(f"option {name} does not go with a base")
    facts = image_info(base, gate=gate)[0]
    directory = os.path.dirname(os.path.abspath(target))
    # Side by side in one directory, backups find each other wherever it is moved.
    options["backing_file"] = os.path.relpath(os.path.abspath(base), directory)
    options["backing_fmt"] = facts["format"]
    total = sum(length for _, length in extents)
    copied = 0
    made = prepare_target(target, "qcow2", options, size=disk.size, gate=gate)
    with made, memoryview(bytearray(PIECE)) as buffer:
        for start, length in extents:
            for extent in disk.map(start, length):
                if extent.kind in (ZERO, UNALLOCATED):
                    made.disk.write_zeroes(extent.start, extent.length)
                    copied += extent.length
                else:
                    for place, n in pieces(extent.start, extent.length):
                        copy_piece(disk, place, made.disk, place, buffer[:n], sparse=False)
                        copied += n
                        if progress is not None:
                            progress(copied, total)
            if progress is not None:
                progress(copied, total)
        if verify:
            _compare(disk, made.disk, base)
        made.commit()
    return BackupResult(disk.size, copied, full=False)


def _compare(disk: Disk, made: Disk, base: str) -> None:
    mine = bytearray(PIECE)
    with memoryview(bytearray(PIECE)) as theirs, memoryview(mine) as buffer:
        for start, n in pieces(0, disk.size):
            disk.readinto(theirs[:n], start)
            made.readinto(buffer[:n], start)
            if (n == PIECE and mine != theirs) or (n < PIECE and mine[:n] != theirs[:n]):
                raise EnbanError(
                    "with this base the backup does not read as the disk",
                    path=base,
                    offset=start,
                    hint="give the last backup made with this bitmap as the base, or make a full one",
                )
