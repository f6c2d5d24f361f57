"""`enban measure`: how large a file a new image needs."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError
from enban.jobs.measure import measure
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    target = arguments.text("-O", "raw")
    if common.wants_list(arguments.all("-o")):
        common.print_options(target)
        return 0
    options = common.key_values(arguments.all("-o"))
    if arguments.operands:
        if arguments.on("--size"):
            raise UsageError("give --size or an image, not both")
        snapshot = common.snapshot_meant(arguments.text("-l"))
        with common.open_disk(
            arguments,
            arguments.operands[0],
            format=arguments.text("-f"),
            snapshot_name=snapshot,
            keyless=True,
        ) as disk:
            found = measure(target, options, source=disk)
    else:
        for flag in ("-f", "-l", "-U", "--image-opts"):
            if arguments.on(flag):
                raise UsageError(f"flag {flag} goes with an image")
        size = parse_size(arguments.text("--size")) if arguments.on("--size") else None
        found = measure(target, options, size=size)
    if arguments.on("--bitmaps"):
        for key in ("required", "fully-allocated"):
            found[key] += found.get("bitmaps", 0)
    if arguments.text("--output") == "json":
        common.print_json(found)
    else:
        print(f"required size: {found['required']}")
        print(f"fully allocated size: {found['fully-allocated']}")
        if "bitmaps" in found:
            print(f"bitmaps size: {found['bitmaps']}")
    return 0


VERB = Verb(
    "measure",
    "Tell how many bytes a new image will need: for the data there is now, and when it is full.",
    "measure [flags] (--size SIZE | FILE)",
    (
        Flag("-O", "Format of the new image: raw (if not given) or qcow2", value="FMT"),
        common.OPTIONS,
        Flag("--size", "Size of an empty disk", value="SIZE"),
        common.FORMAT,
        Flag("-l", "Measure an internal snapshot: its name or id", value="SNAPSHOT"),
        Flag("--bitmaps", "Count the dirty bitmaps in, for convert --bitmaps"),
        common.OUTPUT,
        common.IMAGE_OPTS,
        common.OBJECT,
        common.FORCE_SHARE,
        common.UNTRUSTED,
        common.HELP,
    ),
    run,
    operands=(0, 1),
    examples=(
        ("a volume for a new disk", "measure -O qcow2 --size 100G"),
        ("a volume for an existing one", "measure -O qcow2 -f raw disk.img"),
    ),
)
