"""`enban run`: a guest on QEMU, on our disks."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments
    from enban.guest.settings import DiskSettings, SerialPort, Settings


def run(arguments: Arguments) -> int:
    from enban.guest.detached import tell_ready
    from enban.guest.running import run as run_machine

    settings = _settings(arguments)
    quiet = arguments.on("-q")
    if arguments.on("--detach"):
        from enban.guest.detached import detach

        print(detach(_again(arguments)))
        return 0
    run_machine(
        settings,
        terminal=not arguments.on("--no-terminal"),
        grace_s=common.number(arguments, "--grace", 30, most=86400),
        log=_drop if quiet else common.complain,
        ready=tell_ready,
    )
    return 0


def _again(arguments: Arguments) -> list[str]:
    """This command line without --detach."""
    words = ["run"]
    for flag in VERB.flags:
        name = flag.names[0]
        if name != "--detach":
            for value in arguments.all(name):
                words += [name, value] if flag.value else [name]
    disks = arguments.operands[: len(arguments.operands) - len(arguments.tail)]
    return [*words, *disks, "--", *arguments.tail]


def _drop(text: str) -> None:
    pass


def _settings(arguments: Arguments) -> Settings:
    from enban.guest.settings import CONSOLE, Settings

    disks = arguments.operands[: len(arguments.operands) - len(arguments.tail)]
    cdrom = arguments.text("--cdrom", "none")
    if arguments.on("--vnc") and arguments.text("--display") != "vnc":
        raise UsageError("--vnc is where a VNC display listens, and there is none", hint="give --display vnc")
    return Settings(
        disks=[_disk(arguments, name) for name in disks],
        snapshot=arguments.on("--snapshot"),
        snapshot_dir=arguments.text("--snapshot-dir") or None,
        cdrom="" if cdrom == "none" else cdrom,
        memory=parse_size(arguments.text("-m", "512M")),
        cpus=common.number(arguments, "--cpus", 1, least=1, most=255),
        accel=arguments.text("--accel", "auto"),
        machine=arguments.text("--machine", "pc"),
        display=arguments.text("--display", "none"),
        vnc=arguments.text("--vnc", "127.0.0.1:5900"),
        layout=arguments.text("-k"),
        serial=[_serial(spec, number) for number, spec in enumerate(arguments.all("--serial"))] or [CONSOLE],
        bus=arguments.text("--bus", "virtio"),
        spin_us=common.number(arguments, "--spin-us", 0, most=100_000) if arguments.on("--spin-us") else None,
        boot=arguments.text("--boot", "c"),
        kernel=arguments.text("--kernel"),
        initrd=arguments.text("--initrd"),
        append=arguments.text("--append"),
        name=arguments.text("--name"),
        load=arguments.text("--load"),
        paused=arguments.on("--paused"),
        qemu=arguments.text("--qemu"),
        cache=arguments.text("-t", "writeback"),
        gate=common.gate(arguments),
        extra=tuple(arguments.tail),
    )


def _disk(arguments: Arguments, name: str) -> DiskSettings:
    from enban.guest.settings import DiskSettings

    return DiskSettings(
        common.reference(arguments, name), format=arguments.text("-f"), read_only=arguments.on("-r")
    )


def _serial(spec: str, number: int) -> str | SerialPort:
    from enban.guest.settings import CONSOLE

    if spec.startswith("kd:"):
        from enban.serial import debug_port

        return lambda: debug_port(spec, id=f"kd{number}", log=common.complain)
    return CONSOLE if spec in ("stdio", CONSOLE) else spec


VERB = Verb(
    "run",
    "Run a guest on QEMU; every block it reads or writes is enban's.",
    "run [flags] [DISK...] [-- QEMU arguments]",
    (
        common.FORMAT,
        Flag("-r --read-only", "The guest cannot write to the disks"),
        Flag(
            "--snapshot",
            "Writes go to temporary overlays and vanish at the end, or are kept by `enban ctl NAME commit`",
        ),
        Flag("--snapshot-dir", "Where those overlays are; without it $TMPDIR, else /var/tmp", value="DIR"),
        Flag(
            "--cdrom",
            "Disc in the CD-ROM drive: an image, /dev/cdrom for the one in this machine's, or none",
            value="PATH",
        ),
        Flag("-m --memory", "The guest's memory (512M)", value="SIZE"),
        Flag("--cpus", "The guest's processors (1)", value="N"),
        Flag(
            "--accel",
            "kvm, tcg, or auto: KVM where it works (auto)",
            value="WHAT",
            choices=("auto", "kvm", "tcg"),
        ),
        Flag(
            "--machine",
            "QEMU's machine type; name a version (pc-i440fx-7.2) to load states of an old QEMU (pc)",
            value="TYPE",
        ),
        Flag(
            "--bus",
            "What disks are attached to: virtio, ide, sata, or vhost, which is virtio whose requests are "
            "taken straight from the guest's memory (virtio)",
            value="BUS",
            choices=("virtio", "vhost", "ide", "sata"),
        ),
        Flag("--boot", "Start from: c the disks, d the CD-ROM (c)", value="ORDER", choices=("c", "d")),
        Flag("--kernel", "Start this Linux kernel", value="FILE"),
        Flag("--initrd", "With this initial RAM disk", value="FILE"),
        Flag("--append", "And this kernel command line", value="TEXT"),
        Flag("--display", "none, vnc or gtk (none)", value="WHAT", choices=("none", "vnc", "gtk")),
        Flag("--vnc", "Where the VNC display listens (127.0.0.1:5900)", value="ADDRESS:PORT"),
        Flag("-k --layout", "Keyboard layout that the guest is set to: en-us, ja, de, ...", value="LAYOUT"),
        Flag(
            "--serial",
            "A serial line, in order: stdio is this terminal; kd:unix=PATH, kd:tcp=PORT, kd:pipe=PATH or "
            "kd:tty=DEVICE,baud=N a port for kernel debuggers, with ,doctor and ,record=FOLDER as `serial "
            "bridge` has them; none, file:PATH, pty or what else QEMU takes; without it one on the terminal",
            value="SPEC",
        ),
        Flag("--name", "Name for `enban ctl`; without it that of the first disk's file", value="NAME"),
        Flag(
            "--load", "Begin with this state (`enban ctl NAME snapshot save`) instead of booting", value="TAG"
        ),
        Flag("--paused", "Do not let the guest run yet"),
        Flag("--detach", "Return once the machine runs, and leave it in the background"),
        Flag("--no-terminal", "Leave this terminal alone: the console is neither shown nor typed into"),
        Flag("--grace", "Seconds a guest has to shut down when asked to (30)", value="SECONDS"),
        Flag("--qemu", "The QEMU program (qemu-system-x86_64)", value="PROGRAM"),
        Flag(
            "--spin-us",
            "Look for the guest's next request for so many microseconds before sleeping, if it has been "
            "quick; 0 for never (150 on vhost, 50 elsewhere, 0 without a processor to spare)",
            value="US",
        ),
        common.CACHE,
        common.IMAGE_OPTS,
        common.UNTRUSTED,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(0, -1),
    examples=(
        ("a guest with its console in this terminal", "run disk.qcow2"),
        ("try something out, and forget it", "run --snapshot disk.qcow2"),
        (
            "install from a disc, looking on by VNC",
            "run --cdrom install.iso --boot d --display vnc disk.qcow2",
        ),
        ("with a network, which is QEMU's matter", "run disk.qcow2 -- -nic user,hostfwd=tcp::2222-:22"),
    ),
    notes="Needs qemu-system-x86_64 7.2 or newer (Debian package qemu-system-x86) and the extra "
    "enban[guest]. In a terminal Ctrl-] ends the machine. It, SIGTERM or SIGINT asks the guest to shut down; "
    "when the grace is over, or with a second signal, QEMU ends, with a third it is killed. The disks are "
    "flushed and closed in any case.",
)
