"""Files that appear whole or not at all, and never in place of one that is in use."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.block.runtime import drive
from enban.errors import HostError, LockedError, NoSpaceError, UnsupportedOperationError, UsageError
from enban.jobs.create import create, prepare_target
from enban.jobs.output import SUFFIX, Output, partial_name
from enban.storage import host
from enban.storage.file import FileStorage
from enban.storage.file import open_file as open_file_really
from tests.support import MIB, make_qcow2, pattern


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_at_commit(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with prepare_target(str(path), "raw", {}, size=MIB) as target:
        target.disk.pwrite(b"hello", 4096)
        assert names(tmp_path) == ["disk.raw" + SUFFIX]
        target.commit()
    assert names(tmp_path) == ["disk.raw"]
    assert path.read_bytes()[4096:4101] == b"hello"


def test_durable_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 3: flush the file, rename it, flush the directory, in this order."""
    events: list[str] = []
    real_sync, real_replace, real_directory = host.sync, os.replace, host.sync_directory

    def sync(fd: int) -> None:
        events.append("sync")
        real_sync(fd)

    def replace(source: str, target: str) -> None:
        events.append("rename")
        real_replace(source, target)

    def sync_directory(path: str) -> None:
        events.append(f"sync {path}")
        real_directory(path)

    monkeypatch.setattr(host, "sync", sync)
    monkeypatch.setattr(host, "sync_directory", sync_directory)
    monkeypatch.setattr(os, "replace", replace)
    for format in ("raw", "qcow2", "qcow"):
        events.clear()
        with prepare_target(str(tmp_path / format), format, {}, size=MIB) as target:
            target.disk.pwrite(b"x", 0)
            target.commit()
        assert "sync" in events
        assert events[-2:] == ["rename", f"sync {tmp_path}"]
        assert events.count("rename") == 1


@pytest.mark.parametrize("format", ["raw", "qcow2", "qcow"])
def test_discarded(tmp_path: Path, format: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), prepare_target(str(path), format, {}, size=MIB) as target:
        target.disk.pwrite(b"x", 0)
        raise ZeroDivisionError
    assert names(tmp_path) == ["disk"]
    assert path.read_bytes() == b"before"
    enban.open(path, writable=True, format="raw").close()  # nothing holds it any more


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with (
        pytest.raises(UnsupportedOperationError, match="version 2") as caught,
        prepare_target(str(path), "qcow2", {"compat": "0.10"}, size=MIB) as target,
    ):
        target.disk.add_bitmap("b")
    assert caught.value.path == str(path)
    assert names(tmp_path) == []


def test_data_file_and_image_appear_together(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with prepare_target(str(path), "qcow2", {"data_file": "disk.data"}, size=MIB) as target:
        target.disk.pwrite(b"guest", 0)
        assert names(tmp_path) == ["disk.data" + SUFFIX, "disk.qcow2" + SUFFIX]
        target.commit()
    assert names(tmp_path) == ["disk.data", "disk.qcow2"]
    with enban.open(path) as disk:
        assert disk.pread(5, 0) == b"guest"


def test_the_mode_of_a_replaced_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    with prepare_target(str(path), "raw", {}, size=MIB) as target:
        # Also while it is made: nobody else may read what nobody else could read before.
        assert stat.S_IMODE(os.stat(target.temporary).st_mode) == 0o600
        target.commit()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.raw").symlink_to("real/disk.raw")
    create(str(tmp_path / "link.raw"), "raw", size=MIB)
    assert (tmp_path / "link.raw").is_symlink()
    assert names(tmp_path / "real") == ["disk.raw"]


def test_an_image_in_use_is_not_replaced(tmp_path: Path) -> None:
    """Data-loss case 17: another program that has the image open keeps it."""
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    content = path.read_bytes()
    for writable in (True, False):
        with enban.open(path, writable=writable):
            with pytest.raises(LockedError) as caught:
                create(str(path), "qcow2", size=MIB)
            assert str(path) in str(caught.value)
    assert path.read_bytes() == content
    assert names(tmp_path) == ["disk.qcow2"]
    create(str(path), "qcow2", size=2 * MIB)


def test_an_image_cannot_be_opened_while_it_is_replaced(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    with prepare_target(str(path), "qcow2", {}, size=MIB) as target:
        with pytest.raises(LockedError):
            enban.open(path, writable=True)
        target.commit()
    enban.open(path, writable=True).close()


def test_a_partial_file_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    (tmp_path / ("disk.raw" + SUFFIX)).write_bytes(pattern(3 * MIB))
    create(str(path), "raw", size=MIB)
    assert names(tmp_path) == ["disk.raw"]
    assert path.read_bytes() == bytes(MIB)


def test_a_partial_file_in_the_making_is_not(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with prepare_target(str(path), "raw", {}, size=MIB) as target:
        with pytest.raises(LockedError) as caught:
            create(str(path), "raw", size=MIB)
        assert "another process is making this image" in str(caught.value)
        target.disk.pwrite(b"mine", 0)
        target.commit()
    assert path.read_bytes()[:4] == b"mine"


def test_keep_and_resume(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.qcow2")
    with prepare_target(path, "qcow2", {}, size=MIB, resume=True) as target:
        assert not target.resumed
        target.disk.pwrite(b"first", 0)
        target.keep()
    assert names(tmp_path) == ["disk.qcow2" + SUFFIX]
    with prepare_target(path, "qcow2", {}, size=MIB, resume=True) as target:
        assert target.resumed
        assert target.disk.pread(5, 0) == b"first"
        target.commit()
    assert names(tmp_path) == ["disk.qcow2"]


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.qcow2")
    partial = tmp_path / ("disk.qcow2" + SUFFIX)
    with prepare_target(path, "qcow2", {}, size=MIB) as target:
        target.keep()
    with pytest.raises(UsageError, match="cannot resume"):
        prepare_target(path, "qcow2", {}, size=2 * MIB, resume=True)
    partial.write_bytes(b"no image at all")
    with pytest.raises(UsageError, match="cannot resume"):
        prepare_target(path, "qcow2", {}, size=MIB, resume=True)


def test_places_where_no_image_can_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises((UsageError, HostError)):
            create(str(tmp_path / name), "raw", size=MIB)
    with pytest.raises(UsageError):
        create("/dev/null", "raw", size=MIB)
    with pytest.raises(UsageError):
        create("", "raw", size=MIB)
    with pytest.raises(HostError):
        create(str(tmp_path / "missing" / "disk.raw"), "raw", size=MIB)
    (tmp_path / ("disk.raw" + SUFFIX)).mkdir()
    with pytest.raises(UsageError, match="remove it"):
        create(str(tmp_path / "disk.raw"), "raw", size=MIB)
    assert names(tmp_path) == ["disk.raw" + SUFFIX, "folder", "pipe"]


def test_a_directory_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"old")
    real = host.open_file

    def open_file(path: str, *, create: bool = False, **options: Any) -> int:
        if create:
            raise PermissionError(13, "Permission denied", path)
        return real(path, create=create, **options)

    monkeypatch.setattr(host, "open_file", open_file)
    with pytest.raises(HostError, match="directory must be writable"):
        create(str(path), "raw", size=MIB)
    assert path.read_bytes() == b"old"
    enban.open(path, writable=True, format="raw").close()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, view: memoryview, offset: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "disk.qcow2"
    monkeypatch.setattr(host, "write_all", full)
    with pytest.raises(NoSpaceError):
        create(str(path), "qcow2", size=MIB)
    assert names(tmp_path) == []


def test_a_failed_flush_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"old")
    monkeypatch.setattr(host, "sync", fail)
    with pytest.raises(HostError):
        create(str(path), "qcow2", size=MIB)
    assert names(tmp_path) == ["disk.qcow2"]
    assert path.read_bytes() == b"old"


def test_long_names(tmp_path: Path) -> None:
    for length in (230, 250, 255):
        name = "d" * length
        create(str(tmp_path / name), "raw", size=MIB)
        assert (tmp_path / name).stat().st_size == MIB
    one, other = partial_name("/x/" + "é" * 120 + "a"), partial_name("/x/" + "é" * 120 + "b")
    assert one != other
    assert max(len(os.fsencode(Path(path).name)) for path in (one, other)) <= 255


def test_many_at_once(tmp_path: Path) -> None:
    """Of several jobs for one target at a time, each succeeds or is refused; the file is always whole."""
    path = str(tmp_path / "disk.qcow2")
    outcomes: list[str] = []

    def job() -> None:
        for _ in range(10):
            try:
                create(path, "qcow2", size=MIB)
                outcomes.append("made")
            except HostError as error:
                outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=job) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "made" in outcomes
    with enban.open(path) as disk:
        assert disk.size == MIB
    assert set(names(tmp_path)) <= {"disk.qcow2", "disk.qcow2" + SUFFIX}


def test_a_partial_file_that_another_job_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job may take a new partial file for an abandoned one, in the moment before it is locked."""
    path = tmp_path / "disk.raw"
    theirs = tmp_path / ("disk.raw" + SUFFIX)
    real = open_file_really

    def open_file(name: str, *arguments: Any, **options: Any) -> FileStorage:
        storage = real(name, *arguments, **options)
        if options.get("create"):
            theirs.unlink()
            theirs.write_bytes(b"theirs")
        return storage

    monkeypatch.setattr("enban.jobs.output.open_file", open_file)
    with pytest.raises(LockedError, match="another process is making this image"):
        create(str(path), "raw", size=MIB)
    assert names(tmp_path) == [theirs.name]
    assert theirs.read_bytes() == b"theirs"


def test_locked_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last flush and the rename nobody can take the file for an abandoned one."""
    path = tmp_path / "disk.raw"
    real = os.replace
    refusals: list[str] = []

    def replace(source: str, target: str) -> None:
        monkeypatch.setattr(os, "replace", real)
        with pytest.raises(LockedError) as caught:
            create(str(path), "raw", size=2 * MIB)
        refusals.append(str(caught.value))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    create(str(path), "raw", size=MIB)
    assert len(refusals) == 1
    assert path.stat().st_size == MIB


def test_a_partial_file_removed_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"old")
    with prepare_target(str(path), "raw", {}, size=MIB) as target:
        os.unlink(target.temporary)
        with pytest.raises(HostError, match="was removed"):
            target.commit()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["disk.raw"]


def test_a_host_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "HAVE_LOCKS", False)
    path = tmp_path / "disk.raw"
    (tmp_path / ("disk.raw" + SUFFIX)).write_bytes(b"left behind")
    create(str(path), "raw", size=MIB)
    create(str(path), "raw", size=2 * MIB)
    with pytest.raises(ZeroDivisionError), prepare_target(str(path), "raw", {}, size=MIB):
        raise ZeroDivisionError
    assert names(tmp_path) == ["disk.raw"]
    assert path.stat().st_size == 2 * MIB


def test_output_ends_once(tmp_path: Path) -> None:
    made = Output(str(tmp_path / "x"))
    drive(made.storage.close())
    made.commit()
    made.discard()
    assert names(tmp_path) == ["x"]
