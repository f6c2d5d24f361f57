"""`enban rebase`: another backing file for an image."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError
from enban.jobs.rebase import rebase

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    if not arguments.on("-b"):
        raise UsageError(
            "which backing file? give -b FILE, or -b '' for none", hint="see: enban rebase --help"
        )
    with common.progress(arguments, "rebase") as progress:
        rebase(
            common.reference(arguments, arguments.operands[0]),
            arguments.text("-b"),
            arguments.text("-F"),
            format=arguments.text("-f"),
            unsafe=arguments.on("-u"),
            cache=arguments.text("-t", "writeback"),
            gate=common.gate(arguments),
            force_share=arguments.on("-U"),
            passphrase=common.ask_passphrase(),
            progress=progress.update,
        )
    return 0


VERB = Verb(
    "rebase",
    "Base an image on another backing file, or on none. What the new one would show differently is "
    "copied into the image first, so the disk reads as before.",
    "rebase [flags] -b BACKING FILE",
    (
        Flag("-b", "The new backing file, relative to the image; '' for none", value="BACKING"),
        Flag("-F", "Format of the new backing file", value="FMT"),
        Flag("-u", "Change the name alone: the new file holds the same as the old one did"),
        common.FORMAT,
        common.CACHE,
        Flag(
            "-T",
            "Accepted for the sake of scripts; -t counts for all files",
            value="CACHE",
            choices=common.CACHES,
        ),
        common.IMAGE_OPTS,
        common.OBJECT,
        Flag("-U --force-share", "Read backing files although a running guest has them open"),
        common.UNTRUSTED,
        common.PROGRESS,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(1, 1),
    examples=(
        ("make an image stand alone", "rebase -b '' layer.qcow2"),
        ("the backing file was moved", "rebase -u -b ../images/base.qcow2 -F qcow2 layer.qcow2"),
        ("leave out a layer in between", "rebase -b base.qcow2 -F qcow2 top.qcow2"),
    ),
)
