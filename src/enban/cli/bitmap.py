"""`enban bitmap`: the dirty bitmaps of an image."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import EnbanError, UsageError
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.block.disk import Disk
    from enban.cli.options import Arguments

_ACTIONS = ("--add", "--remove", "--clear", "--enable", "--disable", "--merge")


def run(arguments: Arguments) -> int:
    actions = [name for name in arguments.order if name in _ACTIONS]
    if not actions:
        raise UsageError(f"say what to do: {', '.join(_ACTIONS[:-1])} or {_ACTIONS[-1]}")
    if arguments.on("-g") and "--add" not in actions:
        raise UsageError("-g goes with --add")
    for flag in ("-b", "-F"):
        if arguments.on(flag) and "--merge" not in actions:
            raise UsageError(f"{flag} goes with --merge")
    if arguments.on("-F") and not arguments.on("-b"):
        raise UsageError("-F goes with -b")
    granularity = parse_size(arguments.text("-g", "64K"))
    name, bitmap = arguments.operands
    sources = iter(arguments.all("--merge"))
    with common.open_disk(arguments, name, format=arguments.text("-f"), writable=True, keyless=True) as disk:
        for action in actions:
            if action == "--add":
                disk.add_bitmap(bitmap, granularity=granularity, enabled="--disable" not in actions)
            elif action == "--remove":
                disk.remove_bitmap(bitmap)
            elif action == "--clear":
                disk.clear_bitmap(bitmap)
            elif action == "--enable":
                disk.enable_bitmap(bitmap)
            elif action == "--disable":
                disk.disable_bitmap(bitmap)
            else:
                _merge(arguments, disk, bitmap, next(sources))
    return 0


def _merge(arguments: Arguments, disk: Disk, bitmap: str, source: str) -> None:
    if not arguments.on("-b"):
        disk.merge_bitmap(bitmap, source)
        return
    other = common.open_disk(arguments, arguments.text("-b"), format=arguments.text("-F"), keyless=True)
    with other:
        try:
            disk.merge_bitmap(bitmap, source, of=other)
        except EnbanError as error:
            error.path = error.path or other.name
            raise


VERB = Verb(
    "bitmap",
    "Make, change and remove the dirty bitmaps inside a qcow2 image. An enabled bitmap records which parts "
    "of the disk are written, for incremental backups.",
    "bitmap [flags] (--add|--remove|--clear|--enable|--disable|--merge SOURCE)... FILE BITMAP",
    (
        Flag("--add", "Make the bitmap, empty and enabled (with --disable: not enabled)"),
        Flag("--remove", "Remove it"),
        Flag("--clear", "Let it say that nothing changed"),
        Flag("--enable", "Record what is written from now on"),
        Flag("--disable", "Keep it as it is from now on"),
        Flag("--merge", "Add what this other bitmap says", value="SOURCE"),
        Flag("-g --granularity", "With --add: bytes for each bit, a power of two (64K)", value="SIZE"),
        Flag("-b --source-file", "With --merge: take the other bitmap from this image", value="FILE"),
        Flag("-F --source-format", "Format of the image given with -b", value="FMT"),
        common.FORMAT,
        common.IMAGE_OPTS,
        common.OBJECT,
        common.UNTRUSTED,
        common.HELP,
    ),
    run,
    operands=(2, 2),
    examples=(
        ("record from now on what changes", "bitmap --add disk.qcow2 monday"),
        ("what changed in either of two", "bitmap --merge monday disk.qcow2 week"),
    ),
    notes="Several actions are done in the order given. `enban info` lists the bitmaps; one that is in use "
    "or was when the machine stopped is marked in-use there, says nothing any more, and can only be removed.",
)
