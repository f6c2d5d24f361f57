"""`enban map`: where the data of a disk is."""

from __future__ import annotations

import sys

from enban.cli import common
from enban.cli.common import shown
from enban.cli.options import Flag, Verb
from enban.errors import UnsupportedOperationError
from enban.jobs.map import HAS_DATA, HAS_OFFSET, PRESENT, READS_ZERO, entries
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from enban.cli.options import Arguments
    from enban.jobs.map import Run

_AT_ONCE = 4096  # lines to a write


def run(arguments: Arguments) -> int:
    offset = parse_size(arguments.text("--start-offset", "0"))
    length = parse_size(arguments.text("--max-length")) if arguments.on("--max-length") else None
    with common.open_disk(
        arguments, arguments.operands[0], format=arguments.text("-f"), keyless=True
    ) as disk:
        found = entries(disk, offset, length)
        if arguments.text("--output") == "json":
            _print_lines(_json(found, offset))
        else:
            _print_lines(_human(found, disk.name))
    return 0


def _print_lines(lines: Iterator[str]) -> None:
    batch: list[str] = []
    try:
        for line in lines:
            batch.append(line)
            if len(batch) == _AT_ONCE:
                sys.stdout.write("".join(batch))
                batch.clear()
    finally:
        sys.stdout.write("".join(batch))


def _json(found: Iterator[Run], offset: int) -> Iterator[str]:
    words = ("false", "true")
    tails: dict[tuple[int, int], str] = {}
    separator = "["
    for start, length, depth, flags, host, _ in found:
        tail = tails.get((depth, flags))
        if tail is None:
            tail = tails[depth, flags] = (
                f', "depth": {depth}, "present": {words[bool(flags & PRESENT)]}'
                f', "zero": {words[bool(flags & READS_ZERO)]}, "data": {words[bool(flags & HAS_DATA)]}'
            )
        if flags & HAS_OFFSET:
            yield f'{separator}{{ "start": {start}, "length": {length}{tail}, "offset": {host}}}'
        else:
            yield f'{separator}{{ "start": {start}, "length": {length}{tail}}}'
        separator = ",\n"
    if separator == "[":  # nothing to list: one empty entry, as qemu-img has it
        yield f'[{{ "start": {offset}, "length": 0, "depth": 0'
        yield ', "present": false, "zero": false, "data": false}'
    yield "]\n"


def _human(found: Iterator[Run], name: str) -> Iterator[str]:
    yield f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n"
    for start, length, _, flags, host, node in found:
        if not flags & HAS_DATA or flags & READS_ZERO:
            continue
        if not flags & HAS_OFFSET:
            raise UnsupportedOperationError(
                "compressed or encrypted clusters have no plain place in a file",
                path=name,
                offset=start,
                hint="use --output=json",
            )
        yield f"{_hex(start):<16}{_hex(length):<16}{_hex(host):<16}{shown(node.data.name)}\n"


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"


VERB = Verb(
    "map",
    "List which parts of a disk hold data, and where in which file of the backing chain the data is.",
    "map [flags] FILE",
    (
        common.FORMAT,
        common.OUTPUT,
        Flag("--start-offset -s", "First guest byte to list", value="OFFSET"),
        Flag("--max-length -l", "How many guest bytes to list", value="LENGTH"),
        common.IMAGE_OPTS,
        common.OBJECT,
        common.FORCE_SHARE,
        common.UNTRUSTED,
        common.HELP,
    ),
    run,
    operands=(1, 1),
    examples=(
        ("where the data is", "map disk.qcow2"),
        ("all there is to know, also of zeros and of layers below", "map --output=json disk.qcow2"),
    ),
)
