"""What the tests share: images in files and in memory, both faces, the QEMU programs."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import pytest

import enban
import enban.aio
from enban.block.disk import Disk
from enban.block.door import Door
from enban.block.node import Node
from enban.block.runtime import BLOCKING, drive
from enban.block.storage import Storage
from enban.extent import Extent
from enban.formats.qcow2.create import Qcow2Options, write_empty
from enban.formats.qcow2.opening import open_qcow2
from enban.formats.raw import RawNode
from enban.lab.images import pattern
from enban.lab.qcow2_reader import Qcow2Reader, Report
from enban.lab.storm import nothing_remains
from enban.storage.file import open_file
from enban.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from enban.block.runtime import Runtime

__all__ = ["nothing_remains", "pattern"]  # besides what is defined here

T = TypeVar("T")
Test = TypeVar("Test", bound=Callable[..., object])

KIB, MIB = 1 << 10, 1 << 20


# -- peers -----------------------------------------------------------------------------------


def needs_all(program: str, package: str) -> list[pytest.MarkDecorator]:
    """The `pytestmark` of a module whose tests need a program: `interop`, and skipped with its name if it
    is missing."""
    missing = shutil.which(program) is None
    skip = pytest.mark.skipif(missing, reason=f"{program} is missing (Debian package {package})")
    return [pytest.mark.interop, skip]


def needs(program: str, package: str) -> Callable[[Test], Test]:
    """The same for one test."""

    def mark(test: Test) -> Test:
        for one in needs_all(program, package):
            test = cast(Test, one(test))
        return test

    return mark


needs_qemu_img = needs("qemu-img", "qemu-utils")
needs_qemu_io = needs("qemu-io", "qemu-utils")
needs_qemu_system = needs("qemu-system-x86_64", "qemu-system-x86")


def qemu_img(*arguments: str | Path, ok: tuple[int, ...] = (0,), cwd: Path | None = None) -> str:
    """Run qemu-img and return its standard output; an exit code not in `ok` fails the test.
    cwd: QEMU looks for an image's data file from the current directory, not from the image's."""
    return _run("qemu-img", arguments, ok, cwd)


def qemu_io(
    path: str | Path, *commands: str, options: tuple[str, ...] = ("-f", "qcow2"), cwd: Path | None = None
) -> str:
    """Run qemu-io commands on an image. Its exit code says little: a failed command fails the test."""
    arguments: list[str | Path] = list(options)
    for command in commands:
        arguments += ["-c", command]
    out = _run("qemu-io", (*arguments, path), (0,), cwd)
    for word in ("failed", "rror"):
        assert word not in out, out
    return out


def _run(program: str, arguments: tuple[str | Path, ...], ok: tuple[int, ...], cwd: Path | None) -> str:
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )
    assert done.returncode in ok, f"{program} {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def qemu_check(path: str | Path, *, leaks: bool = False) -> dict[str, Any]:
    """`qemu-img check`: clean, or with `leaks` at most leaks. Returns its JSON."""
    out = qemu_img(
        "check", "--output=json", "-f", "qcow2", path, ok=(0, 3) if leaks else (0,), cwd=Path(path).parent
    )
    report: dict[str, Any] = json.loads(out)
    return report


def qemu_same(ours: str | Path, content: bytes, directory: Path, *, format: str = "qcow2") -> None:
    """`qemu-img compare` of an image with bytes: identical, sizes too (in whole sectors)."""
    other = directory / "content.raw"
    other.write_bytes(content + bytes(-len(content) % 512))
    qemu_img("compare", "-f", format, "-F", "raw", ours, other, cwd=directory)
    about = json.loads(qemu_img("info", "--output=json", "-f", format, ours, cwd=directory))
    assert about["virtual-size"] == other.stat().st_size
    other.unlink()


# -- both faces ------------------------------------------------------------------------------


class AnyDisk(Protocol):
    """What a scenario sees of a disk, the same for both faces."""

    @property
    def door(self) -> Door: ...
    @property
    def node(self) -> Node: ...
    @property
    def size(self) -> int: ...
    @property
    def format(self) -> str: ...
    async def pread(self, length: int, offset: int) -> bytes: ...
    async def readinto(self, buffer: bytearray, offset: int) -> int: ...
    async def pwrite(self, data: bytes, offset: int, *, fua: bool = False) -> int: ...
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None: ...
    async def discard(self, offset: int, length: int) -> None: ...
    async def flush(self) -> None: ...
    def map(self, offset: int = 0, length: int | None = None) -> AsyncIterator[Extent]: ...
    async def resize(self, size: int, *, preallocation: str = "off") -> None: ...
    async def close(self) -> None: ...


class Lifted:
    """A blocking disk with coroutines for methods; none of them ever suspends."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk

    @property
    def door(self) -> Door:
        return self.disk.door

    @property
    def node(self) -> Node:
        return self.disk.node

    @property
    def size(self) -> int:
        return self.disk.size

    @property
    def format(self) -> str:
        return self.disk.format

    async def pread(self, length: int, offset: int) -> bytes:
        return self.disk.pread(length, offset)

    async def readinto(self, buffer: bytearray, offset: int) -> int:
        return self.disk.readinto(buffer, offset)

    async def pwrite(self, data: bytes, offset: int, *, fua: bool = False) -> int:
        return self.disk.pwrite(data, offset, fua=fua)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.disk.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        self.disk.discard(offset, length)

    async def flush(self) -> None:
        self.disk.flush()

    async def map(self, offset: int = 0, length: int | None = None) -> AsyncIterator[Extent]:
        for extent in self.disk.map(offset, length):
            yield extent

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        self.disk.resize(size, preallocation=preallocation)

    async def close(self) -> None:
        self.disk.close()


class Face:
    """One of the two ways into the engine. `run` finishes a scenario, an `async def` without a loop
    of its own choosing: `result = face.run(scenario)`, inside it `disk = await face.open(path)`."""

    name = ""

    def run(self, scenario: Coroutine[Any, Any, T]) -> T:
        raise NotImplementedError

    def runtime(self) -> Runtime:
        raise NotImplementedError

    def disk(self, door: Door) -> AnyDisk:
        raise NotImplementedError

    async def open(self, path: str | Path | dict[str, Any], **options: Any) -> AnyDisk:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.name


class BlockingFace(Face):
    name = "blocking"

    def run(self, scenario: Coroutine[Any, Any, T]) -> T:
        return drive(scenario)

    def runtime(self) -> Runtime:
        return BLOCKING

    def disk(self, door: Door) -> AnyDisk:
        return Lifted(Disk(door))

    async def open(self, path: str | Path | dict[str, Any], **options: Any) -> AnyDisk:
        return Lifted(enban.open(path, **options))


class AsyncioFace(Face):
    name = "asyncio"

    def run(self, scenario: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(scenario)

    def runtime(self) -> Runtime:
        return enban.aio.AsyncioRuntime(threads=4)

    def disk(self, door: Door) -> AnyDisk:
        assert isinstance(door.runtime, enban.aio.AsyncioRuntime)
        return enban.aio.AsyncDisk(door, door.runtime)

    async def open(self, path: str | Path | dict[str, Any], **options: Any) -> AnyDisk:
        return await enban.aio.open(path, **options)


FACES = (BlockingFace(), AsyncioFace())
BLOCKING_FACE = FACES[0]


# -- images ----------------------------------------------------------------------------------


def make_qcow2(path: str | Path, size: int, **options: Any) -> Path:
    """A new empty qcow2 file made by enban; `options` as for Qcow2Options."""
    file = open_file(str(path), BLOCKING, writable=True, create=True)
    drive(write_empty(file, Qcow2Options(size, **options).header()))
    drive(file.close())
    return Path(path)


def empty_image(size: int, **options: Any) -> bytearray:
    """The bytes of a new empty qcow2 image."""
    storage = MemoryStorage(BLOCKING)
    drive(write_empty(storage, Qcow2Options(size, **options).header()))
    return storage.content


async def open_memory(
    storage: Storage, *, backing: Node | None = None, data: Storage | None = None, writable: bool = True
) -> Door:
    """A door to the qcow2 image in a storage (of any runtime)."""
    node = await open_qcow2(storage.name, storage.runtime, storage, writable=writable)
    node.backing = backing
    if data is not None:
        node.data = data
    return Door(node, writable=writable)


def raw_node(content: bytes, runtime: Runtime = BLOCKING) -> RawNode:
    """A read-only raw node over bytes, to stand below an overlay."""
    return RawNode("backing", runtime, MemoryStorage(runtime, content), writable=False)


def check_bytes(
    image: bytes | bytearray, *, leaks: bool = False, data_file: bytes | bytearray | None = None
) -> Report:
    """The independent check: clean, or with `leaks` at most leaks."""
    report = Qcow2Reader(image, data_file=data_file).check()
    assert not report.corruptions, report.corruptions[:5]
    assert leaks or not report.leaks, f"leaked clusters {report.leaks[:10]}"
    return report


def check_file(path: str | Path, *, leaks: bool = False, data_file: str | Path | None = None) -> Report:
    data = Path(data_file).read_bytes() if data_file is not None else None
    return check_bytes(Path(path).read_bytes(), leaks=leaks, data_file=data)
