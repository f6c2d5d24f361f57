"""Backups of a disk while its guest runs.

    guest stands still    an internal snapshot holds the disk of this moment; a second bitmap begins
    guest runs            the snapshot is copied
    guest stands still    the bitmap becomes the second one; the snapshot and the second one go

Until the copy is durable the bitmap goes on recording, so whatever fails, it has lost nothing. If enban dies
meanwhile the bitmap is marked as in use, as after every crash, and asks for a full backup.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import enban

from ..block.disk import Disk
from ..errors import EnbanError, UnsupportedOperationError, UsageError
from ..jobs.backup import GRANULARITY, BackupResult, copy_all, copy_changes

if TYPE_CHECKING:
    from ..block.gate import Gate
    from .disks import GuestDisk
    from .machine import Machine

MOMENT = "enban-backup"  # the snapshot, and the second bitmap


async def backup(machine: Machine, one: GuestDisk, target: str, bitmap: str, base: str) -> BackupResult:
    """Copy a disk as it is now to the new qcow2 image `target`.

    bitmap: has recorded what changed and does so from now on; made if there is none. base: the backup before;
    with it only what the bitmap says is copied, and `target` is an overlay of it. Raises UsageError,
    UnsupportedOperationError, HostError.
    """
    if one.disk.format != "qcow2" or one.snapshot or not one.writable:
        raise UnsupportedOperationError(
            "only a qcow2 disk that is written to itself can be copied while the guest runs", path=one.name
        )
    if base and not bitmap:
        raise UsageError("only a bitmap tells what changed since a backup", hint="give its name")
    async with machine.standing_still():
        extents = await asyncio.to_thread(_begin, one.disk, bitmap, base)
    try:
        result = await asyncio.to_thread(_copy, one.disk, target, extents, base, machine.settings.gate)
    except BaseException:
        await asyncio.to_thread(_give_up, one.disk)
        raise
    async with machine.standing_still():
        await asyncio.to_thread(_end, one.disk, bitmap)
    return result


def _begin(disk: Disk, bitmap: str, base: str) -> list[tuple[int, int]]:
    """Hold the present; what changed since the base."""
    _give_up(disk)  # what a crash may have left
    extents: list[tuple[int, int]] = []
    if bitmap:
        known = {info.name: info for info in disk.bitmaps()}
        if base:
            if bitmap not in known or not known[bitmap].enabled:
                raise UsageError(
                    f"there is no enabled bitmap '{bitmap}' to tell what changed",
                    path=disk.name,
                    hint="make a full backup first, without a base",
                )
            extents = list(disk.dirty(bitmap))
        granularity = known[bitmap].granularity if bitmap in known else GRANULARITY
        disk.add_bitmap(MOMENT, granularity=granularity)
    try:
        disk.create_snapshot(MOMENT)
    except BaseException:
        _give_up(disk)
        raise
    return extents


def _copy(disk: Disk, target: str, extents: list[tuple[int, int]], base: str, gate: Gate) -> BackupResult:
    held = next(entry.id for entry in disk.snapshots if entry.name == MOMENT)
    source = enban.open(disk.name, format="qcow2", snapshot_name=held, force_share=True, gate=gate)
    with source:
        if base:
            return copy_changes(source, target, extents, base, {}, gate, False, None)
        return copy_all(source, target, {}, gate, False, None)


def _end(disk: Disk, bitmap: str) -> None:
    if bitmap:
        granularity = next(info.granularity for info in disk.bitmaps() if info.name == MOMENT)
        if any(info.name == bitmap for info in disk.bitmaps()):
            disk.remove_bitmap(bitmap)
        disk.add_bitmap(bitmap, granularity=granularity)
        disk.merge_bitmap(bitmap, MOMENT)
    _give_up(disk)


def _give_up(disk: Disk) -> None:
    """Remove the snapshot and the second bitmap, where they are."""
    for entry in disk.snapshots:
        if entry.name == MOMENT:
            disk.delete_snapshot(f"snapshot.id={entry.id}")
    try:
        there = any(info.name == MOMENT for info in disk.bitmaps())
    except EnbanError:
        return  # an image whose bitmaps cannot be read has none of ours
    if there:
        disk.remove_bitmap(MOMENT)
