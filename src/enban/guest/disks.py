"""The guest's disks: opened by our engine, served to QEMU on a private NBD socket.

    guest -> QEMU's device -> raw node `disk0` -> nbd node `disk0-1` -> socket -> ServedExport -> Door

The raw node stays for the life of the device; the NBD node below it is exchanged when the size changes,
because NBD tells a client the size once, when it connects.

A guest's flush is our flush: it is answered when the bytes are durable. So neither QEMU nor this process may
die at a moment when something flushed is lost. What was written but not flushed is in the engine of this
process, and is written out if it ends in order.

A guest's disk has whole sectors. QEMU rounds the size of an NBD export up, and what the guest then writes
into the last sector is refused as beyond the end, which looks like a full file system. So the guest is shown
the whole sectors alone, on every bus.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import enban

from ..block.disk import Disk
from ..errors import EnbanError, NoMediumError, UsageError
from ..exports import sockets
from ..exports.nbd.export import ServedExport
from ..exports.nbd.incoming import SPIN_US
from ..exports.nbd.server import Server
from ..exports.vhost import SPIN_US as VHOST_SPIN_US
from ..exports.vhost import Server as VhostServer
from ..storage.cdrom import find_drive
from .settings import VHOST, DiskSettings, Settings

CDROM = "cdrom"
SECTOR = 512


class GuestDisk:
    """One disk of the machine.

    id: "disk0", ...; the name of its export and of QEMU's node. bus: "" for what lies in the CD-ROM drive.
    nodes: how many NBD nodes QEMU has had for it. vhost_socket: where QEMU has it on the bus vhost.
    """

    def __init__(self, id: str, disk: Disk, bus: str, *, snapshot: bool = False) -> None:
        self.id = id
        self.disk = disk
        self.bus = bus
        self.snapshot = snapshot
        self.export = ServedExport(
            disk.door, id, description=os.path.basename(disk.name), size=self.size if bus else None
        )
        self.nodes = 0
        self.vhost_socket = ""
        self._vhost: VhostServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return self.disk.name

    @property
    def writable(self) -> bool:
        return self.disk.writable

    @property
    def size(self) -> int:
        """What the guest can see of it, in bytes."""
        return self.disk.size // SECTOR * SECTOR if self.bus else self.disk.size

    @property
    def keeps_snapshots(self) -> bool:
        return self.disk.format == "qcow2"

    def resized(self) -> None:
        """The next client is told the size that the disk has now; a guest on vhost is told at once."""
        self.export.size = self.size
        if self._vhost is not None:
            self._vhost.resized()

    def serve_vhost(
        self, socket: str, *, spin_us: int, log: Callable[[str], None], on_full: Callable[[str], None]
    ) -> None:
        """Let QEMU have it at a socket of its own."""

        def say(text: str) -> None:
            log(f"{self.id}: {text}")

        if not hasattr(os, "eventfd"):
            raise UsageError(f"the bus {VHOST} needs Linux", hint="use virtio")
        listener = sockets.listen_unix(socket)
        self.vhost_socket = socket
        self._vhost = VhostServer(
            self.disk.door, listener, id=f"enban-{self.id}", spin_us=spin_us, log=say, on_full=on_full
        )
        self._thread = threading.Thread(target=self._vhost.run, name=f"vhost-{self.id}", daemon=True)
        self._thread.start()

    def end_vhost(self) -> None:
        """Answer what the guest has asked for, and end the server."""
        if self._vhost is not None and self._thread is not None:
            self._vhost.stop()
            self._thread.join()
            self._vhost = None
            os.unlink(self.vhost_socket)

    def next_node(self, socket: str) -> dict[str, Any]:
        """A QEMU block node that connects to the export anew."""
        self.nodes += 1
        return {
            "driver": "nbd",
            "node-name": self.node,
            "server": {"type": "unix", "path": socket},
            "export": self.id,
            "discard": "unmap",
            "read-only": not self.writable,
        }

    @property
    def node(self) -> str:
        """The NBD node that serves it now."""
        return f"{self.id}-{self.nodes}"

    def format_node(self) -> dict[str, Any]:
        """The QEMU block node that the device holds."""
        return {
            "driver": "raw",
            "node-name": self.id,
            "file": self.node,
            "discard": "unmap",
            "read-only": not self.writable,
        }


class Disks:
    """All disks of a machine and the server behind them.

    socket: path of the server's unix socket. log: gets the server's lines. on_full: called from any thread
    when there is no room for a write on the bus vhost, which waits until the machine was paused and goes on.
    """

    def __init__(
        self, socket: str, log: Callable[[str], None], on_full: Callable[[str], None] = lambda text: None
    ) -> None:
        self.socket = socket
        self.disks: list[GuestDisk] = []
        self.cdrom: GuestDisk | None = None
        self.followed = ""  # the host's drive whose discs the guest gets, if any
        self._discs = 0
        self._log = log
        self._on_full = on_full
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, settings: Settings) -> None:
        """Open every disk and serve them. What was opened is closed again if one cannot be."""
        try:
            for number, one in enumerate(settings.disk_list()):
                self.disks.append(disk := _open(f"disk{number}", one, settings))
                if disk.size < disk.disk.size:
                    self._log(
                        f"{disk.name}: the guest sees {disk.size // SECTOR} whole sectors, not the "
                        f"{disk.disk.size - disk.size} bytes after them; enban resize makes the disk larger"
                    )
            if settings.cdrom:
                self._first_disc(settings)
            exports = [one.export for one in self._all()]
            for disk in self.disks:
                if disk.bus == VHOST:
                    path, spin_us = f"{self.socket}-{disk.id}", _spin_us(settings, vhost=True)
                    disk.serve_vhost(path, spin_us=spin_us, log=self._log, on_full=self._on_full)
            self._server = Server(
                exports, [sockets.listen_unix(self.socket)], spin_us=_spin_us(settings), log=self._log
            )
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._server.run, name="guest-disks", daemon=True)
        self._thread.start()

    def _first_disc(self, settings: Settings) -> None:
        try:
            self.cdrom = self.open_disc(settings.cdrom, settings)
        except NoMediumError as error:  # the host's drive is empty: the guest's is too, until a disc comes
            self._log(str(error))
            self.followed = find_drive(settings.cdrom)

    def _all(self) -> list[GuestDisk]:
        return [*self.disks, *([self.cdrom] if self.cdrom is not None else [])]

    def open_disc(self, path: str, settings: Settings) -> GuestDisk:
        """A disc for the CD-ROM drive: an image, or the host's drive. Not served yet."""
        self._discs += 1
        disk = enban.open(path, format="raw", gate=settings.gate)
        return GuestDisk(f"{CDROM}{self._discs}", disk, "")

    def change_disc(self, disc: GuestDisk | None) -> None:
        """Serve another disc, or none; the one before is closed. QEMU must have let go of it."""
        assert self._server is not None
        before, self.cdrom = self.cdrom, disc
        if disc is not None:
            self._server.exports[disc.id] = disc.export
        if before is not None:
            self._server.exports.pop(before.id, None)
            before.disk.close()

    def serve_disc(self, disc: GuestDisk) -> None:
        """Let QEMU reach a disc that is about to be inserted."""
        assert self._server is not None
        self._server.exports[disc.id] = disc.export

    @property
    def exports(self) -> list[str]:
        """Names of what QEMU can reach."""
        return list(self._server.exports) if self._server is not None else []

    def withdraw_disc(self, disc: GuestDisk) -> None:
        """Serve a disc no more that was not inserted after all."""
        assert self._server is not None
        self._server.exports.pop(disc.id, None)

    def find(self, word: str) -> GuestDisk:
        """A disk by its id, its number or its file's name. Raises UsageError."""
        for one in self.disks:
            if word in (one.id, one.id.removeprefix("disk"), one.name, os.path.basename(one.name)):
                return one
        known = ", ".join(f"{one.id} ({one.name})" for one in self.disks) or "none"
        raise UsageError(f"the machine has no disk '{word}'", hint=f"its disks: {known}")

    def close(self) -> None:
        """Answer what QEMU has sent, end the server, flush and close every disk.

        Raises the first error met, after everything is closed.
        """
        if self._server is not None and self._thread is not None:
            self._server.stop()
            self._thread.join()
            self._server = None
            try:
                os.unlink(self.socket)
            except FileNotFoundError:
                pass
        for one in self.disks:
            one.end_vhost()
        first: EnbanError | None = None
        for one in self._all():
            try:
                one.disk.close()
            except EnbanError as error:
                first = first or error
        self.disks, self.cdrom = [], None
        if first is not None:
            raise first


def _spin_us(settings: Settings, *, vhost: bool = False) -> int:
    """Spinning answers sooner, but only where a processor is free for it. Over NBD the guest's processors,
    QEMU's disk thread and ours come first; by vhost the guest's, for there is no other hop."""
    if settings.spin_us is not None:
        return settings.spin_us
    free = (os.cpu_count() or 1) - settings.cpus
    if vhost:
        return VHOST_SPIN_US if free >= 1 else 0
    return SPIN_US if free >= 3 else 0


def _open(id: str, wanted: DiskSettings, settings: Settings) -> GuestDisk:
    snapshot = settings.snapshot and not wanted.read_only
    disk = enban.open(
        wanted.reference,
        format=wanted.format,
        writable=not wanted.read_only,
        cache=settings.cache,
        gate=settings.gate,
        snapshot=snapshot,
        snapshot_dir=settings.snapshot_dir,
    )
    try:
        return GuestDisk(id, disk, wanted.bus, snapshot=snapshot)
    except BaseException:
        disk.close()
        raise
