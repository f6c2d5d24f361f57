"""`enban stream`: an image takes over what it shows of its backing files."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.jobs.stream import stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    with common.progress(arguments, "stream") as progress:
        stream(
            common.reference(arguments, arguments.operands[0]),
            arguments.text("-b"),
            format=arguments.text("-f"),
            cache=arguments.text("-t", "writeback"),
            gate=common.gate(arguments),
            passphrase=common.ask_passphrase(),
            progress=progress.update,
        )
    return 0


VERB = Verb(
    "stream",
    "Copy into an image what it shows of its backing files, and let go of them. The disk reads the same "
    "before, during and after.",
    "stream [flags] FILE",
    (
        Flag(
            "-b --base",
            "Let go only of the images above this one of the chain, which becomes the backing file",
            value="BASE",
        ),
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
    operands=(1, 1),
    examples=(
        ("an image that needs no other file", "stream layer.qcow2"),
        ("leave out the layers in between", "stream --base base.qcow2 top.qcow2"),
    ),
    notes="It can be interrupted at any moment and begun again: what was copied is not copied twice.",
)
