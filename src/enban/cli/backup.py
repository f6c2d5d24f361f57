"""`enban backup`: full and incremental backups."""

from __future__ import annotations

from enban.cli import common
from enban.cli.common import human_size
from enban.cli.options import Flag, Verb
from enban.errors import UsageError
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    from enban.jobs.backup import backup

    if common.wants_list(arguments.all("-o")):
        common.print_options("qcow2")
        return 0
    if len(arguments.operands) != 2:
        raise UsageError("backup needs a source and a target", hint="see: enban backup --help")
    if not arguments.on("-B"):
        raise UsageError("a backup needs the name of a bitmap", hint="say --bitmap NAME")
    if arguments.on("--base") and not arguments.text("--base"):
        raise UsageError("the name of the base is empty")
    source, target = arguments.operands
    with common.progress(arguments, "backup") as progress:
        result = backup(
            common.reference(arguments, source),
            target,
            bitmap=arguments.text("-B"),
            base=arguments.text("--base"),
            format=arguments.text("-f"),
            options=common.creation_options(arguments),
            granularity=parse_size(arguments.text("-g")) if arguments.on("-g") else 0,
            gate=common.gate(arguments),
            passphrase=common.ask_passphrase(),
            verify=arguments.on("--verify"),
            progress=progress.update,
        )
    if not arguments.on("-q"):
        kind = "full" if result.full else "incremental"
        print(f"{kind} backup: {human_size(result.copied)} of {human_size(result.size)} copied")
    return 0


VERB = Verb(
    "backup",
    "Copy a disk into a new qcow2 image, or, with --base, only what changed since the backup before.",
    "backup [flags] --bitmap NAME [--base FILE] SOURCE TARGET",
    (
        Flag("-B --bitmap", "The bitmap in SOURCE that records what changes between backups", value="NAME"),
        Flag("--base", "The backup before this one: TARGET becomes an overlay of it", value="FILE"),
        Flag("-g --granularity", "Bytes for each bit of the bitmap, when it is made (64K)", value="SIZE"),
        Flag("--verify", "Read the backup and all below it, and compare it with the disk"),
        common.FORMAT,
        common.OPTIONS,
        common.OBJECT,
        common.PROGRESS,
        common.QUIET,
        common.IMAGE_OPTS,
        common.UNTRUSTED,
        common.HELP,
    ),
    run,
    operands=(0, 2),
    examples=(
        ("the first one: everything", "backup --bitmap daily disk.qcow2 monday.qcow2"),
        ("the next", "backup --bitmap daily --base monday.qcow2 disk.qcow2 tuesday.qcow2"),
        ("and back", "convert -O qcow2 tuesday.qcow2 restored.qcow2"),
    ),
    notes="SOURCE is a qcow2 image (compat 1.1) that nobody else is writing. TARGET appears when it is "
    "complete and durable, and only then the bitmap is cleared. A bitmap that is inconsistent after a "
    "crash needs a full backup, which makes it anew.",
)
