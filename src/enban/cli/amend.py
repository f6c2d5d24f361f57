"""`enban amend`: what an image was created with, changed later."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb, table
from enban.errors import UsageError
from enban.jobs.amend import amend, amend_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    if common.wants_list(arguments.all("-o")):
        format = arguments.text("-f", "qcow2")
        print(f"Options of format {format} that can be amended:")
        for line in table([(f"{row.name}=<{row.kind}>", row.text) for row in amend_table(format)]):
            print(line)
        return 0
    if not arguments.operands:
        raise UsageError("which image is to be amended?", hint="see: enban amend --help")
    if not arguments.on("-o"):
        raise UsageError("which option? give -o NAME=VALUE", hint="list them with -o help")
    with common.progress(arguments, "amend") as progress:
        amend(
            common.reference(arguments, arguments.operands[0]),
            common.key_values(arguments.all("-o")),
            format=arguments.text("-f"),
            cache=arguments.text("-t", "writeback"),
            gate=common.gate(arguments),
            progress=progress.update,
        )
    return 0


VERB = Verb(
    "amend",
    "Change what an image was created with, where the format allows it. The disk reads the same as before.",
    "amend [flags] -o NAME=VALUE,... FILE",
    (
        Flag("-o", "What to change; `-o help` lists the options", value="OPTIONS"),
        common.FORMAT,
        common.CACHE,
        common.IMAGE_OPTS,
        common.OBJECT,
        common.UNTRUSTED,
        common.PROGRESS,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(0, 1),
    examples=(
        ("for programs that know the old version only", "amend -o compat=0.10 disk.qcow2"),
        ("many more snapshots of one cluster", "amend -o refcount_bits=32 disk.qcow2"),
        ("what can be changed", "amend -o help"),
    ),
    notes="After a crash each option is as before or as asked, and the image checks clean or with leaks.",
)
