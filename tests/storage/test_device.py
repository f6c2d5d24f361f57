"""Host block devices, on loop devices: sizes, alignment, discard, claims. Needs root."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import LockedError, NoSpaceError, ReadOnlyError, UnsupportedOperationError
from enban.storage.device import DeviceStorage
from enban.storage.file import open_file
from tests.cli.command import enban as run
from tests.cli.command import refused
from tests.support import KIB, MIB, Face, needs_qemu_img, pattern, qemu_check, qemu_img

SIZE = 8 * MIB


def why_not() -> str:
    if shutil.which("losetup") is None:
        return "losetup is missing (Debian package mount)"
    if os.geteuid() != 0:
        return "loop devices need root"
    if not os.path.exists("/dev/loop-control"):
        return "this machine has no loop devices"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


class Loop:
    """A loop device over a file."""

    def __init__(self, file: Path, *options: str) -> None:
        self.file = file
        done = subprocess.run(
            ["losetup", "--find", "--show", *options, file], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"losetup: {done.stderr.strip()}")
        self.path = done.stdout.strip()

    def detach(self) -> None:
        subprocess.run(["losetup", "-d", self.path], check=True)

    @property
    def content(self) -> bytes:
        os.sync()
        return self.file.read_bytes()


@pytest.fixture(params=[512, 4096])
def loop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Loop]:
    file = tmp_path / "backing"
    file.write_bytes(pattern(SIZE))
    made = Loop(file, "--sector-size", str(request.param))
    yield made
    made.detach()


def device(loop: Loop, cache: str = "writeback") -> DeviceStorage:
    storage = open_file(loop.path, BLOCKING, writable=True, cache=cache)
    assert isinstance(storage, DeviceStorage)
    return storage


def block_of(loop: Loop) -> int:
    return int(Path(f"/sys/block/{Path(loop.path).name}/queue/logical_block_size").read_text())


def test_what_the_kernel_says_of_it(loop: Loop) -> None:
    storage = device(loop)
    assert storage.size() == SIZE and storage.fixed_size and not storage.read_only
    assert storage.logical_block == block_of(loop)
    assert storage.physical_block >= storage.logical_block
    with pytest.raises(UnsupportedOperationError, match="a device cannot grow"):
        drive(storage.truncate(SIZE + 4096))
    with pytest.raises(NoSpaceError, match="past the end of the device"):
        drive(storage.write(b"xx", SIZE - 1))
    drive(storage.close())
    assert f"virtual size: 8 MiB ({SIZE} bytes)" in run("info", loop.path).out


@pytest.mark.parametrize("cache", ["writeback", "none", "directsync"])
def test_any_bytes_at_any_place(loop: Loop, face: Face, cache: str) -> None:
    """Also past the page cache, where the device takes whole blocks only."""
    model = bytearray(pattern(SIZE))
    some = random.Random(block_of(loop))

    async def scenario() -> None:
        disk = await face.open(loop.path, writable=True, format="raw", cache=cache)
        for _ in range(40):
            offset = some.choice((some.randrange(SIZE), some.randrange(SIZE // 4096) * 4096))
            length = min(SIZE - offset, some.choice((1, 511, 512, 4096, 5000, 70 * KIB, MIB)))
            action = some.random()
            if action < 0.5:
                data = some.randbytes(length)
                await disk.pwrite(data, offset)
                model[offset : offset + length] = data
            elif action < 0.7:
                await disk.write_zeroes(offset, length, unmap=some.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            assert await disk.pread(length, offset) == model[offset : offset + length]
        await disk.flush()
        await disk.close()

    face.run(scenario())
    assert loop.content == model


def test_discard_gives_space_back_and_only_whole_blocks(loop: Loop) -> None:
    before = loop.file.stat().st_blocks
    with enban.open(loop.path, writable=True, format="raw") as disk:
        disk.discard(MIB + 100, 4 * MIB)
        first = disk.pread(2 * MIB, 0)
    assert first[: MIB + 100] == pattern(SIZE)[: MIB + 100]
    assert loop.content[5 * MIB + 100 :] == pattern(SIZE)[5 * MIB + 100 :]
    assert (before - loop.file.stat().st_blocks) * 512 > 3 * MIB
    with enban.open(loop.path, writable=True, format="raw") as disk:
        disk.discard(SIZE - 1, 1)  # less than a block: nothing to give back
        assert disk.pread(1, SIZE - 1) == pattern(SIZE)[-1:]


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_by_the_kernel(loop: Loop, unmap: bool) -> None:
    model = bytearray(pattern(SIZE))
    before = loop.file.stat().st_blocks
    storage = device(loop)
    for offset, length in ((MIB, 2 * MIB), (4 * MIB + 3, MIB), (6 * MIB + 1, 5), (SIZE - 700, 700)):
        drive(storage.write_zeroes(offset, length, unmap=unmap))
        model[offset : offset + length] = bytes(length)
    drive(storage.flush())
    drive(storage.close())
    assert loop.content == model
    saved = (before - loop.file.stat().st_blocks) * 512
    assert saved > 2 * MIB if unmap else saved < MIB


def test_a_claimed_device_is_refused(loop: Loop) -> None:
    with enban.open(loop.path, writable=True, format="raw"):
        with pytest.raises(OSError) as caught:
            os.open(loop.path, os.O_RDWR | os.O_EXCL)
        assert caught.value.errno == errno.EBUSY
    claim = os.open(loop.path, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(LockedError, match="the device is in use: mounted, or a part of another device"):
            enban.open(loop.path, writable=True)
        with enban.open(loop.path, format="raw") as disk:  # looking does no harm
            assert disk.pread(10, 0) == pattern(10)
        (loop.file.parent / "x.raw").write_bytes(b"x" * 4096)
        assert "the device is in use" in refused(
            "convert", "-f", "raw", loop.file.parent / "x.raw", loop.path
        )
    finally:
        os.close(claim)
    assert loop.content == pattern(SIZE)


@needs_qemu_img
def test_an_image_on_a_device(loop: Loop, tmp_path: Path) -> None:
    """qcow2 straight on a device, and a raw disk over all of it; QEMU reads both."""
    content = pattern(3 * MIB, 9)
    (tmp_path / "x.raw").write_bytes(content)
    run("convert", "-f", "raw", "-O", "qcow2", tmp_path / "x.raw", loop.path)
    qemu_check(loop.path)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "x.raw", loop.path)
    with enban.open(loop.path, writable=True, cache="none") as disk:
        assert disk.format == "qcow2"
        disk.pwrite(b"y" * 70_000, MIB + 1)
    qemu_check(loop.path)
    with pytest.raises(NoSpaceError), enban.open(loop.path, writable=True) as disk:
        disk.resize(64 * MIB)
        disk.pwrite(b"z" * (16 * MIB), 4 * MIB)
    qemu_check(loop.path, leaks=True)
    run("convert", "-f", "raw", "-O", "raw", "-n", tmp_path / "x.raw", loop.path)
    assert loop.content[: 3 * MIB] == content


def test_the_kernel_and_we_see_the_same(loop: Loop) -> None:
    about = json.loads(
        subprocess.run(
            ["lsblk", "--bytes", "--json", "-o", "SIZE,RO,LOG-SEC,PHY-SEC", loop.path],
            capture_output=True,
            check=True,
        ).stdout
    )["blockdevices"][0]
    storage = device(loop)
    assert (storage.size(), storage.read_only) == (about["size"], about["ro"])
    assert (storage.logical_block, storage.physical_block) == (about["log-sec"], about["phy-sec"])
    drive(storage.close())


def test_a_read_only_device(tmp_path: Path) -> None:
    (tmp_path / "backing").write_bytes(pattern(MIB))
    loop = Loop(tmp_path / "backing", "--read-only")
    try:
        with enban.open(loop.path, format="raw") as disk:
            assert isinstance(disk.node.file, DeviceStorage) and disk.node.file.read_only
            assert disk.pread(MIB, 0) == pattern(MIB)
        with pytest.raises(ReadOnlyError, match=f"{loop.path}: the device is read-only"):
            enban.open(loop.path, writable=True)
    finally:
        loop.detach()


def test_a_device_of_another_size_when_it_is_opened_again(tmp_path: Path) -> None:
    (tmp_path / "backing").write_bytes(pattern(MIB))
    loop = Loop(tmp_path / "backing")
    try:
        with enban.open(loop.path, format="raw") as disk:
            assert disk.size == MIB
        os.truncate(tmp_path / "backing", 2 * MIB)
        subprocess.run(["losetup", "-c", loop.path], check=True)
        with enban.open(loop.path, format="raw") as disk:
            assert disk.size == 2 * MIB
            assert disk.pread(MIB, MIB) == bytes(MIB)
    finally:
        loop.detach()


def test_a_loop_device_is_no_drive(tmp_path: Path) -> None:
    (tmp_path / "backing").write_bytes(pattern(MIB))
    loop = Loop(tmp_path / "backing")
    try:
        assert f"{loop.path}: is no CD-ROM drive" in refused("cdrom", "info", loop.path)
    finally:
        loop.detach()
