"""The demo: a real disk image there and back again, and proof that nothing was lost on the way.

Gathers a few hundred MiB of this machine's own files, lets `mkfs.ext4 -d` make a real ext4 disk of them (no
root needed), converts it raw -> qcow2 (plain, zlib, zstd) -> raw with the `enban` command, checks every
image, compares every image with the original and prints sizes and times. Where qemu-img is installed it is
asked for its opinion too. Everything happens in a folder below `demo/`, removed at the end unless KEEP=1 is
set.

Environment: KEEP=1 keeps the images; ENBAN names another command to show (default: the one of this
environment).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
GATHER_BYTES = 400 * MIB
ROOT_LIMIT_BYTES = 128 * MIB
# The staged files, the raw image twice, three qcow2 images: what must fit on the disk at once.
ROOM_BYTES = 2600 * MIB
SOURCES = (
    "/usr/share/doc",
    sysconfig.get_path("stdlib"),
    "/usr/lib/python3",
    "/usr/share",
    "/usr/include",
    "/usr/lib",
    "/usr/bin",
)

IMAGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("qcow2", "plain.qcow2", ()),
    ("qcow2, zlib", "zlib.qcow2", ("-c",)),
    ("qcow2, zstd", "zstd.qcow2", ("-c", "-o", "compression_type=zstd")),
)


class DemoError(Exception):
    """One line for the user."""


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    path: Path
    seconds: float
    check_seconds: float | None
    verdict: str


def regular_files(top: str) -> Iterator[tuple[Path, int]]:
    """Readable regular files below `top` in a fixed order, with their sizes."""
    for folder, subfolders, names in os.walk(top):
        subfolders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            try:
                status = path.lstat()
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
                yield path, status.st_size


def gather(stage: Path) -> tuple[int, int]:
    """Copies files of this machine below `stage` until there are enough: how many, and their bytes."""
    count = total = 0
    for source in SOURCES:
        of_this_source = 0
        for path, size in regular_files(source):
            if of_this_source + size > ROOT_LIMIT_BYTES or total + size > GATHER_BYTES:
                continue
            target = stage / path.relative_to("/")
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(path, target)
            except PermissionError:
                continue
            of_this_source += size
            total += size
            count += 1
            if total > GATHER_BYTES - MIB:
                return count, total
    return count, total


def run(command: list[str], *, quiet: bool = False) -> float:
    """Runs a command to its end and returns its seconds; any failure is one line."""
    started = time.perf_counter()
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        words = ((done.stderr or "") + (done.stdout or "")).strip().splitlines()
        because = f": {words[-1]}" if words else ""
        raise DemoError(f"`{shlex.join(command)}` ended with {done.returncode}{because}")
    return seconds


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"


def show(text: str) -> None:
    print(text, flush=True)


def find_enban() -> list[str]:
    if named := os.environ.get("ENBAN"):
        return shlex.split(named)
    own = Path(sys.executable).parent / "enban"
    if own.exists():
        return [str(own)]
    raise DemoError("the enban command is not installed here: run scripts/setup first (make demo does)")


def make_disk(folder: Path) -> Path:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    mkfs = shutil.which("mkfs.ext4", path=path)
    if mkfs is None:
        raise DemoError("mkfs.ext4 is missing: install the package e2fsprogs")
    stage = folder / "files"
    stage.mkdir()
    count, total = gather(stage)
    # Half as much again as the files: free space, as a disk in use has, that a sparse image need not hold.
    size_mib = max(64, total * 3 // 2 // MIB)
    disk = folder / "disk.raw"
    options = ["-q", "-F", "-L", "enban-demo", "-N", str(count * 2 + 1000)]
    run([mkfs, *options, "-d", str(stage), str(disk), f"{size_mib}M"], quiet=True)
    shutil.rmtree(stage)
    holding = f"{count} files of this machine ({mib(total)})"
    show(f"A disk of {size_mib} MiB: ext4 with {holding}, made without root.\n")
    return disk


def convert(enban: list[str], source: Path, target: Path, *options: str) -> float:
    """Shows and runs one conversion, progress and all; returns its seconds."""
    formats = ["-f", source.suffix[1:], "-O", target.suffix[1:]]
    show(f"enban convert -p {shlex.join([*formats, *options])} {source.name} {target.name}")
    return run([*enban, "convert", "-p", *formats, *options, str(source), str(target)])


def journey(enban: list[str], folder: Path, disk: Path) -> list[Result]:
    """There and back: every image is checked and compared with the disk it came from."""
    results = [Result("the disk, raw", disk, 0.0, None, "the original")]
    for name, file, options in IMAGES:
        image = folder / file
        seconds = convert(enban, disk, image, *options)
        check_seconds = run([*enban, "check", "-f", "qcow2", str(image)], quiet=True)
        run([*enban, "compare", "-f", "raw", "-F", "qcow2", str(disk), str(image)], quiet=True)
        results.append(Result(name, image, seconds, check_seconds, "clean, identical"))
    back = folder / "back.raw"
    seconds = convert(enban, results[-1].path, back)
    before, after = sha256(disk), sha256(back)
    if before != after:
        raise DemoError(f"the disk came back different: sha256 {before} became {after}")
    results.append(Result("raw again", back, seconds, None, "same sha256"))
    show(f"\nsha256 of the disk before and after: {before}")
    return results


def ask_qemu(folder: Path, disk: Path) -> str:
    """The opinion of an independent program, where there is one."""
    qemu_img = shutil.which("qemu-img")
    if qemu_img is None:
        return "qemu-img is not installed, so no second opinion was asked for."
    for _, name, _ in IMAGES:
        image = str(folder / name)
        run([qemu_img, "check", "-q", "-f", "qcow2", image], quiet=True)
        run([qemu_img, "compare", "-q", "-f", "raw", "-F", "qcow2", str(disk), image], quiet=True)
    about = subprocess.run([qemu_img, "--version"], check=False, capture_output=True, text=True)
    version = about.stdout.partition("\n")[0]
    return f"An independent witness, {version},\nchecks all three clean and reads them identical to the disk."


def table(results: list[Result]) -> str:
    whole = on_disk(results[0].path)
    rows = [("image", "on disk", "of raw", "convert", "check", "")]
    for result in results:
        size = on_disk(result.path)
        convert_cell = f"{result.seconds:.2f} s" if result.seconds else "-"
        check_cell = "-" if result.check_seconds is None else f"{result.check_seconds:.2f} s"
        cells = (mib(size), f"{size / whole:.0%}", convert_cell, check_cell)
        rows.append((result.name, *cells, result.verdict))
    return "\n".join(
        f"{name:14}{size:>10}{share:>8}{convert_cell:>9}{check_cell:>9}  {verdict}".rstrip()
        for name, size, share, convert_cell, check_cell, verdict in rows
    )


def demo(top: Path) -> None:
    enban = find_enban()
    free = shutil.disk_usage(top).free
    if free < ROOM_BYTES:
        raise DemoError(f"the demo needs {mib(ROOM_BYTES)} of free space in {top} and there are {mib(free)}")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=top))
    try:
        started = time.perf_counter()
        disk = make_disk(folder)
        results = journey(enban, folder, disk)
        opinion = ask_qemu(folder, disk)
        show(f"\n{table(results)}\n\n{opinion}\nAll of it took {time.perf_counter() - started:.0f} s.")
        if os.environ.get("KEEP"):
            show(f"The images are kept in {folder}")
    finally:
        if not os.environ.get("KEEP"):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another run may be at work there
                top.rmdir()


def main() -> int:
    top = Path(__file__).resolve().parent.parent / "demo"
    try:
        top.mkdir(exist_ok=True)
        demo(top)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno == errno.ENOSPC
        what = f"the disk of {top} is full" if full else f"{error.strerror}: {error.filename or top}"
        print(f"demo: {what}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
