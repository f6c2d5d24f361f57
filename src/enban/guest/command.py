"""QEMU's command line for a machine.

Everything a saved state depends on (which devices there are, and where) follows from `Settings` alone and
does not depend on the display, so a state saved without one can be loaded with one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from .disks import Disks, GuestDisk
from .settings import CONSOLE, VHOST, Settings

MEBI = 1 << 20
# Slots of the PIIX IDE controller; the CD-ROM drive has bus 1, unit 0.
_IDE = (("ide.0", 0), ("ide.0", 1), ("ide.1", 1))
_CDROM = "bus=ide.1,unit=0"
DRIVE = "cdrom"
IOTHREAD = "disks"
# The name that QEMU gives to a PC's memory by itself, so that a saved state has it in any case.
_MEMORY = "pc.ram"
MOST_QUEUES = 4
# SeaBIOS counts 16 heads and 63 sectors for a small disk. One with less than a cylinder of these has none for
# it, so it cannot be started from, unless it is told otherwise. (On IDE it believes the disk, which says 2.)
_CYLINDER = 16 * 63 * 512
_ONE_CYLINDER = ",lcyls=1,lheads=16,lsecs=63"


def command_line(
    settings: Settings,
    disks: Disks,
    *,
    name: str,
    program: str,
    accel: str,
    monitor: str,
    console: str,
    vnc: str,
    serial: Sequence[str | list[str]],
    incoming: bool,
) -> list[str]:
    """The words of the command. monitor, console, vnc: paths of sockets. serial: the
    serial lines, each QEMU's word or its arguments. incoming: wait for a state."""
    words = [program, "-no-user-config", "-nodefaults", "-S"]
    words += ["-name", f"guest={name}"]
    words += _memory(settings, shared=any(one.bus == VHOST for one in disks.disks))
    words += ["-accel", accel, "-cpu", "host" if accel == "kvm" else "max"]
    words += ["-smp", str(settings.cpus), "-rtc", "base=utc"]
    words += ["-chardev", f"socket,id=monitor,path={_path(monitor)}", "-mon", "chardev=monitor,mode=control"]
    words += ["-vga", "std"]
    if settings.display == "vnc":
        words += ["-display", "none", "-vnc", f"unix:{_path(vnc)}"]
    else:
        words += ["-display", settings.display]
    words += _serial(serial, console)
    words += _disks(disks, settings)
    if settings.kernel:
        words += ["-kernel", settings.kernel]
        if settings.initrd:
            words += ["-initrd", settings.initrd]
        if settings.append:
            words += ["-append", settings.append]
    if incoming:
        words += ["-incoming", "defer"]
    return [*words, *settings.extra]


def _memory(settings: Settings, *, shared: bool) -> list[str]:
    """The machine and its memory. shared: in a file without a name that QEMU passes on to us."""
    machine, size = settings.machine, f"{-(-settings.memory // MEBI)}M"
    words = ["-m", size]
    if shared:
        words += ["-object", f"memory-backend-memfd,id={_MEMORY},size={size},share=on"]
        machine += f",memory-backend={_MEMORY}"
    return ["-machine", machine, *words]


def _path(path: str) -> str:
    """A path as a value among QEMU's comma-separated options."""
    return path.replace(",", ",,")


def _serial(ports: Sequence[str | list[str]], console: str) -> list[str]:
    words: list[str] = []
    for port in ports:
        if port == CONSOLE:
            words += ["-chardev", f"socket,id=console,path={_path(console)}", "-serial", "chardev:console"]
        elif isinstance(port, str):
            words += ["-serial", port]
        else:
            words += port
    return words


def _disks(disks: Disks, settings: Settings) -> list[str]:
    words: list[str] = []
    if any(one.bus == "virtio" for one in disks.disks):
        # A thread of its own for the disks: a read takes a quarter less time than through the main loop,
        # which waits for the virtual processors' big lock.
        words += ["-object", f"iothread,id={IOTHREAD}"]
    if any(one.bus == "sata" for one in disks.disks):
        words += ["-device", "ahci,id=sata"]
    used = {"ide": 0, "sata": 0}
    first = 2 if settings.boot == "d" else 1
    for number, one in enumerate(disks.disks):
        if one.bus == VHOST:
            words += _vhost(one, settings, number + first)
            continue
        words += block_nodes(one, disks.socket)
        common = f"drive={one.id},id={one.id}-device,bootindex={number + first},serial=enban-{one.id}"
        if one.bus != "ide" and 0 < one.size < _CYLINDER:
            common += _ONE_CYLINDER
        if one.bus == "virtio":
            words += ["-device", f"virtio-blk-pci,iothread={IOTHREAD},{common}"]
            continue
        place = used[one.bus]
        used[one.bus] += 1
        if one.bus == "ide":
            bus, unit = _IDE[place]
            words += ["-device", f"ide-hd,bus={bus},unit={unit},{common}"]
        else:
            words += ["-device", f"ide-hd,bus=sata.{place},{common}"]
    last = 1 if settings.boot == "d" else len(disks.disks) + 1
    device = f"ide-cd,id={DRIVE},{_CDROM},bootindex={last}"
    if disks.cdrom is not None:
        words += block_nodes(disks.cdrom, disks.socket)
        device += f",drive={disks.cdrom.id}"
    return [*words, "-device", device]


def _vhost(one: GuestDisk, settings: Settings, bootindex: int) -> list[str]:
    socket = f"socket,id={one.id},path={_path(one.vhost_socket)}"
    device = f"vhost-user-blk-pci,id={one.id}-device,chardev={one.id},bootindex={bootindex}"
    return ["-chardev", socket, "-device", f"{device},num-queues={min(settings.cpus, MOST_QUEUES)}"]


def block_nodes(one: GuestDisk, socket: str) -> list[str]:
    return ["-blockdev", json.dumps(one.next_node(socket)), "-blockdev", json.dumps(one.format_node())]
