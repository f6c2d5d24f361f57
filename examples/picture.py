"""A picture of a disk in the terminal: where its data is, and in which layer.

    python examples/picture.py disk.qcow2 [WIDTH]

Each character stands for an equal part of the disk and shows what most of that part is.
"""

from __future__ import annotations

import shutil
import sys

import enban
from enban.extent import COMPRESSED, DATA, KIND_NAMES, UNALLOCATED, ZERO
from enban.units import format_size

ROWS = 16
NOTHING = "."
SYMBOLS = {DATA: "#", COMPRESSED: "%", ZERO: "0"}  # of the image itself
BELOW = {DATA: "+", COMPRESSED: "*", ZERO: "o"}  # of the images below it


def picture(disk: enban.Disk, width: int, rows: int = ROWS) -> list[str]:
    """Lines of `width` characters."""
    count = max(1, min(width * rows, disk.size // 512))
    cells: list[dict[str, int]] = [{} for _ in range(count)]
    for extent in disk.map():
        symbol = NOTHING
        if extent.kind != UNALLOCATED:
            symbol = (BELOW if extent.depth else SYMBOLS)[extent.kind]
        start, end = extent.start, extent.start + extent.length
        while start < end:
            cell = start * count // disk.size
            stop = min(end, -(-(cell + 1) * disk.size // count))  # where the next cell begins
            cells[cell][symbol] = cells[cell].get(symbol, 0) + stop - start
            start = stop
    line = "".join(max(cell, key=lambda symbol: cell[symbol], default=NOTHING) for cell in cells)
    return [line[start : start + width] for start in range(0, len(line), width)]


def legend(disk: enban.Disk, lines: list[str]) -> str:
    shown = "".join(lines)
    cell = format_size(disk.size // max(1, len(shown)))
    words = [f"one character: {cell}"]
    for symbols, where in ((SYMBOLS, ""), (BELOW, " below")):
        words += [f"{s} {KIND_NAMES[kind]}{where}" for kind, s in symbols.items() if s in shown]
    if NOTHING in shown:
        words.append(f"{NOTHING} nothing")
    return "   ".join(words)


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2 or not all(word.isdigit() for word in arguments[1:]):
        print("usage: picture.py IMAGE [WIDTH]", file=sys.stderr)
        return 2
    width = int(arguments[1]) if len(arguments) == 2 else shutil.get_terminal_size().columns
    try:
        with enban.open(arguments[0], gate=enban.TRUSTED) as disk:
            lines = picture(disk, max(8, width))
            print("\n".join([*lines, "", legend(disk, lines)]))
    except enban.EnbanError as error:
        print(f"picture: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
