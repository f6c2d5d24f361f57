"""Rebase: the disk reads the same, at every moment, also after a crash or a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import enban
from enban.block.runtime import drive
from enban.errors import HostError, LockedError, UnsupportedOperationError, UsageError
from enban.formats.qcow2.opening import open_qcow2, read_header
from enban.jobs.rebase import rebase
from enban.storage import host
from enban.storage.memory import MemoryStorage
from tests.support import BLOCKING_FACE, KIB, MIB, check_file, make_qcow2, pattern

RUNTIME = BLOCKING_FACE.runtime()


def chain(folder: Path, **options: Any) -> tuple[Path, bytes]:
    """top over middle over base; top and what it reads."""
    make_qcow2(folder / "base.qcow2", 2 * MIB)
    with enban.open(folder / "base.qcow2", writable=True) as disk:
        disk.pwrite(pattern(MIB), 0)
    make_qcow2(
        folder / "middle.qcow2", 3 * MIB, backing_file="base.qcow2", backing_fmt="qcow2", cluster_size=4096
    )
    with enban.open(folder / "middle.qcow2", writable=True) as disk:
        disk.pwrite(pattern(100 * KIB, 2), 300 * KIB)
        disk.write_zeroes(600 * KIB, 64 * KIB)
        disk.pwrite(pattern(64 * KIB, 3), 2500 * KIB)
    top = make_qcow2(
        folder / "top.qcow2", 3 * MIB, backing_file="middle.qcow2", backing_fmt="qcow2", **options
    )
    with enban.open(top, writable=True) as disk:
        disk.pwrite(pattern(10 * KIB, 4), 350 * KIB)
    with enban.open(top) as disk:
        return top, disk.pread(disk.size, 0)


def reads(path: Path) -> bytes:
    with enban.open(path) as disk:
        return disk.pread(disk.size, 0)


OPTIONS: list[dict[str, Any]] = [{}, {"compat": "0.10"}, {"cluster_size": 512}, {"extended_l2": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_over_a_layer_and_to_none(tmp_path: Path, options: dict[str, Any]) -> None:
    top, content = chain(tmp_path, **options)
    copied = rebase(str(top), "base.qcow2", "qcow2")
    # Only what the middle layer held: data and zeros, in whole units of the top image.
    assert 0 < copied < 600 * KIB
    assert reads(top) == content
    check_file(top)
    (tmp_path / "middle.qcow2").unlink()
    assert reads(top) == content
    rebase(str(top), "")
    (tmp_path / "base.qcow2").unlink()
    assert reads(top) == content
    check_file(top)


def test_onto_the_same_file_copies_nothing(tmp_path: Path) -> None:
    top, content = chain(tmp_path)
    size = top.stat().st_size
    assert rebase(str(top), str(tmp_path / "middle.qcow2"), "qcow2") == 0
    assert top.stat().st_size == size
    with enban.open(top, gate=enban.TRUSTED) as disk:
        assert disk.node.backing_name == str(tmp_path / "middle.qcow2")
        assert disk.pread(disk.size, 0) == content


def test_from_none(tmp_path: Path) -> None:
    """An image that stood alone keeps its zeros when a backing file comes below it."""
    path = make_qcow2(tmp_path / "disk.qcow2", 2 * MIB)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"own", 700 * KIB)
    content = reads(path)
    (tmp_path / "new.raw").write_bytes(pattern(MIB) + bytes(MIB))
    rebase(str(path), "new.raw", "raw")
    assert reads(path) == content
    with enban.open(path) as disk:
        assert disk.node.backing is not None
    check_file(path)
    # The zeros were marked, not written.
    assert path.stat().st_size < MIB


@pytest.mark.parametrize("unsafe", [False, True])
def test_what_is_refused(tmp_path: Path, unsafe: bool) -> None:
    top, _ = chain(tmp_path)
    content = top.read_bytes()
    with pytest.raises(UsageError, match="needs its format"):
        rebase(str(top), "base.qcow2", unsafe=unsafe)
    with pytest.raises(UsageError, match="needs a backing file"):
        rebase(str(top), "", "qcow2", unsafe=unsafe)
    with pytest.raises(UsageError):
        rebase(str(top), "n" * 2000, "qcow2", unsafe=True)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB))
    with pytest.raises(UnsupportedOperationError):
        rebase(str(raw), "", format="raw", unsafe=unsafe)
    assert top.read_bytes() == content


def test_loops_are_refused(tmp_path: Path) -> None:
    top, content = chain(tmp_path)
    with pytest.raises(UsageError, match="below the new backing file"):
        rebase(str(top), "top.qcow2", "qcow2")
    with pytest.raises(UsageError, match="below the new backing file"):
        rebase(str(tmp_path / "base.qcow2"), "top.qcow2", "qcow2")
    assert reads(top) == content


def test_files_in_use_are_refused(tmp_path: Path) -> None:
    """Data-loss case 17."""
    top, content = chain(tmp_path)
    make_qcow2(tmp_path / "new.qcow2", MIB)
    before = top.read_bytes()
    for name in ("top.qcow2", "middle.qcow2", "base.qcow2", "new.qcow2"):
        with enban.open(tmp_path / name, writable=True, backing=False), pytest.raises(LockedError):
            rebase(str(top), "new.qcow2", "qcow2")
    with enban.open(top, backing=False), pytest.raises(LockedError):
        rebase(str(top), "new.qcow2", "qcow2", unsafe=True)
    assert top.read_bytes() == before
    assert reads(top) == content


def test_a_full_disk_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name does not change before everything is copied and durable; trying again completes it."""
    top, content = chain(tmp_path)
    real = host.write_all
    writes = 0

    def full(fd: int, view: memoryview, offset: int) -> None:
        nonlocal writes
        writes += 1
        if writes > 2:
            raise OSError(28, "No space left on device")
        real(fd, view, offset)

    monkeypatch.setattr(host, "write_all", full)
    with pytest.raises(HostError):
        rebase(str(top), "base.qcow2", "qcow2")
    monkeypatch.undo()
    assert reads(top) == content
    with enban.open(top) as disk:
        assert disk.node.backing_name == "middle.qcow2"
    check_file(top, leaks=True)
    rebase(str(top), "base.qcow2", "qcow2")
    assert reads(top) == content


class Log(MemoryStorage):
    """Memory that remembers every write and flush."""

    events: list[tuple[int, bytes] | None]

    async def write(self, buffer: bytes | bytearray | memoryview, offset: int) -> None:
        self.events.append((offset, bytes(buffer)))
        await super().write(buffer, offset)

    async def flush(self) -> None:
        self.events.append(None)


@pytest.mark.parametrize("options", [*OPTIONS, {"cluster_size": 2 * MIB}, {"lazy_refcounts": True}])
@pytest.mark.parametrize(
    ("old", "old_format", "new", "new_format"),
    [
        ("old.qcow2", "qcow2", "new.qcow2", "qcow2"),
        ("old.qcow2", "qcow2", "a-much-longer-name-than-before.qcow2", "qcow2"),
        ("a-much-longer-name-than-before.qcow2", "qcow2", "n", "raw"),
        ("old.qcow2", "qcow2", "", ""),
        ("old.qcow2", "qcow2", "n" * 150, "raw"),
    ],
)
def test_the_name_changes_in_one_sector(
    tmp_path: Path, options: dict[str, Any], old: str, old_format: str, new: str, new_format: str
) -> None:
    """After a crash the header names the old file or the new one, whatever sectors had arrived."""
    path = make_qcow2(tmp_path / "x.qcow2", MIB, backing_file=old, backing_fmt=old_format, **options)
    image = path.read_bytes()
    log = Log(RUNTIME, image)
    log.events = []

    async def switch() -> None:
        node = await open_qcow2("x.qcow2", RUNTIME, log, writable=True)
        await node.set_backing(new, new_format)
        await node.close()

    drive(switch())

    async def named(content: bytes | bytearray) -> tuple[str, str]:
        header = await read_header(MemoryStorage(RUNTIME, content), "x.qcow2")
        kind = (header.extension(0xE2792ACA) or b"").decode()
        return header.backing_name.decode(), kind if header.backing_name else ""

    durable, seen = bytearray(image), []
    pending: list[tuple[int, bytes]] = []
    for event in log.events:
        if event is None:
            for offset, content in pending:
                durable[offset : offset + len(content)] = content
            pending.clear()
            continue
        pending.append(event)
        offset, content = event
        # A crash now: any one sector of what was just written may have arrived, or all but one.
        sectors = range(0, len(content), 512)
        for which in sectors[:40]:
            for arrived in ([which], [other for other in sectors if other != which], list(sectors)):
                crashed = bytearray(durable)
                for sector in arrived:
                    part = content[sector : sector + 512]
                    crashed[offset + sector : offset + sector + len(part)] = part
                found = drive(named(crashed))
                assert found in ((old, old_format), (new, new_format)), found
                seen.append(found)
    assert drive(named(log.content)) == (new, new_format)
    assert {(old, old_format), (new, new_format)} <= set(seen)
    # No trace of the old name is left in the header.
    assert old.encode() not in bytes(log.content[:512]) + bytes(log.content[512:4096]) or old in new


def test_names_again_and_again(tmp_path: Path) -> None:
    """Names of all lengths, to and fro, with everything else in the header kept."""
    for options in OPTIONS:
        path = make_qcow2(tmp_path / "disk.qcow2", MIB, **options)
        with enban.open(path, writable=True) as disk:
            disk.pwrite(b"guest", 12345)
            size = disk.node.cluster_size
        longest = 1023 if size > 2048 else 60
        for number in (1, 5, 9, 200, 1, 17, 300, 0, 30, longest, longest - 1, 0, 1):
            name = "n" * min(number, longest)
            rebase(str(path), name, "raw" if name else "", unsafe=True)
            with enban.open(path, backing=False) as disk:
                assert disk.node.backing_name == name
                assert disk.pread(5, 12345) == b"guest"
            check_file(path)
        path.unlink()
