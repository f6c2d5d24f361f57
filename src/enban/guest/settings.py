"""What a machine is made of. Plain values: nothing is opened or looked up here."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..block.gate import SIBLINGS, Gate
from ..errors import UsageError
from .keyboard.layouts import layout as find_layout

# vhost is virtio for the guest; its requests come straight from the guest's memory, which is shared with us.
VHOST = "vhost"
BUSES = ("virtio", VHOST, "ide", "sata")
ACCELERATORS = ("auto", "kvm", "tcg")
DISPLAYS = ("none", "vnc", "gtk")
# How many disks a bus takes besides the CD-ROM drive.
ROOM = {"virtio": 16, VHOST: 16, "ide": 3, "sata": 6}
CONSOLE = "console"
LAYOUT = "en-us"


# A serial line that is served here: QEMU's arguments for its end, and the work at the other, which
# is cancelled when the machine has ended. Called once, when the machine starts.
SerialPort = Callable[[], tuple[list[str], Coroutine[Any, Any, None]]]


@dataclass(slots=True)
class DiskSettings:
    """One disk. reference, format: as for `enban.open`. bus: "" is the machine's."""

    reference: str | dict[str, Any]
    format: str = ""
    read_only: bool = False
    bus: str = ""


@dataclass(slots=True)
class Settings:
    """A machine.

    disks: in the order in which the guest sees them. snapshot: writes go to temporary overlays (in
    `snapshot_dir`, if given) and vanish at the end. cdrom: what lies in the CD-ROM drive, "" nothing;
    "/dev/cdrom" is the host's drive. memory: bytes. machine: QEMU's machine type; name a version
    ("pc-i440fx-7.2") to load states with a newer QEMU. serial: "console" (the first is `Machine.console`),
    QEMU's words for `-serial`, or a SerialPort. spin_us: how long a disk's thread looks for the guest's
    next request before it sleeps, None as it fits this machine. boot: "c" disks first, "d" the CD-ROM first.
    name: of the machine, for `enban ctl`. load: the state to begin with, "" is to boot. extra: further
    arguments for QEMU.
    """

    disks: Sequence[str | dict[str, Any] | DiskSettings] = ()
    snapshot: bool = False
    snapshot_dir: str | None = None
    cdrom: str = ""
    memory: int = 512 << 20
    cpus: int = 1
    accel: str = "auto"
    machine: str = "pc"
    display: str = "none"
    vnc: str = "127.0.0.1:5900"
    layout: str = ""
    serial: Sequence[str | SerialPort] = (CONSOLE,)
    bus: str = "virtio"
    spin_us: int | None = None
    boot: str = "c"
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    name: str = ""
    load: str = ""
    paused: bool = False
    qemu: str = ""
    cache: str = "writeback"
    gate: Gate = SIBLINGS
    extra: Sequence[str] = field(default_factory=tuple)

    def disk_list(self) -> list[DiskSettings]:
        """The disks, each with its bus. Raises UsageError where they do not fit."""
        found = []
        used = dict.fromkeys(BUSES, 0)
        for one in self.disks:
            disk = one if isinstance(one, DiskSettings) else DiskSettings(one)
            bus = disk.bus or self.bus
            if bus not in BUSES:
                raise UsageError(f"'{bus}' is no bus for a disk", hint=f"use {', '.join(BUSES)}")
            used[bus] += 1
            if used[bus] > ROOM[bus]:
                raise UsageError(f"{ROOM[bus]} disks fit on {bus}", hint="use another bus for the rest")
            found.append(DiskSettings(disk.reference, disk.format, disk.read_only, bus))
        return found

    def check(self) -> None:
        """Raises UsageError for values no machine can have."""
        for value, known, what in (
            (self.accel, ACCELERATORS, "accelerator"),
            (self.display, DISPLAYS, "display"),
            (self.boot, ("c", "d"), "boot order"),
            (self.bus, BUSES, "bus for disks"),
        ):
            if value not in known:
                raise UsageError(f"'{value}' is no {what}", hint=f"use {', '.join(known)}")
        if self.memory < 1 << 20:
            raise UsageError(f"{self.memory} bytes are no memory for a guest", hint="give 16M or more")
        if not 1 <= self.cpus <= 255:
            raise UsageError(f"a guest cannot have {self.cpus} processors", hint="give 1 to 255")
        if (self.initrd or self.append) and not self.kernel:
            raise UsageError("an initrd or a kernel command line needs a kernel", hint="give --kernel")
        if self.layout:
            find_layout(self.layout)
        if self.display == "vnc" and {"-k", "--k"} & set(self.extra):
            raise UsageError(
                "with a -k of its own QEMU ignores the keys that the VNC front tells it",
                hint="leave it out of QEMU's arguments; run -k is the guest's layout",
            )
        self.disk_list()
