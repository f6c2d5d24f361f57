"""`enban resize`: another size for a disk."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.jobs.resize import parse_change, resize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    name, change = arguments.operands
    with common.open_disk(arguments, name, format=arguments.text("-f"), writable=True) as disk:
        size = parse_change(change, disk.size)
        resize(
            disk,
            size,
            shrink=arguments.on("--shrink"),
            preallocation=arguments.text("--preallocation", "off"),
        )
    if not arguments.on("-q"):
        print("Image resized.")
    return 0


VERB = Verb(
    "resize",
    "Change the size of a disk. Enlarge it before its partitions; shrink them before it.",
    "resize [flags] FILE [+|-]SIZE",
    (
        common.FORMAT,
        Flag("--shrink", "Allow a smaller size; what lies beyond it is lost"),
        Flag(
            "--preallocation",
            "Space for the new part: off, metadata, falloc or full",
            value="MODE",
            choices=("off", "metadata", "falloc", "full"),
        ),
        common.IMAGE_OPTS,
        common.OBJECT,
        common.UNTRUSTED,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(2, 2),
    examples=(
        ("10 GiB more", "resize disk.qcow2 +10G"),
        ("to exactly 8 GiB, giving up what lies beyond", "resize --shrink -f raw disk.img 8G"),
    ),
    notes="SIZE is in bytes or has a suffix k, M, G, T, P or E.",
)
