"""The images that benches read, made here byte for byte the same on every machine, never by enban.

    raw-SIZE        half data, half holes: runs of random bytes, of text and of nothing, 4 KiB to 4 MiB long
    qcow2-SIZE      the same as qcow2, written by qemu-img
    zlib-SIZE       the same compressed, zlib, written by qemu-img
    zstd-SIZE       the same compressed, zstd, written by qemu-img
    qcow-SIZE       the same as qcow, written by qemu-img
    packed-SIZE     the same as qcow, compressed, written by qemu-img
    full-SIZE       qcow2 with every cluster allocated and full of random bytes, written by qemu-img
    meta-SIZE       qcow2 with every cluster allocated, tables in order, no data behind them (see metadata.py)
    shuffled-SIZE   the same with its data clusters in a random order

`python -m bench.inputs FOLDER NAME` makes one (with what it is made from), under its name in FOLDER;
nothing is done when it is there already. A process of its own, so that the memory it needs is not the
harness's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CLUSTER_BYTES = 65536
UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
QEMU_MADE = {
    "qcow2": ["-O", "qcow2"],
    "zlib": ["-O", "qcow2", "-c"],
    "zstd": ["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
    "qcow": ["-O", "qcow"],
    "packed": ["-O", "qcow", "-c"],
}
KINDS = ("raw", *QEMU_MADE, "full", "meta", "shuffled")


def parse(name: str) -> tuple[str, int]:
    """'zlib-2G' -> ('zlib', bytes); ValueError on anything else."""
    kind, _, size = name.partition("-")
    if kind not in KINDS or not size[:-1].isdigit() or size[-1] not in UNITS:
        raise ValueError(f"{name!r} is no bench input; kinds are {', '.join(KINDS)}, sizes like 512M, 2G, 1T")
    return kind, int(size[:-1]) * UNITS[size[-1]]


def format_of(name: str) -> str:
    kind = parse(name)[0]
    return {"raw": "raw", "qcow": "qcow", "packed": "qcow"}.get(kind, "qcow2")


def made_from(name: str) -> list[str]:
    """The input that this one is made from, if any."""
    kind, _ = parse(name)
    return [f"raw-{name.partition('-')[2]}"] if kind in QEMU_MADE else []


def programs(name: str) -> set[str]:
    """Peers without which the input cannot be made."""
    return {"qemu-img"} if parse(name)[0] in (*QEMU_MADE, "full") else set()


def estimate_bytes(name: str) -> int:
    """About how much of the disk it takes, its origin not counted."""
    kind, size = parse(name)
    if kind in ("raw", "qcow2", "qcow"):
        return size // 2
    if kind == "full":
        return size
    if kind in QEMU_MADE:
        return size * 2 // 5
    return size // CLUSTER_BYTES * 11  # an L2 entry, a refcount and a little more per cluster


def path_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.{format_of(name)}"


def make(folder: Path, name: str) -> Path:
    """Makes an input in `folder` unless it is there; it appears whole or not at all."""
    kind, size = parse(name)
    target = path_of(folder, name)
    if target.exists():
        return target
    for origin in made_from(name):
        make(folder, origin)
    partial = target.with_suffix(".partial")
    if kind in QEMU_MADE:
        command = ["qemu-img", "convert", "-f", "raw", *QEMU_MADE[kind]]
        source = path_of(folder, made_from(name)[0])
        # `convert -c -O qcow` writes all of the image and then ends with 1: there the content is looked at.
        subprocess.run([*command, source, partial], check=kind != "packed")
        if kind == "packed":
            subprocess.run(
                ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow", source, partial], check=True
            )
    elif kind == "full":
        write_full(partial, size)
    elif kind == "raw":
        write_mixed(partial, size)
    else:
        from bench.metadata import write_image

        write_image(partial, size, shuffled=kind == "shuffled")
    # On the disk before anything is timed: its writeback is no part of any sample.
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.rename(target)
    return target


def text_maker() -> Callable[[int], bytes]:
    """Gives so many bytes of text, cut from 4 MiB of a made-up language with common and rare words."""
    import numpy

    generator = numpy.random.Generator(numpy.random.PCG64(1))
    letters = numpy.frombuffer(b"eeeeaaaaooiinnttssrrlldhcumpgfbvykzxwqj", dtype=numpy.uint8)
    words = [
        generator.choice(letters, size=length).tobytes() for length in generator.integers(2, 11, size=4096)
    ]
    weights = 1 / numpy.arange(2, len(words) + 2)
    order = generator.choice(len(words), size=800_000, p=weights / weights.sum())
    ends = [b""] * 11 + [b",", b".\n"]
    text = b" ".join(words[word] + ends[place % len(ends)] for place, word in enumerate(order.tolist()))

    def some(count: int) -> bytes:
        start = int(generator.integers(0, len(text)))
        return (text[start:] + text * (count // len(text) + 1))[:count]

    return some


def write_mixed(path: Path, size: int) -> None:
    """A disk in use: a quarter random bytes, a quarter text, half holes, in runs of 4 KiB to 4 MiB."""
    import numpy

    generator = numpy.random.Generator(numpy.random.PCG64(2))
    text = text_maker()
    with path.open("wb") as file:
        file.truncate(size)
        position = 0
        while position < size:
            count = min(int(generator.integers(1, 1025)) * 4096, size - position)
            kind = int(generator.integers(0, 4))
            if kind < 2:
                file.seek(position)
                file.write(generator.bytes(count) if kind == 0 else text(count))
            position += count


def write_full(path: Path, size: int) -> None:
    import numpy

    raw = path.with_suffix(".raw")
    block = numpy.random.Generator(numpy.random.PCG64(3)).bytes(1 << 20)
    try:
        with raw.open("wb") as file:
            for _ in range(size >> 20):
                file.write(block)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    finally:
        raw.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    folder, name = arguments
    try:
        make(Path(folder), name)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"bench input {name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
