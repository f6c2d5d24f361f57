"""`enban compare`: do two disks hold the same?

Exit codes: 0 they do, 1 they differ, 2 an image could not be opened or the call is wrong,
4 an image could not be read.
"""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import EnbanError
from enban.jobs.compare import CONTENT, SIZE, compare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments

EXIT_DIFFER, EXIT_READ = 1, 4


def run(arguments: Arguments) -> int:
    quiet = arguments.on("-q")
    cache = arguments.text("-T", "writeback")
    first, second = arguments.operands
    with (
        common.open_disk(arguments, first, format=arguments.text("-f"), cache=cache) as one,
        common.open_disk(arguments, second, format=arguments.text("-F"), cache=cache) as other,
    ):
        try:
            with common.progress(arguments, "compare") as progress:
                result = compare(one, other, strict=arguments.on("-s"), progress=progress.update)
                if not result.equal:
                    progress.abort()  # it did not go through all of both
        except EnbanError as error:
            common.complain(str(error))
            return EXIT_READ
    if not quiet:
        if result.reason == SIZE:
            print("Strict mode: Image size mismatch!")
        elif result.equal or result.reason == CONTENT:
            if result.sizes_differ and (result.equal or result.offset >= min(one.size, other.size)):
                print("Warning: Image size mismatch!")
            print(
                f"Content mismatch at offset {result.offset}!" if result.reason else "Images are identical."
            )
        else:
            print(f"Strict mode: Offset {result.offset} block status mismatch!")
    return 0 if result.equal else EXIT_DIFFER


VERB = Verb(
    "compare",
    "Compare two disks byte for byte, whatever their formats. What one has beyond the end of the other "
    "must be zeros.",
    "compare [flags] FILE FILE",
    (
        Flag("-f --format", "Format of the first image", value="FMT"),
        Flag("-F", "Format of the second image", value="FMT"),
        Flag("-s", "Strict: sizes and what is allocated must be equal too"),
        common.SOURCE_CACHE,
        common.PROGRESS,
        common.QUIET,
        common.IMAGE_OPTS,
        common.OBJECT,
        common.FORCE_SHARE,
        common.UNTRUSTED,
        common.HELP,
    ),
    run,
    operands=(2, 2),
    examples=(
        ("was the conversion right?", "compare -f raw -F qcow2 disk.img disk.qcow2"),
        ("in a script: the exit code alone", "compare -q old.qcow2 new.qcow2"),
    ),
    notes="Exit code: 0 equal, 1 different, 2 not opened or a wrong call, 4 not readable.",
)
