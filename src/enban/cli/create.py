"""`enban create`: a new, empty image."""

from __future__ import annotations

from enban.cli import common
from enban.cli.common import shown
from enban.cli.options import Flag, Verb
from enban.errors import UsageError
from enban.jobs.create import create
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    format = arguments.text("-f", "raw")
    if common.wants_list(arguments.all("-o")):
        common.print_options(format)
        return 0
    if not arguments.operands:
        raise UsageError("which file is to be made?", hint="see: enban create --help")
    path, *size_text = arguments.operands
    options = common.creation_options(arguments)
    for flag, name in (("-b", "backing_file"), ("-F", "backing_fmt")):
        if arguments.on(flag):
            if name in options:
                raise UsageError(f"{flag} and -o {name} say the same thing twice")
            options[name] = arguments.text(flag)
    size = create(
        path,
        format,
        options,
        size=parse_size(size_text[0]) if size_text else None,
        unchecked=arguments.on("-u"),
        gate=common.gate(arguments),
    )
    if not arguments.on("-q"):
        options["size"] = str(size)
        given = " ".join(f"{name}={value}" for name, value in options.items())
        print(f"Formatting '{shown(path)}', fmt={format} {shown(given)}")
    common.warn_of(arguments, format, options, size)
    return 0


VERB = Verb(
    "create",
    "Make a new, empty image. It appears under its name when it is complete, and replaces what stood there.",
    "create [flags] FILE [SIZE]",
    (
        Flag("-f --format", "Format of the new image: raw (if not given), qcow2, qcow", value="FMT"),
        common.OPTIONS,
        Flag("-b", "Backing file, relative to the new image; it also gives the size", value="FILE"),
        Flag("-F", "Format of the backing file", value="FMT"),
        common.OBJECT,
        Flag("-u", "Do not look at the backing file; then a size is needed"),
        common.UNTRUSTED,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(0, 2),
    examples=(
        ("a disk of 20 GiB that takes space as it is filled", "create -f qcow2 disk.qcow2 20G"),
        ("a throw-away layer over an image", "create -f qcow2 -b base.qcow2 -F qcow2 layer.qcow2"),
        ("the options of a format", "create -f qcow2 -o help"),
    ),
    notes="SIZE is in bytes or has a suffix k, M, G, T, P or E.",
)
