"""Full and incremental backups: what a chain of them restores, and what is left when one fails."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

import enban
import enban.aio
from enban.block.disk import Disk
from enban.cli import main
from enban.errors import EnbanError, HostError, ImageError, LockedError, UnsupportedOperationError, UsageError
from enban.jobs.create import Target
from enban.jobs.journal import Journal
from enban.jobs.output import partial_name
from tests.cli.command import command, environment
from tests.support import KIB, MIB, check_file, make_qcow2, pattern


def content(path: Path) -> bytes:
    with enban.open(path) as disk:
        return disk.pread(disk.size, 0)


def changed(path: Path, name: str = "b") -> list[tuple[int, int]]:
    with enban.open(path) as disk:
        return list(disk.dirty(name))


def scribble(path: Path, random: Random, steps: int = 6) -> None:
    with enban.open(path, writable=True) as disk:
        for _ in range(steps):
            offset = random.randrange(disk.size)
            length = random.randrange(1, min(disk.size - offset, 200_000) + 1)
            kind = random.choice(("write", "write", "zero", "discard"))
            if kind == "write":
                disk.pwrite(random.randbytes(length), offset)
            elif kind == "zero":
                disk.write_zeroes(offset, length, unmap=random.random() < 0.5)
            else:
                disk.discard(offset, length)
        if random.random() < 0.4:
            disk.resize(random.randrange(1000, 8000) * 512)


SHAPES = [
    pytest.param({}, 65536, id="default"),
    pytest.param({"cluster_size": 4096}, 512, id="fine"),
    pytest.param({"cluster_size": 16384, "extended_l2": True}, MIB, id="coarse"),
    pytest.param({"backing_file": "below.raw", "backing_fmt": "raw"}, 4096, id="chain"),
]


@pytest.mark.parametrize(("shape", "granularity"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_chain_of_incrementals_restores_the_exact_disk(
    shape: dict[str, Any], granularity: int, seed: int, tmp_path: Path
) -> None:
    """Every link of the chain shows the disk as it was then, also when the disk changed its size."""
    random = Random(seed)
    (tmp_path / "below.raw").write_bytes(pattern(MIB + 512))
    source = make_qcow2(tmp_path / "disk.qcow2", 3 * MIB, **shape)
    scribble(source, random)
    links = []
    before = ""
    for number in range(6):
        target = tmp_path / f"backup-{number}.qcow2"
        result = enban.backup(
            source,
            target,
            bitmap="b",
            base=before,
            granularity=0 if before else granularity,
            verify=number % 2 == 1,
        )
        assert result.full == (not before)
        assert changed(source) == []
        links.append((target, content(source)))
        before = str(target)
        scribble(source, random)
    for target, expected in links:
        assert content(target) == expected
        check_file(target)
    check_file(source)
    restored = tmp_path / "restored.raw"
    enban.convert(links[-1][0], restored)
    assert restored.read_bytes() == links[-1][1]


def test_an_incremental_holds_only_what_changed(tmp_path: Path) -> None:
    source = make_qcow2(tmp_path / "disk.qcow2", 64 * MIB)
    with enban.open(source, writable=True) as disk:
        disk.pwrite(pattern(16 * MIB), 0)
    full = enban.backup(source, tmp_path / "full.qcow2", bitmap="b")
    assert full.full and full.copied == 16 * MIB
    with enban.open(source, writable=True) as disk:
        disk.pwrite(b"x", 5 * MIB)
    result = enban.backup(source, tmp_path / "next.qcow2", bitmap="b", base=tmp_path / "full.qcow2")
    assert not result.full and result.copied == 64 * KIB
    assert (tmp_path / "next.qcow2").stat().st_size < MIB
    with enban.open(tmp_path / "next.qcow2") as disk:
        assert disk.node.backing_name == "full.qcow2" and disk.node.backing_format == "qcow2"
    nothing = enban.backup(source, tmp_path / "none.qcow2", bitmap="b", base=tmp_path / "next.qcow2")
    assert nothing.copied == 0 and content(tmp_path / "none.qcow2") == content(source)


class Stop(Exception):
    pass


def stop(done: int, total: int) -> None:
    raise Stop


def test_a_backup_that_fails_loses_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_qcow2(tmp_path / "disk.qcow2", 4 * MIB)
    enban.backup(source, tmp_path / "full.qcow2", bitmap="b")
    with enban.open(source, writable=True) as disk:
        disk.pwrite(pattern(100 * KIB), MIB)
    due = changed(source)
    assert due
    target = tmp_path / "next.qcow2"
    with pytest.raises(Stop):
        enban.backup(source, target, bitmap="b", base=tmp_path / "full.qcow2", progress=stop)
    assert not target.exists() and changed(source) == due
    with pytest.raises(Stop):
        enban.backup(source, target, bitmap="b", progress=stop)
    assert not target.exists() and changed(source) == due

    def fail(disk: Disk, name: str) -> None:
        raise HostError("cannot write: input/output error", path=disk.name, errno=5)

    with monkeypatch.context() as patch:  # as when the machine stops between the two
        patch.setattr(Disk, "clear_bitmap", fail)
        with pytest.raises(HostError):
            enban.backup(source, target, bitmap="b", base=tmp_path / "full.qcow2")
    assert content(target) == content(source) and changed(source) == due
    with enban.open(source, writable=True) as disk:
        disk.pwrite(b"later", 3 * MIB)
    enban.backup(source, tmp_path / "after.qcow2", bitmap="b", base=target)
    assert content(tmp_path / "after.qcow2") == content(source) and changed(source) == []
    again = tmp_path / "again.qcow2"  # the base of before still does as well
    with enban.open(source, writable=True) as disk:
        disk.pwrite(b"more", 0)
    enban.backup(source, again, bitmap="b", base=tmp_path / "after.qcow2")
    assert content(again) == content(source)


def test_after_a_crash_only_a_full_backup_is_made(tmp_path: Path) -> None:
    source = make_qcow2(tmp_path / "disk.qcow2", MIB)
    enban.backup(source, tmp_path / "full.qcow2", bitmap="b", granularity=4096)
    disk = enban.open(source, writable=True)
    disk.pwrite(b"x" * 5000, 0)
    disk.flush()
    killed = tmp_path / "killed.qcow2"
    killed.write_bytes(source.read_bytes())
    disk.close()
    with pytest.raises(ImageError, match=r"inconsistent.*full"):
        enban.backup(killed, tmp_path / "no.qcow2", bitmap="b", base=tmp_path / "full.qcow2")
    assert not (tmp_path / "no.qcow2").exists()
    enban.backup(killed, tmp_path / "new.qcow2", bitmap="b")
    with enban.open(killed) as disk:
        info = disk.bitmaps()[0]
        assert not info.inconsistent and info.enabled and info.granularity == 4096
    assert changed(killed) == []
    check_file(killed)


def test_what_cannot_be_backed_up_is_refused_in_one_line(tmp_path: Path) -> None:
    source = make_qcow2(tmp_path / "disk.qcow2", MIB)
    other = make_qcow2(tmp_path / "other.qcow2", MIB)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB))
    target = tmp_path / "t.qcow2"
    with enban.open(source, writable=True) as disk:
        disk.add_bitmap("off", enabled=False)
    refused: tuple[tuple[tuple[Path, Path], dict[str, Any], type[EnbanError], str], ...] = (
        ((source, target), {"bitmap": ""}, UsageError, "name of a bitmap"),
        ((source, target), {"bitmap": "b", "base": other}, UsageError, "full backup first"),
        ((source, target), {"bitmap": "off", "base": other}, UsageError, "disabled"),
        ((source, target), {"bitmap": "off", "base": other, "granularity": 512}, UsageError, "granularity"),
        ((source, target), {"bitmap": "b", "granularity": 3}, UsageError, "granularity"),
        ((raw, target), {"bitmap": "b"}, UnsupportedOperationError, "no dirty bitmaps"),
        ((source, source), {"bitmap": "b"}, LockedError, "in use"),
        ((source, target), {"bitmap": "off", "base": tmp_path / "nope"}, UsageError, "disabled"),
    )
    for arguments, settings, kind, words in refused:
        with pytest.raises(kind, match=words) as caught:
            enban.backup(*arguments, **settings)
        assert "\n" not in str(caught.value) and not target.exists()
    with enban.open(source, writable=True) as disk:
        disk.add_bitmap("on")
        disk.pwrite(b"x", 0)
    for base in ("nope.qcow2", str(source)):
        with pytest.raises(EnbanError):
            enban.backup(source, target, bitmap="on", base=base)
        assert not target.exists()
    assert changed(source, "on")


def test_a_wrong_base_shows_when_it_is_verified(tmp_path: Path) -> None:
    source = make_qcow2(tmp_path / "disk.qcow2", MIB)
    paths = [tmp_path / f"{n}.qcow2" for n in range(3)]
    enban.backup(source, paths[0], bitmap="b")
    for n in (1, 2):
        with enban.open(source, writable=True) as disk:
            disk.pwrite(pattern(5000, n), n * 100_000)
        if n == 1:
            enban.backup(source, paths[1], bitmap="b", base=paths[0])
    with pytest.raises(EnbanError, match="does not read as the disk"):
        enban.backup(source, paths[2], bitmap="b", base=paths[0], verify=True)
    assert not paths[2].exists() and changed(source)
    enban.backup(source, paths[2], bitmap="b", base=paths[1], verify=True)


def test_asyncio(tmp_path: Path) -> None:
    source = make_qcow2(tmp_path / "disk.qcow2", MIB)

    async def run() -> None:
        assert (await enban.aio.backup(source, tmp_path / "a.qcow2", bitmap="b")).full
        async with await enban.aio.open(source, writable=True) as disk:
            await disk.pwrite(b"x" * 1000, 500_000)
        result = await enban.aio.backup(source, tmp_path / "b.qcow2", bitmap="b", base=tmp_path / "a.qcow2")
        assert result.copied == 65536

    asyncio.run(run())
    assert content(tmp_path / "b.qcow2") == content(source)


# -- the verbs ---------------------------------------------------------------------------------


def test_the_verbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_qcow2("disk.qcow2", MIB)

    def run(line: str, code: int = 0) -> str:
        assert main(line.split()) == code, capsys.readouterr()
        done = capsys.readouterr()
        return done.err if code else done.out

    run("bitmap --add -g 4k disk.qcow2 one")
    run("bitmap --add --disable disk.qcow2 two")
    with enban.open("disk.qcow2", writable=True) as disk:
        disk.pwrite(b"x", 70_000)
    run("bitmap --merge one disk.qcow2 two")
    run("bitmap --clear --disable disk.qcow2 one")
    with enban.open("disk.qcow2") as disk:
        assert [(b.name, b.enabled, b.granularity) for b in disk.bitmaps()] == [
            ("one", False, 4096),
            ("two", False, 65536),
        ]
        assert list(disk.dirty("one")) == [] and list(disk.dirty("two")) == [(65536, 65536)]
    run("bitmap --enable disk.qcow2 one")
    make_qcow2("other.qcow2", MIB)
    run("bitmap --add --merge two -b disk.qcow2 -F qcow2 other.qcow2 copy")
    with enban.open("other.qcow2") as disk:
        assert list(disk.dirty("copy")) == [(65536, 65536)]
    shown = run("info disk.qcow2")
    assert "name: one" in shown and "[0]: auto" in shown
    for line, words in (
        ("bitmap disk.qcow2 one", "say what to do"),
        ("bitmap --clear -g 4k disk.qcow2 one", "-g goes with --add"),
        ("bitmap --clear -b other.qcow2 disk.qcow2 one", "-b goes with --merge"),
        ("bitmap --add disk.qcow2 one", "already"),
        ("bitmap --remove disk.qcow2 none", "no bitmap 'none'"),
        ("bitmap --merge nope disk.qcow2 one", "no bitmap 'nope'"),
        ("bitmap --add disk.qcow2", "do not fit"),
        ("backup disk.qcow2 t.qcow2", "--bitmap"),
        ("backup --bitmap b disk.qcow2", "source and a target"),
        ("convert --skip-broken-bitmaps -O qcow2 disk.qcow2 t.qcow2", "goes with --bitmaps"),
        ("convert --bitmaps disk.qcow2 t.raw", "no dirty bitmaps"),
        ("convert --bitmaps -O qcow2 disk.qcow2 other.qcow2 t.qcow2", "single source"),
    ):
        assert words in run(line, 1)
    assert "full backup: 4 KiB of 1 MiB" in run("backup --bitmap daily disk.qcow2 a.qcow2")
    assert "incremental backup: 0 B of 1 MiB" in run(
        "backup --verify -B daily --base a.qcow2 disk.qcow2 b.qcow2"
    )
    assert run("backup -q -B daily disk.qcow2 c.qcow2") == ""


def test_convert_copies_bitmaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_qcow2(tmp_path / "disk.qcow2", 2 * MIB, cluster_size=4096)
    with enban.open(source, writable=True) as disk:
        disk.add_bitmap("on", granularity=512)
        disk.pwrite(pattern(3000), 100_000)
        disk.add_bitmap("off", enabled=False)
    expected = changed(source, "on")
    ways: tuple[dict[str, Any], ...] = ({}, {"compress": True}, {"resume": True}, {"target_exists": True})
    for number, settings in enumerate(ways):
        target = tmp_path / f"t{number}.qcow2"
        if "target_exists" in settings:
            make_qcow2(target, 3 * MIB)
        enban.convert(source, target, target_format="qcow2", bitmaps=True, **settings)
        assert changed(target, "on") == expected and changed(target, "off") == []
        with enban.open(target) as disk:
            assert [(b.name, b.enabled, b.granularity) for b in disk.bitmaps()] == [
                ("on", True, 512),
                ("off", False, 65536),
            ]
        check_file(target)
    disk = enban.open(source, writable=True)
    disk.pwrite(b"x", 0)
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(source.read_bytes())
    disk.close()
    with pytest.raises(ImageError, match="inconsistent"):
        enban.convert(broken, tmp_path / "u.qcow2", target_format="qcow2", bitmaps=True)
    assert not (tmp_path / "u.qcow2").exists()
    line = [
        "convert",
        "--bitmaps",
        "--skip-broken-bitmaps",
        "-O",
        "qcow2",
        str(broken),
        str(tmp_path / "u.qcow2"),
    ]
    assert main(line) == 0
    with enban.open(tmp_path / "u.qcow2") as disk:
        assert [b.name for b in disk.bitmaps()] == ["off"]


@pytest.mark.parametrize("exists", [False, True])
def test_bitmaps_that_cannot_be_copied_are_refused_before_anything_is(tmp_path: Path, exists: bool) -> None:
    source, target = make_qcow2(tmp_path / "disk.qcow2", MIB), tmp_path / "t.qcow2"
    with enban.open(source, writable=True) as disk:
        disk.pwrite(pattern(MIB), 0)
        disk.add_bitmap("b")
    if exists:
        make_qcow2(target, MIB)
        with enban.open(target, writable=True) as disk:
            disk.add_bitmap("b")
    before = target.read_bytes() if exists else b""
    with pytest.raises(UsageError, match="a bitmap 'b' already" if exists else "version 2 has no") as caught:
        enban.convert(
            source,
            target,
            target_format="qcow2",
            options={} if exists else {"compat": "0.10"},
            bitmaps=True,
            target_exists=exists,
            progress=lambda done, all: pytest.fail("something was copied"),
        )
    assert caught.value.path == str(target)
    assert target.read_bytes() == before if exists else not target.exists()


def test_a_resumed_convert_copies_bitmaps_that_were_copied_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 between the bitmaps and the end leaves them in the partial image, in use."""
    source, target = make_qcow2(tmp_path / "disk.qcow2", MIB), tmp_path / "t.qcow2"
    with enban.open(source, writable=True) as disk:
        disk.add_bitmap("b")
        disk.pwrite(pattern(MIB), 0)
    partial = Path(partial_name(str(target)))
    killed = bytearray()

    def die(target: Target) -> None:
        target.disk.flush()
        killed[:] = partial.read_bytes()
        raise KeyboardInterrupt

    settings: dict[str, Any] = {"target_format": "qcow2", "bitmaps": True, "resume": True}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Target, "commit", die)
        enban.convert(source, target, **settings)
    partial.write_bytes(killed)
    monkeypatch.setattr(Journal, "load", lambda journal: MIB // 2)
    assert enban.convert(source, target, **settings).resumed_at == MIB // 2
    assert content(target) == content(source) and changed(target) == changed(source)
    check_file(target)


def test_killed_backups_lose_no_change(tmp_path: Path) -> None:
    """kill -9 at any time: there is no target and the bitmap is as it was, or the target is whole."""
    source = make_qcow2(tmp_path / "disk.qcow2", 64 * MIB)
    full = tmp_path / "full.qcow2"
    enban.backup(source, full, bitmap="b")
    with enban.open(source, writable=True) as disk:
        disk.pwrite(pattern(24 * MIB), MIB)
    due, expected = changed(source), content(source)
    target = tmp_path / "next.qcow2"
    words = command("backup", "-B", "b", "--base", full, source, target)
    unfinished = 0
    for number in range(12):
        process = subprocess.Popen(
            words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(0.005 * 1.5**number)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)
        left = changed(source)
        check_file(source, leaks=True)
        if target.exists():
            assert content(target) == expected and left in (due, [])
            if not left:
                break
            target.unlink()
        else:
            unfinished += 1
            assert left == due
    assert unfinished, "it was never killed in time"
    if changed(source):
        enban.backup(source, target, bitmap="b", base=full)
    assert content(target) == expected and changed(source) == []
