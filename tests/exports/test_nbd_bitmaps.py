"""Dirty bitmaps over NBD: what clients see of them while the disk is written, by every road."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

import enban
import enban.aio
from enban.block.runtime import drive
from enban.errors import UnsupportedOperationError, UsageError
from enban.exports.nbd import ServedExport
from enban.wire.nbd import constants as c
from tests.exports.nbd_peer import KIB, MIB, Running, open_disk, serving
from tests.support import check_file, make_qcow2, pattern

CONTEXT = "qemu:dirty-bitmap:b"


def image(folder: Path, **options: Any) -> Path:
    path = make_qcow2(folder / "disk.qcow2", 4 * MIB, **options)
    with enban.open(path, writable=True) as disk:
        disk.add_bitmap("b", granularity=4096)
    return path


def test_clients_see_what_was_written_by_every_road(tmp_path: Path) -> None:
    """Hot and cold writes, in place and allocating, zeroes and trims, many at a time."""
    path = image(tmp_path, cluster_size=16384)
    door = open_disk(path)
    random = Random(7)
    model: set[int] = set()
    with (
        serving(door, folder=tmp_path, bitmaps=["b"]) as running,
        running.peer(contexts=(CONTEXT, c.BASE_ALLOCATION)) as peer,
    ):
        for _ in range(60):
            sent = []
            for _ in range(random.randrange(1, 9)):
                offset = random.randrange(4 * MIB - 70_000)
                length = random.choice((1, 512, 4096, 20_000, 65536))
                sent.append(peer.send(c.CMD_WRITE, offset, 0, 0, pattern(length)))
                model |= set(range(offset // 4096, (offset + length - 1) // 4096 + 1))
            for transaction in sent:
                assert peer.collect(transaction).error == 0
        peer.ask(c.CMD_WRITE_ZEROES, 0, 32 * KIB)
        peer.ask(c.CMD_TRIM, MIB, 64 * KIB)
        seen: set[int] = set()
        offset = 0
        while offset < 4 * MIB:
            status = peer.ask(c.CMD_BLOCK_STATUS, offset, 4 * MIB - offset).status
            assert set(status) == {CONTEXT, c.BASE_ALLOCATION}
            for length, flags in status[CONTEXT]:
                assert flags in (0, 1) and length > 0
                if flags:
                    seen |= set(range(offset // 4096, (offset + length) // 4096))
                offset += length
        assert model <= seen <= model | set(range(8)) | set(range(256, 272))
        one = peer.ask(c.CMD_BLOCK_STATUS, 100, MIB, c.CMD_FLAG_REQ_ONE).status[CONTEXT]
        assert len(one) == 1
    drive(door.close())
    check_file(path)
    with enban.open(path) as disk:
        stored = {
            n for start, length in disk.dirty("b") for n in range(start // 4096, (start + length) // 4096)
        }
    assert stored == seen


def test_many_extents_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enban.exports.nbd.export.MOST_EXTENTS", 5)
    path = image(tmp_path)
    with enban.open(path, writable=True) as disk:
        for place in range(0, MIB, 8192):
            disk.pwrite(b"x", place)
    door = open_disk(path)
    with (
        serving(door, folder=tmp_path, bitmaps=["b"]) as running,
        running.peer(contexts=(CONTEXT,)) as peer,
    ):
        found: list[tuple[int, int]] = []
        offset = 0
        while offset < MIB:
            extents = peer.ask(c.CMD_BLOCK_STATUS, offset, MIB - offset).status[CONTEXT]
            assert len(extents) <= 5
            found += extents
            offset += sum(length for length, _ in extents)
        assert found == [(4096, 1), (4096, 0)] * 128
    drive(door.close())


def test_a_slice_and_a_read_only_export(tmp_path: Path) -> None:
    path = image(tmp_path)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"x", MIB)
    door = open_disk(path, writable=False)
    export = ServedExport(door, "s", offset=MIB - 4096, size=MIB, bitmaps=["b", "b"])
    assert export.contexts == {1: c.BASE_ALLOCATION, 2: "qemu:allocation-depth", 3: CONTEXT}
    running = Running([export], tmp_path)
    try:
        with running.peer("s", contexts=(CONTEXT,)) as peer:
            assert peer.ask(c.CMD_BLOCK_STATUS, 0, MIB).status == {
                CONTEXT: [(4096, 0), (4096, 1), (MIB - 8192, 0)]
            }
    finally:
        running.stop()
    drive(door.close())


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    path = image(tmp_path)
    door = open_disk(path)
    with pytest.raises(UsageError, match="no bitmap 'c'"):
        ServedExport(door, bitmaps=["c"])
    drive(door.close())
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB))
    door = open_disk(raw, format="raw")
    with pytest.raises(UnsupportedOperationError, match="no dirty bitmaps"):
        ServedExport(door, bitmaps=["c"])
    drive(door.close())


def test_a_bitmap_that_was_removed_meanwhile_is_an_error_for_the_client(tmp_path: Path) -> None:
    path = image(tmp_path)
    door = open_disk(path)
    with (
        serving(door, folder=tmp_path, bitmaps=["b"]) as running,
        running.peer(contexts=(CONTEXT,)) as peer,
    ):
        assert peer.ask(c.CMD_BLOCK_STATUS, 0, MIB).status == {CONTEXT: [(MIB, 0)]}
        peer.write(0, b"x")
        enban.Disk(door).clear_bitmap("b")
        assert peer.ask(c.CMD_BLOCK_STATUS, 0, MIB).status == {CONTEXT: [(MIB, 0)]}
        enban.Disk(door).remove_bitmap("b")
        assert peer.try_ask(c.CMD_BLOCK_STATUS, 0, MIB).error
        assert peer.read(0, 1) == b"x"
    drive(door.close())


def test_our_client_reads_what_our_server_shows(tmp_path: Path) -> None:
    path = image(tmp_path)
    door = open_disk(path)
    with serving(door, folder=tmp_path, bitmaps=["b"]) as running:
        uri = f"nbd+unix:///?socket={running.path}"
        with enban.open(uri, writable=True) as disk:
            disk.pwrite(b"x" * 10_000, MIB)
            disk.pwrite(b"x", 4 * MIB - 1)
            assert list(disk.dirty("b")) == [(MIB, 12 * KIB), (4 * MIB - 4 * KIB, 4 * KIB)]
            assert list(disk.dirty("b", MIB + 100, 50)) == [(MIB + 100, 50)]
            with pytest.raises(UsageError, match="no bitmap 'c'"):
                list(disk.dirty("c"))
            for request in (
                disk.bitmaps,
                partial(disk.add_bitmap, "c"),
                partial(disk.clear_bitmap, "b"),
                partial(disk.remove_bitmap, "b"),
                partial(disk.enable_bitmap, "b"),
                partial(disk.merge_bitmap, "b", "b"),
            ):
                with pytest.raises(UnsupportedOperationError):
                    request()
        sliced = {
            "driver": "raw",
            "offset": MIB + 4096,
            "size": 2 * MIB,
            "file": {"driver": "nbd", "filename": uri},
        }
        with enban.open(sliced) as part:
            assert list(part.dirty("b")) == [(0, 8 * KIB)]

        async def ask() -> list[tuple[int, int]]:
            async with await enban.aio.open(uri) as disk:
                return [extent async for extent in disk.dirty("b", 0, 2 * MIB)]

        assert asyncio.run(ask()) == [(MIB, 12 * KIB)]
