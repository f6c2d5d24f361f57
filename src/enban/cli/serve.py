"""`enban serve`: disks over NBD, or one by vhost-user, until told to stop."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from enban.cli.options import Arguments
    from enban.exports.nbd.service import Settings
    from enban.exports.process import Wanted


def run(arguments: Arguments) -> int:
    from enban.exports.nbd.service import serve

    log = _drop if arguments.on("-q") else common.complain
    wanted, settings = _wanted(arguments), _settings(arguments)
    if arguments.on("--vhost-user"):
        return _vhost_user(arguments, wanted, settings, log)
    serve(wanted, settings, announce=_announce, log=log)
    return 0


def _vhost_user(
    arguments: Arguments, wanted: list[Wanted], settings: Settings, log: Callable[[str], None]
) -> int:
    from enban.exports.vhost import SPIN_US
    from enban.exports.vhost.service import serve

    if len(wanted) > 1:
        raise UsageError("--vhost-user is for a single disk", hint="start one enban serve for each")
    for name in _OF_NBD:
        if arguments.on(name):
            raise UsageError(f"{name} does not go with --vhost-user", hint="see: enban serve --help")
    if not arguments.on("--spin-us"):
        settings.spin_us = SPIN_US
    serve(wanted[0], settings, arguments.text("--vhost-user"), announce=_announce, log=log)
    return 0


_OF_NBD = (
    *("-x", "-D", "-k", "-p", "-b", "-e", "-B", "--offset", "--size", "--tls-dir", "--tls-any-client"),
    *("--idle-exit", "--handshake-timeout", "--no-sr", "--keep-awake", "--trace"),
)


def _announce(uri: str) -> None:
    print(uri, flush=True)


def _drop(text: str) -> None:
    pass


def _wanted(arguments: Arguments) -> list[Wanted]:
    from os.path import basename

    from enban.exports.process import Wanted

    names, files = arguments.all("-x"), arguments.operands
    if len(names) > len(files):
        raise UsageError(
            f"{len(names)} names for {len(files)} images", hint="give -x once for each image, in order"
        )
    single = len(files) == 1
    if not single and (arguments.on("--offset") or arguments.on("--size")):
        raise UsageError("--offset and --size are for a single image")
    if not single and arguments.on("-B"):
        raise UsageError("--bitmap is for a single image")
    return [
        Wanted(
            common.reference(arguments, file),
            names[place] if place < len(names) else "" if single else basename(file),
            format=arguments.text("-f"),
            offset=parse_size(arguments.text("--offset", "0")),
            size=parse_size(arguments.text("--size")) if arguments.on("--size") else None,
            description=arguments.text("-D"),
            bitmaps=arguments.all("-B"),
        )
        for place, file in enumerate(files)
    ]


def _settings(arguments: Arguments) -> Settings:
    from enban.exports.nbd.service import Settings

    settings = Settings()
    settings.read_only = arguments.on("-r")
    settings.socket_path = arguments.text("-k")
    settings.tcp = arguments.on("-p") or arguments.on("-b")
    settings.bind = arguments.text("-b")
    settings.port = common.number(arguments, "-p", settings.port, most=65535)
    settings.shared = common.number(arguments, "-e", settings.shared)
    settings.tls_dir = arguments.text("--tls-dir")
    settings.tls_verify = not arguments.on("--tls-any-client")
    settings.pid_file = arguments.text("--pid-file")
    settings.idle_s = common.number(arguments, "--idle-exit", 0)
    settings.handshake_s = common.number(arguments, "--handshake-timeout", int(settings.handshake_s), least=1)
    settings.spin_us = common.number(arguments, "--spin-us", settings.spin_us, most=100_000)
    settings.structured_replies = not arguments.on("--no-sr")
    settings.keep_awake = arguments.on("--keep-awake")
    settings.trace = arguments.text("--trace")
    settings.cache = arguments.text("-t", settings.cache)
    settings.snapshot = arguments.on("--snapshot")
    settings.snapshot_dir = arguments.text("--snapshot-dir")
    settings.gate = common.gate(arguments)
    settings.passphrase = common.ask_passphrase()
    if arguments.on("--tls-any-client") and not settings.tls_dir:
        raise UsageError("--tls-any-client needs --tls-dir")
    if arguments.on("-B") and not settings.structured_replies:
        raise UsageError(
            "--bitmap needs structured replies", hint="leave out --no-structured-replies or --bitmap"
        )
    if settings.keep_awake and not settings.spin_us:
        raise UsageError(
            "--keep-awake is for clients that --spin-us finds quick", hint="leave out --spin-us 0"
        )
    if settings.snapshot and settings.read_only:
        raise UsageError("--snapshot is for exports that take writes", hint="leave out -r")
    if settings.snapshot_dir and not settings.snapshot:
        raise UsageError("--snapshot-dir goes with --snapshot")
    return settings


VERB = Verb(
    "serve",
    "Serve disks over NBD, to QEMU, the Linux kernel, libnbd, fio.",
    "serve [flags] FILE...",
    (
        common.FORMAT,
        Flag("-r --read-only", "Take no writes; the images are opened for reading"),
        Flag("--snapshot", "Take writes, but keep them in a temporary file: at the end they are gone"),
        Flag("--snapshot-dir", "Where that file goes; it has no name ($TMPDIR, else /var/tmp)", value="DIR"),
        Flag(
            "-x --name",
            "Name of the export; for several images once for each, in order. "
            "Without it a single image is the default export, several go by their file names",
            value="NAME",
        ),
        Flag("-D --description", "Text that clients can show", value="TEXT"),
        Flag(
            "-k --socket", "Unix socket to listen on; without it and -p a private one is made", value="PATH"
        ),
        Flag("-p --port", "Listen on this TCP port; 0 for any that is free", value="PORT"),
        Flag(
            "-b --bind", "TCP address to listen on, * for all; without it this machine alone", value="ADDRESS"
        ),
        Flag(
            "--vhost-user",
            "Not NBD: be a vhost-user-blk device at this unix socket, for one QEMU whose memory is shared",
            value="SOCKET",
        ),
        Flag("-e --shared", "Clients at once, 0 for any number; more wait (64)", value="N"),
        Flag(
            "-B --bitmap",
            "Let clients ask what changed by this dirty bitmap of the image; may be given several times",
            value="NAME",
        ),
        Flag("--offset", "Serve the disk from this byte on", value="OFFSET"),
        Flag("--size", "Serve so many bytes of it", value="SIZE"),
        Flag("--tls-dir", "Speak TLS only, with the certificates in this directory", value="DIR"),
        Flag("--tls-any-client", "Do not ask clients for a certificate"),
        Flag("--pid-file", "Write the process id here once clients may come", value="FILE"),
        Flag("--idle-exit", "End after so many seconds without a client", value="SECONDS"),
        Flag("--handshake-timeout", "Seconds a client has to finish the handshake (10)", value="SECONDS"),
        Flag(
            "--spin-us",
            "Before waiting for a client, look again and again for so many microseconds if it has been "
            "quick: halves the latency, costs processor time; 0 for never (50, with --vhost-user 150)",
            value="US",
        ),
        Flag(
            "--no-sr --no-structured-replies",
            "Send simple replies, which clients read with fewer calls: many small reads take up to a fifth "
            "less time, but nobody can ask where data are (as map, convert and nbdcopy do)",
        ),
        Flag(
            "--keep-awake",
            "While clients are quick, keep all processors of this machine from sleeping: halves the latency "
            "once more, costs power (Linux, for root)",
        ),
        Flag(
            "--trace",
            "Record each request's life for chrome://tracing or Perfetto (slows down)",
            value="FILE",
        ),
        common.CACHE,
        common.IMAGE_OPTS,
        common.OBJECT,
        common.UNTRUSTED,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(1, -1),
    examples=(
        ("one disk on a private unix socket", "serve disk.qcow2"),
        ("for a virtual machine", "serve -k /run/vm/disk.sock disk.qcow2"),
        ("a disk that is as before when it is over", "serve --snapshot -k /run/vm/disk.sock disk.qcow2"),
        ("for a QEMU that shares its guest's memory", "serve --vhost-user /run/vm/disk.sock disk.qcow2"),
        ("two disks to the network, with TLS", "serve -p 10809 -b '*' --tls-dir certs a.qcow2 b.qcow2"),
    ),
    notes="The URI of each disk is printed. SIGTERM or Ctrl-C ends: what clients have sent is answered, the "
    "disks are flushed and closed. SIGUSR1 prints who is connected and what is in flight, for how long. "
    "Sockets that systemd passes (socket activation) are used instead of -k and -p.",
)
