"""`enban commit`: the data of an image into its backing file."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.jobs.commit import commit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    with common.progress(arguments, "commit") as progress:
        commit(
            common.reference(arguments, arguments.operands[0]),
            arguments.text("-b"),
            format=arguments.text("-f"),
            keep=arguments.on("-d"),
            cache=arguments.text("-t", "writeback"),
            gate=common.gate(arguments),
            passphrase=common.ask_passphrase(),
            progress=progress.update,
        )
    if not arguments.on("-q"):
        print("Image committed.")
    return 0


VERB = Verb(
    "commit",
    "Write what an image holds into its backing file, and empty the image. Other images on the same "
    "backing file then no longer show what they did.",
    "commit [flags] FILE",
    (
        Flag("-b", "Commit further down the chain, into this image; FILE keeps its data then", value="BASE"),
        Flag("-d", "Leave the data in FILE as well"),
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
        ("keep the changes of a layer", "commit layer.qcow2"),
        ("then throw the layer away: no need to empty it", "commit -d layer.qcow2"),
    ),
)
