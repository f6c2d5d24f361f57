"""`enban dd`: a part of a disk as a new image."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError
from enban.jobs.dd import dd
from enban.units import SECTOR, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    words: dict[str, str] = {}
    for operand in arguments.operands:
        name, equals, value = operand.partition("=")
        if not equals or name not in ("if", "of", "bs", "count", "skip"):
            raise UsageError(f"'{operand}' is not known", hint="use if=, of=, bs=, count= and skip=")
        words[name] = value
    if "if" not in words or "of" not in words:
        raise UsageError("dd needs if=FILE and of=FILE")
    with (
        common.progress(arguments, "dd") as progress,
        common.open_disk(arguments, words["if"], format=arguments.text("-f")) as source,
    ):
        result = dd(
            source,
            words["of"],
            arguments.text("-O", "raw"),
            block_size=parse_size(words["bs"]) if "bs" in words else SECTOR,
            count=parse_size(words["count"]) if "count" in words else None,
            skip=parse_size(words.get("skip", "0")),
            gate=common.gate(arguments),
            progress=progress.update,
        )
    if result.beyond:
        common.complain(f"{words['if']}: skip= reaches past the end; the new image is empty")
    return 0


VERB = Verb(
    "dd",
    "Copy a part of a disk, counted in blocks, into a new image. Blocks of zeros take no space there.",
    "dd [flags] if=FILE of=FILE [bs=SIZE] [count=N] [skip=N]",
    (
        common.FORMAT,
        Flag("-O", "Format of the new image: raw (if not given), qcow2, qcow", value="FMT"),
        common.IMAGE_OPTS,
        common.OBJECT,
        common.FORCE_SHARE,
        common.UNTRUSTED,
        common.PROGRESS,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(1, -1),
    examples=(
        ("the first MiB of a disk", "dd if=disk.qcow2 of=start.img bs=1M count=1"),
        ("all but the first MiB, as qcow2", "dd -O qcow2 if=disk.qcow2 of=rest.qcow2 bs=1M skip=1"),
    ),
    notes="bs= is 512 bytes if not given. count= counts the blocks copied, without those skipped.",
)
