"""Picks the corpus again: `python fuzz/make_corpus.py DIRECTORY`.

One small mutant for each way in which an image is refused or found damaged, as far as a few
thousand mutants show them.
"""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path
from random import Random

from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.errors import EnbanError
from enban.lab.damage import check
from enban.lab.fuzz import KINDS, mutate, original
from enban.lab.images import Image
from enban.storage.memory import MemoryStorage

MOST_BYTES = 6000  # packed
MOST_FILES = 24


def behaviour(content: bytes, format: str) -> str:
    """In short, what using an image comes to."""
    told = []
    try:
        storage = MemoryStorage(BLOCKING, content)
        disk = Disk(drive(Image("mutant", 0, format=format).open(storage, writable=False)))
        for offset in range(0, min(disk.size, 1 << 18), 1 << 16):
            disk.pread(min(1 << 16, disk.size - offset), offset)
    except EnbanError as error:
        told.append(re.sub(r"0x[0-9a-f]+|\d+", "N", str(error)))
    if format == "qcow2":
        try:
            told += sorted(check(content).kinds)[:3]
        except EnbanError as error:
            told.append(re.sub(r"0x[0-9a-f]+|\d+", "N", str(error)))
    return " ".join(told)


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    for seed in range(1, 400):
        for image in KINDS:
            if image.format == "raw" or len(known) >= MOST_FILES:
                continue
            content = original(image, seed % 7)
            mutate(content, image.format, Random(f"{image} {seed} corpus"))
            what = behaviour(bytes(content), image.format)
            packed = zlib.compress(bytes(content), 9)
            if what and what not in known and len(packed) < MOST_BYTES and content[:4] == b"QFI\xfb":
                known.add(what)
                name = f"{image.name.removeprefix('fuzz-')}-{seed}.z"
                (directory / name).write_bytes(packed)
                print(f"{name}: {what[:120]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
