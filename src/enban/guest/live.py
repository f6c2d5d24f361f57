"""What is done to the disks, the CD-ROM drive, the keyboard and the screen of a machine that runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from ..errors import EnbanError, PeerError, UsageError, from_oserror
from ..storage.cdrom import DISC, CdromStorage, Drive
from .command import DRIVE
from .disks import SECTOR
from .settings import LAYOUT, VHOST

_TRAYS = 4  # times that a tray is opened again because a guest has closed it

if TYPE_CHECKING:
    from .disks import GuestDisk
    from .machine import Machine


async def resize(machine: Machine, one: GuestDisk, size: int) -> None:
    """Change the size of a disk and tell the guest.

    NBD tells a client the size when it connects and never again (QEMU 7.2 says "Cannot grow NBD nodes"). So
    QEMU connects once more, the raw node under the device is reopened on the new connection, and then
    `block_resize` only has to tell the device. A virtio guest sees the change at once; on IDE and SATA it
    looks when it starts.
    """
    if size <= 0 or size % SECTOR:
        raise UsageError(f"a guest's disk has whole sectors of {SECTOR} bytes", hint=f"{size} bytes are none")
    if not one.writable:
        raise UsageError("the disk is read-only", path=one.name)
    if size < one.disk.size:
        # Requests of the guest beyond the new end would fail one by one; it must give that space up first.
        raise UsageError(
            "a disk cannot shrink while the guest runs",
            path=one.name,
            hint="shut it down and use enban resize",
        )
    await asyncio.to_thread(one.disk.resize, size)
    one.resized()
    if one.bus == VHOST:
        return  # QEMU was told, and asks for the rest
    before = one.node
    await machine.execute("blockdev-add", one.next_node(machine.disk_set.socket))
    await machine.execute("blockdev-reopen", {"options": [one.format_node()]})
    await machine.execute("block_resize", {"node-name": one.id, "size": size})
    await machine.execute("blockdev-del", {"node-name": before})


async def insert_cdrom(machine: Machine, path: str) -> None:
    disks = machine.disk_set
    disc = await asyncio.to_thread(disks.open_disc, path, machine.settings)
    try:
        await eject_cdrom(machine)
        disks.serve_disc(disc)
        try:
            await machine.execute("blockdev-add", disc.next_node(disks.socket))
            await machine.execute("blockdev-add", disc.format_node())
            await _in_open_tray(machine, "blockdev-insert-medium", {"id": DRIVE, "node-name": disc.id})
            await machine.execute("blockdev-close-tray", {"id": DRIVE})
        except BaseException:
            await _let_go(machine, disc)
            raise
    except BaseException:
        await asyncio.to_thread(disc.disk.close)
        raise
    await asyncio.to_thread(disks.change_disc, disc)


async def _in_open_tray(machine: Machine, command: str, arguments: dict[str, str]) -> None:
    """Do what needs the tray open. A guest (a PC's firmware, for one) may close it just before."""
    for again in range(_TRAYS, -1, -1):
        await machine.execute("blockdev-open-tray", {"id": DRIVE, "force": True})
        try:
            await machine.execute(command, arguments)
            return
        except PeerError:
            if not again:
                raise


async def _let_go(machine: Machine, disc: GuestDisk) -> None:
    """Take back what an insertion had done before it failed, so that it can be tried again and again."""
    with contextlib.suppress(EnbanError):
        await _in_open_tray(machine, "blockdev-remove-medium", {"id": DRIVE})
    for node in (disc.id, disc.node):
        with contextlib.suppress(EnbanError):  # what it had not come to
            await machine.execute("blockdev-del", {"node-name": node})
    machine.disk_set.withdraw_disc(disc)


async def eject_cdrom(machine: Machine) -> None:
    """Open the tray whatever the guest says, take the disc out and let go of its image."""
    disks = machine.disk_set
    disc = disks.cdrom
    if disc is None:
        await machine.execute("blockdev-open-tray", {"id": DRIVE, "force": True})
        return
    await _in_open_tray(machine, "blockdev-remove-medium", {"id": DRIVE})
    await machine.execute("blockdev-del", {"node-name": disc.id})
    await machine.execute("blockdev-del", {"node-name": disc.node})
    await asyncio.to_thread(disks.change_disc, None)


async def follow_drive(machine: Machine) -> None:
    """Where the guest has the host's drive: take a disc that is gone out of the guest's drive, and put the
    one that has come into it."""
    disks = machine.disk_set
    disc = disks.cdrom
    if disc is not None:
        drive = disc.disk.node.file
        disks.followed = drive.name if isinstance(drive, CdromStorage) else ""
        if not isinstance(drive, CdromStorage) or not await asyncio.to_thread(drive.has_changed):
            return
        machine.log(f"{drive.name}: the disc was taken out")
        await eject_cdrom(machine)
    if disks.followed and await asyncio.to_thread(Drive(disks.followed).state) == DISC:
        await insert_cdrom(machine, disks.followed)
        machine.log(f"{disks.followed}: a disc was put in")


async def type_text(machine: Machine, text: str, layout: str) -> None:
    from .keyboard import send_strokes, text_strokes

    await send_strokes(machine, text_strokes(text, layout or machine.settings.layout or LAYOUT))


async def press(machine: Machine, chord: str) -> None:
    from .keyboard import chord_strokes, send_strokes

    await send_strokes(machine, chord_strokes(chord))


async def screenshot(machine: Machine, path: str) -> None:
    """QEMU writes into the machine's own folder; the file appears at `path` whole."""
    if machine.place is None:
        raise UsageError("the machine does not run")
    made = machine.place.file("screen.png")
    try:
        await machine.execute("screendump", {"filename": made, "format": "png"})
        await asyncio.to_thread(_move, made, path)
    finally:
        try:
            os.unlink(made)
        except FileNotFoundError:
            pass


def _move(made: str, path: str) -> None:
    partial = f"{path}.{os.getpid()}.part"
    try:
        with open(made, "rb") as source, open(partial, "wb") as target:
            data = source.read()
            if not data.startswith(b"\x89PNG"):
                raise PeerError("QEMU's screenshot is no PNG file")
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
        os.rename(partial, path)
    except OSError as error:
        try:
            os.unlink(partial)
        except OSError:
            pass
        raise from_oserror(error, "write the screenshot", path) from error
