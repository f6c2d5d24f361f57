"""Files and devices: every cache mode, holes, locks beside QEMU's, sizes, and errors of the host."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import (
    EnbanError,
    FlushFailedError,
    HostError,
    LockedError,
    NoSpaceError,
    UnsupportedOperationError,
    UsageError,
)
from enban.storage import host
from enban.storage.file import CACHE_MODES, FileStorage, open_file
from tests.support import KIB, MIB, Face, make_qcow2, needs_qemu_img, needs_qemu_io, pattern, qemu_io


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Callable[..., FileStorage]]:
    opened: list[FileStorage] = []

    def make(content: bytes = b"", **options: object) -> FileStorage:
        path = tmp_path / f"file{len(opened)}"
        path.write_bytes(content)
        storage = open_file(str(path), BLOCKING, writable=True, **options)  # type: ignore[arg-type]
        opened.append(storage)
        return storage

    yield make
    for storage in opened:
        drive(storage.close())


def direct_works(directory: Path) -> bool:
    path = directory / "probe"
    path.write_bytes(bytes(4096))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        path.unlink()
    return True


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_every_cache_mode_at_every_alignment(cache: str, tmp_path: Path) -> None:
    if cache in ("none", "directsync") and not direct_works(tmp_path):
        pytest.skip("the file system of the temporary directory has no O_DIRECT")
    path, model, random = tmp_path / "a", bytearray(700 * KIB + 77), Random(4)
    path.write_bytes(model)
    storage = open_file(str(path), BLOCKING, writable=True, cache=cache)
    edges = (0, 1, 511, 512, 4095, 4096, 4097, 8192, 65536)
    for number in range(120):
        offset = random.randrange(170) * 4096 + random.choice(edges[:7])
        length = random.choice(edges[1:]) + random.choice((0, 0, 1, 100))
        data = pattern(length, number + 1)
        drive(storage.write(data, offset))
        model.extend(bytes(max(0, offset + length - len(model))))
        model[offset : offset + length] = data
        if number % 3 == 0:
            at = max(0, offset - random.choice(edges))
            assert drive(storage.read(at, length + 5000)) == bytes(model[at : at + length + 5000]).ljust(
                length + 5000, b"\0"
            )
    assert storage.size() == len(model)
    drive(storage.flush())
    drive(storage.close())
    assert path.read_bytes() == model


def test_direct_io_in_pieces_larger_than_the_bounce_buffer(tmp_path: Path) -> None:
    if not direct_works(tmp_path):
        pytest.skip("the file system of the temporary directory has no O_DIRECT")
    path, data = tmp_path / "a", pattern(3 * MIB + 4097, 3)
    path.write_bytes(b"")
    storage = open_file(str(path), BLOCKING, writable=True, cache="none")
    drive(storage.write(data, 1000))
    assert drive(storage.read(0, len(data) + 2000)) == bytes(1000) + data + bytes(1000)
    drive(storage.close())
    assert path.read_bytes() == bytes(1000) + data


def test_disks_on_both_faces_in_every_cache_mode(face: Face, tmp_path: Path) -> None:
    for cache in CACHE_MODES:
        if cache in ("none", "directsync") and not direct_works(tmp_path):
            continue
        path = make_qcow2(tmp_path / f"{cache}.qcow2", MIB, cluster_size=4096)

        async def scenario(path: Path = path, cache: str = cache) -> None:
            disk = await face.open(path, writable=True, cache=cache)
            await disk.pwrite(pattern(100_001, 5), 12345)
            await disk.flush()
            assert await disk.pread(100_001, 12345) == pattern(100_001, 5)
            await disk.close()

        face.run(scenario())
    with pytest.raises(UsageError, match="cache mode"):
        enban.open(path, cache="fast")


# -- holes and zeros -------------------------------------------------------------------------


def test_zeroes_inside_across_and_behind_the_end(store: Callable[..., FileStorage]) -> None:
    for unmap in (True, False):
        storage = store(b"\xff" * 64 * KIB)
        model = bytearray(b"\xff" * 64 * KIB)
        for offset, length in ((100, 5000), (60 * KIB, 8 * KIB), (100 * KIB, 10), (68 * KIB - 3, 7)):
            drive(storage.write_zeroes(offset, length, unmap=unmap))
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = bytes(length)
            assert storage.size() == len(model) == os.stat(storage.name).st_size
            assert drive(storage.read(0, len(model))) == model


def test_unmapped_zeroes_give_space_back_and_kept_ones_do_not(store: Callable[..., FileStorage]) -> None:
    storage = store(b"\xff" * MIB)
    drive(storage.flush())
    if not host.punch_hole(storage.fileno(), 0, 4096):
        pytest.skip("the file system of the temporary directory has no holes")
    drive(storage.write_zeroes(0, 512 * KIB, unmap=True))
    assert storage.allocated() <= 512 * KIB + 4096
    drive(storage.write_zeroes(0, 256 * KIB, unmap=False))
    assert storage.allocated() >= 768 * KIB
    drive(storage.write_zeroes(2 * MIB, MIB, unmap=True))
    assert storage.size() == 3 * MIB and storage.allocated() < 1200 * KIB


@pytest.mark.parametrize(
    ("start", "length", "calls"),
    [
        (0, 64 * KIB, []),  # data, and little: written over
        (0, 2 * MIB, ["sync", "zero_range"]),  # data, and much
        (4 * MIB, 64 * KIB, ["zero_range"]),  # a hole: nothing to lose
        (6 * MIB, 2 * MIB, ["zero_range"]),  # across the end
    ],
)
def test_zeroes_in_place_lose_nothing_if_the_host_gives_up(
    store: Callable[..., FileStorage],
    monkeypatch: pytest.MonkeyPatch,
    start: int,
    length: int,
    calls: list[str],
) -> None:
    """ext4 drops dirty pages before it finds that it has no room: they are on the medium then, or not its."""
    if not host.HAVE_HOLES:
        pytest.skip("this host tells nothing of holes")
    storage = store()
    drive(storage.write(pattern(4 * MIB), 0))
    drive(storage.truncate(7 * MIB))
    seen: list[str] = []
    for name in ("sync", "zero_range"):
        real = getattr(host, name)

        def spy(*arguments: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            seen.append(name)
            return real(*arguments)

        monkeypatch.setattr(host, name, spy)
    drive(storage.write_zeroes(start, length, unmap=False))
    assert seen == calls
    assert drive(storage.read(start, length)) == bytes(length)


def test_zeroing_never_cuts_what_another_thread_has_just_written(
    store: Callable[..., FileStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write has reached the file, but the storage has not noted the new length yet."""
    storage = store(b"")
    write_all = host.write_all
    steps: list[int] = []

    def write_then_race(fd: int, view: memoryview, offset: int) -> None:
        write_all(fd, view, offset)
        if not steps:
            steps.append(1)
            drive(storage.write_zeroes(0, 4096))

    monkeypatch.setattr(host, "write_all", write_then_race)
    drive(storage.write(b"\x11" * 4096, 8192))
    assert steps and os.stat(storage.name).st_size == 12288
    assert drive(storage.read(0, 12288)) == bytes(8192) + b"\x11" * 4096


def test_threads_write_and_zero_a_growing_file(store: Callable[..., FileStorage]) -> None:
    storage = store(b"")

    def work(number: int) -> None:
        for turn in range(60):
            at = (turn * 4 + number) * 5000
            if number % 2:
                drive(storage.write(bytes([number]) * 5000, at))
            else:
                drive(storage.write_zeroes(at, 5000))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drive(storage.read(0, 240 * 5000)) == b"".join(
        bytes([n]) * 5000 if n % 2 else bytes(5000) for n in [0, 1, 2, 3] * 60
    )


def test_a_discard_never_grows_and_reads_past_the_end_are_zeros(store: Callable[..., FileStorage]) -> None:
    storage = store(b"\xff" * 10000)
    drive(storage.discard(8192, 100 * KIB))
    drive(storage.discard(50 * KIB, KIB))
    assert storage.size() == os.stat(storage.name).st_size == 10000
    assert drive(storage.read(9990, 30))[10:] == bytes(20)
    assert drive(storage.read(MIB, 10)) == bytes(10)


def test_status_finds_holes(store: Callable[..., FileStorage]) -> None:
    storage = store(b"")
    drive(storage.truncate(MIB))
    drive(storage.write(b"\xff" * 4096, 512 * KIB))
    zero, run = drive(storage.status(0, MIB))
    if not zero:
        pytest.skip("the file system of the temporary directory does not report holes")
    assert 0 < run <= 512 * KIB
    assert drive(storage.status(512 * KIB, 512 * KIB))[0] is False
    assert drive(storage.status(2 * MIB, 4096)) == (True, 4096)


def test_truncate_and_allocate(store: Callable[..., FileStorage]) -> None:
    storage = store(b"\xff" * 8192)
    drive(storage.truncate(4096))
    drive(storage.truncate(16384))
    assert drive(storage.read(0, 16384)) == b"\xff" * 4096 + bytes(12288)
    drive(storage.allocate(4096, 60 * KIB))
    assert drive(storage.read(0, 4096)) == b"\xff" * 4096
    assert storage.size() in (16384, 64 * KIB)


def test_laying_out_takes_room_and_leaves_the_size(store: Callable[..., FileStorage]) -> None:
    storage = store(b"\xff" * 4096)
    witness = store(b"").name
    if subprocess.run(["fallocate", "-n", "-l", "4096", witness], check=False).returncode:
        pytest.skip("fallocate (Debian package util-linux) cannot lay out a file here either")
    assert storage.lay_out(4096, MIB)
    status = os.stat(storage.name)
    assert storage.size() == status.st_size == 4096
    assert status.st_blocks * 512 >= MIB
    assert drive(storage.read(0, 8192)) == b"\xff" * 4096 + bytes(4096)


@pytest.mark.parametrize("size", [0, 4096, 5 * MIB + 17])
def test_a_buffer_is_zeroed_and_of_its_size(size: int) -> None:
    buffer = host.new_buffer(size)
    assert bytes(buffer) == bytes(size)
    buffer[size // 2 :] = b"\xee" * (size - size // 2)
    assert bytes(buffer).count(b"\xee") == size - size // 2


def test_copy_inside_the_host(store: Callable[..., FileStorage]) -> None:
    source, target = store(pattern(100 * KIB)), store(b"")
    done = 0
    while done < 100 * KIB:
        n = drive(target.copy_from(source, done, 5000 + done, 100 * KIB - done))
        if not n:
            pytest.skip("the file system of the temporary directory cannot copy")
        done += n
    assert target.size() == 105 * KIB - 120
    assert drive(target.read(5000, 100 * KIB)) == pattern(100 * KIB)


# -- errors of the host ----------------------------------------------------------------------


def test_a_failed_flush_stays_failed(
    store: Callable[..., FileStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a lost page once and calls the next fsync a success; we do not."""
    storage = store(b"")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "")

    with monkeypatch.context() as patch:
        patch.setattr(host, "sync", fail)
        with pytest.raises(FlushFailedError) as info:
            drive(storage.flush())
    for _ in range(2):
        with pytest.raises(FlushFailedError):
            drive(storage.flush())
    assert info.value.errno == errno.EIO and storage.name in str(info.value)


def test_a_disk_whose_flush_failed_says_so_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_qcow2(tmp_path / "a.qcow2", MIB)
    disk = enban.open(path, writable=True)
    disk.pwrite(b"x", 0)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "")

    with monkeypatch.context() as patch:
        patch.setattr(host, "sync", fail)
        with pytest.raises(FlushFailedError):
            disk.flush()
    with pytest.raises(FlushFailedError):
        disk.close()


def test_unsafe_never_syncs(store: Callable[..., FileStorage], monkeypatch: pytest.MonkeyPatch) -> None:
    storage = store(b"", cache="unsafe")
    monkeypatch.setattr(host, "sync", lambda fd: pytest.fail("synced"))
    drive(storage.flush())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_errors_are_translated_with_file_and_offset(
    number: int, store: Callable[..., FileStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = store(b"")

    def fail(*_: object) -> None:
        raise OSError(number, "")

    monkeypatch.setattr(host, "write_all", fail)
    with pytest.raises(HostError) as info:
        drive(storage.write(b"x", 4096))
    assert isinstance(info.value, NoSpaceError) == (number != errno.EIO)
    assert (info.value.errno, info.value.offset, info.value.path) == (number, 4096, storage.name)
    assert "\n" not in str(info.value)


def test_a_write_that_fails_half_way_counts_what_arrived(store: Callable[..., FileStorage]) -> None:
    """The rest of the file's last page is known to hold something: nobody may take it for zeros."""
    storage = store(b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(HostError) as info:
            drive(storage.write(b"\x11" * 20_000, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert info.value.errno == errno.EFBIG
    assert storage.size() == os.stat(storage.name).st_size > 0


def test_short_writes_and_reads_are_gone_on_with(
    store: Callable[..., FileStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system call may do a part of what was asked; the next begins where it ended."""
    storage = store(b"")
    pwrite, preadv, random = os.pwrite, os.preadv, Random(2)

    def short_pwrite(fd: int, data: memoryview, offset: int) -> int:
        return pwrite(fd, data[: random.randrange(1, 700)], offset)

    def short_preadv(fd: int, views: tuple[memoryview, ...], offset: int, flags: int = 0) -> int:
        return preadv(fd, (views[0][: random.randrange(1, 700)],), offset, flags)

    monkeypatch.setattr(os, "pwrite", short_pwrite)
    monkeypatch.setattr(os, "preadv", short_preadv)
    drive(storage.write(pattern(50_000, 8), 333))
    assert drive(storage.read(333, 50_000)) == pattern(50_000, 8)
    assert drive(storage.read(0, 51_000)) == bytes(333) + pattern(50_000, 8) + bytes(667)


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_what_cannot_be_opened(cache: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    cases: dict[str, str] = {
        "missing": "no such file",
        ".": "directory",
        "fifo": "not a regular file",
        "loop": "symbolic links",
        "x" * 300: "too long",
        "nul\0nul": "file name",
    }
    for name, words in cases.items():
        with pytest.raises(EnbanError) as info:
            open_file(str(tmp_path / name), BLOCKING, writable=False, cache=cache)
        assert words in str(info.value), info.value
        assert "\n" not in str(info.value)
    with pytest.raises(HostError, match="exists"):
        (tmp_path / "there").touch()
        open_file(str(tmp_path / "there"), BLOCKING, writable=True, create=True)


def test_no_descriptor_is_left_behind_by_a_failed_open(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "a.qcow2", MIB)
    holder = enban.open(path, writable=True)
    before = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []
    for _ in range(5):
        with pytest.raises(LockedError):
            enban.open(path, writable=True)
    if before:
        assert sorted(os.listdir("/proc/self/fd")) == before
    holder.close()


# -- locks -----------------------------------------------------------------------------------


def test_one_writer_or_many_readers(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "a.qcow2", MIB)
    with enban.open(path) as one, enban.open(path) as two:
        assert one.pread(1, 0) == two.pread(1, 0)
        with pytest.raises(LockedError) as info:
            enban.open(path, writable=True)
        assert info.value.hint and str(path) in str(info.value)
    with enban.open(path, writable=True) as writer:
        for writable in (True, False):
            with pytest.raises(LockedError):
                enban.open(path, writable=writable)
        writer.pwrite(b"\x07", 0)
        writer.flush()
        with enban.open(path, force_share=True) as beside:
            assert beside.pread(1, 0) == b"\x07"
    with pytest.raises(UsageError):
        enban.open(path, writable=True, force_share=True)
    enban.open(path, writable=True).close()


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "a.qcow2", MIB)
    code = (
        "import enban, sys\n"
        f"disk = enban.open({str(path)!r}, writable=True)\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()"
    )

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"
    with pytest.raises(LockedError):
        enban.open(path, writable=True)
    child.kill()
    child.communicate()
    enban.open(path, writable=True).close()


def qemu_refuses(*arguments: str) -> bool:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 or "lock" in done.stderr, done.stderr
    return done.returncode != 0


@needs_qemu_img
@needs_qemu_io
def test_qemu_respects_our_locks(tmp_path: Path) -> None:
    path = str(make_qcow2(tmp_path / "a.qcow2", MIB))
    write = ("qemu-io", "-c", "write -q 0 512", path)
    with enban.open(path, writable=True):
        assert qemu_refuses(*write)
        assert qemu_refuses("qemu-img", "info", path)
        assert not qemu_refuses("qemu-img", "info", "-U", path)
    with enban.open(path):
        assert qemu_refuses(*write)
        assert not qemu_refuses("qemu-img", "info", path)
        assert not qemu_refuses("qemu-img", "check", path)
    with enban.open(path, force_share=True):
        assert not qemu_refuses(*write)


@needs_qemu_io
def test_we_respect_the_locks_of_qemu(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "a.qcow2", MIB)
    for options, readable in (((), False), (("-r",), True)):
        child = subprocess.Popen(
            ["qemu-io", *options, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("read 0 512\n")
        child.stdin.flush()
        while "read 512/512" not in child.stdout.readline():
            pass
        try:
            with pytest.raises(LockedError):
                enban.open(path, writable=True)
            if readable:
                enban.open(path).close()
            else:
                with pytest.raises(LockedError):
                    enban.open(path)
            with enban.open(path, force_share=True) as beside:
                assert beside.size == MIB
        finally:
            child.communicate("quit\n", timeout=30)
    enban.open(path, writable=True).close()


@needs_qemu_io
def test_a_backing_file_may_be_shared_by_readers_but_not_written(tmp_path: Path) -> None:
    make_qcow2(tmp_path / "base.qcow2", MIB)
    for name in ("a", "b"):
        make_qcow2(tmp_path / name, MIB, backing_file="base.qcow2", backing_fmt="qcow2")
    with enban.open(tmp_path / "a", writable=True), enban.open(tmp_path / "b", writable=True):
        with pytest.raises(LockedError):
            enban.open(tmp_path / "base.qcow2", writable=True)
        assert qemu_refuses("qemu-io", "-c", "write -q 0 512", str(tmp_path / "base.qcow2"))
    qemu_io(tmp_path / "base.qcow2", "write -q 0 512")


# -- devices ---------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A loop device of 1 MiB, where that is allowed."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    backing = tmp_path / "device.img"
    backing.write_bytes(b"\xee" * MIB)
    try:
        made = subprocess.run(
            ["losetup", "--show", "-f", str(backing)], capture_output=True, text=True, timeout=30, check=False
        )
    except FileNotFoundError:
        pytest.skip("losetup is missing (Debian package mount)")
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    name = made.stdout.strip()
    yield name
    subprocess.run(["losetup", "-d", name], timeout=30, check=False)


def test_a_device_has_a_fixed_size(device: str) -> None:
    storage = open_file(device, BLOCKING, writable=True)
    assert storage.fixed_size and storage.size() == MIB
    drive(storage.write(b"\x11" * 512, MIB - 512))
    with pytest.raises(NoSpaceError):
        drive(storage.write(b"\x22" * 1024, MIB - 512))
    with pytest.raises(UnsupportedOperationError):
        drive(storage.truncate(2 * MIB))
    drive(storage.truncate(4096))
    assert storage.size() == MIB
    drive(storage.write_zeroes(4096, 8192))
    drive(storage.write_zeroes(100, 100, unmap=False))
    drive(storage.flush())
    assert drive(storage.read(4096, 8192)) == bytes(8192)
    assert drive(storage.read(0, 300)) == b"\xee" * 100 + bytes(100) + b"\xee" * 100
    drive(storage.close())


def test_a_qcow2_image_on_a_device_until_it_is_full(device: str) -> None:
    from enban.formats.qcow2.create import Qcow2Options, write_empty
    from tests.support import check_bytes

    storage = open_file(device, BLOCKING, writable=True)
    drive(write_empty(storage, Qcow2Options(4 * MIB, cluster_size=4096).header()))
    drive(storage.close())
    disk = enban.open(device, writable=True, format="qcow2")
    assert disk.pread(4 * MIB, 0) == bytes(4 * MIB), "old content of the device shows"
    written = 0
    with pytest.raises(NoSpaceError):
        for at in range(0, 4 * MIB, 20_000):
            disk.pwrite(pattern(20_000, at + 1), at)
            written += 20_000
    assert written > 800 * KIB
    for at in range(0, written, 20_000):
        assert disk.pread(20_000, at) == pattern(20_000, at + 1)
    disk.discard(0, 400 * KIB)
    disk.flush()
    disk.pwrite(b"\x33" * 100_000, 3 * MIB)
    disk.close()
    with open(device, "rb") as raw:
        check_bytes(raw.read())


# -- what stands outside Linux ---------------------------------------------------------------


def test_the_portable_roads_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HAVE_PREADV", "HAVE_NOWAIT", "HAVE_HOLES", "HAVE_COPY", "HAVE_LOCKS", "HAVE_FALLOCATE"):
        monkeypatch.setattr(host, name, False)
    path = tmp_path / "a"
    path.write_bytes(b"\xff" * 10000)
    storage = open_file(str(path), BLOCKING, writable=True)
    drive(storage.write(b"abc", 5000))
    drive(storage.write_zeroes(9000, 5000))
    drive(storage.discard(0, 4096))
    assert drive(storage.status(0, 100)) == (False, 100)
    assert drive(storage.read(4998, 7)) == b"\xff\xffabc\xff\xff"
    assert drive(storage.read(8999, 5002)) == b"\xff" + bytes(5001)
    drive(storage.flush())
    drive(storage.close())
