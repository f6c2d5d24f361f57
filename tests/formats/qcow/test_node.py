"""A qcow image as a node: mapping, allocation, holes, names and sizes; what damaged images do."""

from __future__ import annotations

import random
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.block.codec import deflater
from enban.block.runtime import BLOCKING, drive
from enban.errors import (
    CorruptDataError,
    CorruptImageError,
    EnbanError,
    NoSpaceError,
    ReadOnlyError,
    UnsupportedOperationError,
    UsageError,
)
from enban.extent import COMPRESSED, DATA, UNALLOCATED
from enban.formats.qcow.create import QcowOptions, write_empty
from enban.formats.qcow.node import QcowNode
from enban.storage.memory import MemoryStorage
from tests.qcow_support import check_sound, make_qcow, memory_qcow, open_disk
from tests.support import KIB, MIB, pattern, raw_node


def entry_at(storage: MemoryStorage, offset: int) -> int:
    return int.from_bytes(storage.content[offset : offset + 8], "big")


def put(storage: MemoryStorage, offset: int, value: int) -> None:
    storage.content[offset : offset + 8] = value.to_bytes(8, "big")


def kinds(disk: enban.Disk) -> list[tuple[int, int, int]]:
    return [(e.start, e.length, e.kind) for e in disk.map()]


def test_a_new_image_is_as_qemu_makes_it() -> None:
    storage = memory_qcow(10 << 20)
    assert len(storage.content) == 48 + 512
    assert storage.content[:48] == bytes.fromhex(
        "514649fb00000001000000000000000000000000000000000000000000a000000c090000000000000000000000000030"
    )
    overlay = memory_qcow(1000448, backing_file="back.raw")
    assert len(overlay.content) == 568  # name filled up to 8, an L1 entry filled up to 512
    assert overlay.content[32:34] == b"\x09\x0c" and overlay.content[48:56] == b"back.raw"


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1000, 4095, 4097, 2 * MIB, 2 * MIB + 1, 5 * MIB - 512])
def test_sizes(size: int) -> None:
    storage = memory_qcow(size)
    disk = open_disk(storage)
    assert disk.size == -(-size // 512) * 512
    content = pattern(disk.size)
    if content:
        disk.pwrite(content, 0)
    assert disk.pread(disk.size, 0) == content
    disk.close()
    assert check_sound(storage.content).read() == content
    assert open_disk(storage).pread(disk.size, 0) == content


def test_sizes_that_old_tools_wrote_count_to_the_last_byte() -> None:
    storage = memory_qcow(8 * KIB)
    put(storage, 24, 5000)
    disk = open_disk(storage)
    assert disk.size == 5000
    disk.pwrite(b"x" * 5000, 0)
    disk.close()
    assert open_disk(storage).pread(5000, 0) == b"x" * 5000
    with pytest.raises(UsageError):
        open_disk(storage).pread(5001, 0)


def test_what_is_written_lies_in_the_order_it_was_written() -> None:
    storage = memory_qcow(4 * MIB)
    disk = open_disk(storage)
    disk.pwrite(b"b" * 8 * KIB, 64 * KIB)
    disk.pwrite(b"a" * 4 * KIB, 0)
    assert kinds(disk)[:3] == [
        (0, 4 * KIB, DATA),
        (4 * KIB, 60 * KIB, UNALLOCATED),
        (64 * KIB, 8 * KIB, DATA),
    ]
    assert [e.host for e in disk.map() if e.kind == DATA] == [
        4 * 4096,
        2 * 4096,
    ]  # after the L2 table at 4096
    disk.close()
    assert len(storage.content) == 5 * 4096
    assert entry_at(storage, 48) == 4096
    assert entry_at(storage, 4096) == 4 * 4096


def test_a_part_of_a_new_cluster_is_filled_with_what_is_below() -> None:
    below = pattern(10 * KIB, 5)
    storage = memory_qcow(16 * KIB, backing_file="base", cluster_size=4096)
    disk = open_disk(storage, backing=raw_node(below))
    model = bytearray(below.ljust(16 * KIB, b"\0"))
    for offset, length in ((100, 50), (5000, 4000), (10 * KIB - 10, 20)):
        disk.pwrite(b"\xee" * length, offset)
        model[offset : offset + length] = b"\xee" * length
    assert disk.pread(16 * KIB, 0) == model
    disk.close()
    assert check_sound(storage.content).read(below) == model


def test_the_short_cuts_tell_only_what_is_certain() -> None:
    storage = memory_qcow(4 * MIB)
    disk = open_disk(storage)
    node = disk.node
    assert node.locate(0, 512) == node.locate_write(0, 512) == -1
    disk.pwrite(b"a" * 4096, 0)
    assert node.locate(0, 4096) == node.locate_write(0, 4096) == 8192
    assert node.locate(10, 20) == 8192 + 10
    assert node.locate(10, 4096) == -1  # leaves the cluster
    packed = deflater("zlib")(b"p" * 4096)
    disk.write_packed(packed, 4096)
    assert node.locate(4096, 512) == node.locate_write(4096, 512) == -1
    disk.close()
    again = open_disk(storage)
    assert again.pread(1, 0) == b"a"  # loads the table, which was not looked through for writing
    assert again.node.locate(0, 4096) == 8192
    assert again.node.locate_write(0, 4096) == -1


def test_packed_clusters_lie_close_together_and_may_be_overwritten() -> None:
    storage = memory_qcow(64 * KIB)
    disk = open_disk(storage)
    model = bytearray(64 * KIB)
    deflate = deflater("zlib")
    for number in range(8):
        content = bytes([number + 1]) * 4096
        disk.write_packed(deflate(content), number * 4096)
        model[number * 4096 : number * 4096 + 4096] = content
    extents = [e for e in disk.map() if e.kind == COMPRESSED]
    assert [e.length for e in extents] == [4096] * 8
    for before, after in pairwise(extents):
        assert before.host + before.packed == after.host
    disk.pwrite(b"z" * 10, 4096 + 7)  # the whole cluster moves to a plain one
    model[4096 + 7 : 4096 + 17] = b"z" * 10
    assert disk.pread(64 * KIB, 0) == model
    disk.close()
    assert check_sound(storage.content).read() == model


def test_packed_clusters_are_refused_where_they_cannot_be() -> None:
    disk = open_disk(memory_qcow(64 * KIB))
    with pytest.raises(UnsupportedOperationError, match="smaller than a cluster"):
        disk.write_packed(b"x" * 4096, 0)
    with pytest.raises(UsageError):
        disk.write_packed(b"x", 512)
    assert kinds(disk) == [(0, 64 * KIB, UNALLOCATED)]


def test_zeroing_allocates_only_where_something_would_show_through() -> None:
    disk = open_disk(memory_qcow(64 * KIB))
    disk.pwrite(b"a" * 8192, 8192)
    disk.write_zeroes(0, 64 * KIB)
    assert disk.pread(64 * KIB, 0) == bytes(64 * KIB)
    assert [e.kind for e in disk.map()] == [UNALLOCATED, DATA, UNALLOCATED]

    storage = memory_qcow(64 * KIB, backing_file="base", cluster_size=4096)
    over = open_disk(storage, backing=raw_node(b"\xff" * 20 * KIB))
    over.write_zeroes(4096, 60 * KIB)
    assert over.pread(64 * KIB, 0) == b"\xff" * 4096 + bytes(60 * KIB)
    assert [(e.start, e.length, e.kind, e.depth) for e in over.map()] == [
        (0, 4096, DATA, 1),
        (4096, 16 * KIB, DATA, 0),
        (20 * KIB, 44 * KIB, UNALLOCATED, 0),
    ]
    assert len(storage.content) == 4096 + 8 * 4096  # the L2 table; zeros in new clusters were not written
    over.close()
    assert len(storage.content) == 4096 + 8 * 4096 + 16 * KIB  # but are there when the tables name them
    check_sound(storage.content)


def test_zeroing_and_discarding_make_holes(tmp_path: Path) -> None:
    path = make_qcow(tmp_path / "x.qcow", 8 * MIB, cluster_size=65536)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"a" * 8 * MIB, 0)
        disk.flush()
        full = disk.node.file.allocated()
        disk.write_zeroes(0, 2 * MIB)
        disk.discard(4 * MIB + 1, 2 * MIB)  # whole clusters only
        assert disk.pread(2 * MIB, 0) == bytes(2 * MIB)
        assert disk.pread(65536, 4 * MIB) == b"a" * 65536
        assert disk.pread(65536, 4 * MIB + 65536) == bytes(65536)
        disk.flush()
        assert disk.node.file.allocated() <= full - 3 * MIB
        assert {e.kind for e in disk.map()} == {DATA}  # nothing below can come to light
    check_sound(path.read_bytes())


def test_discard_over_a_backing_file_never_shows_it() -> None:
    storage = memory_qcow(16 * KIB, backing_file="base")
    disk = open_disk(storage, backing=raw_node(b"\xff" * 16 * KIB))
    disk.pwrite(b"a" * 4096, 0)
    disk.discard(0, 16 * KIB)
    assert disk.pread(16 * KIB, 0) == bytes(4096) + b"\xff" * 12 * KIB


class FailingStorage(MemoryStorage):
    """Runs out of space at write number `fail_at`."""

    fail_at = -1
    writes = 0

    async def write(self, buffer: Any, offset: int) -> None:
        self.writes += 1
        if self.writes == self.fail_at:
            raise NoSpaceError("cannot write: no space left", path=self.name, errno=28)
        await super().write(buffer, offset)


def test_a_write_that_fails_leaves_no_space_behind() -> None:
    template = memory_qcow(4 * MIB).content
    for fail_at in (1, 2):  # the new L2 table; the data
        storage = FailingStorage(BLOCKING, template)
        disk = open_disk(storage)
        disk.pwrite(b"a" * 4096, 0)
        storage.fail_at = storage.writes + fail_at
        with pytest.raises(NoSpaceError):
            disk.pwrite(b"b" * 100, 3 * MIB)
        assert disk.pread(4096, 3 * MIB) == bytes(4096)
        disk.pwrite(b"c" * 100, 3 * MIB)
        assert disk.pread(4096, 3 * MIB) == b"c" * 100 + bytes(3996)
        disk.close()
        assert len(storage.content) == 5 * 4096  # header, two tables, two clusters
        check_sound(storage.content)


def test_resize(tmp_path: Path) -> None:
    below = b"\xff" * 6 * MIB
    storage = memory_qcow(3 * MIB, backing_file="base")
    disk = open_disk(storage, backing=raw_node(below))
    assert disk.pread(512, 3 * MIB - 512) == b"\xff" * 512
    disk.pwrite(b"a" * 4096, 3 * MIB - 4096)
    disk.resize(5 * MIB)  # needs a longer L1 table; what is below must not come to light
    assert disk.pread(2 * MIB, 3 * MIB) == bytes(2 * MIB)
    disk.resize(MIB)
    disk.resize(4 * MIB)
    model = b"\xff" * MIB + bytes(3 * MIB)
    assert disk.pread(4 * MIB, 0) == model
    disk.close()
    assert check_sound(storage.content).read(below) == model
    assert open_disk(storage, backing=raw_node(below)).pread(4 * MIB, 0) == model
    disk = open_disk(storage)
    for size, words in ((4 * MIB + 1, "multiple of 512"), (1 << 60, "too large")):
        with pytest.raises(UsageError, match=words):
            disk.resize(size)
    with pytest.raises(UsageError, match="preallocation"):
        disk.resize(5 * MIB, preallocation="full")


def test_another_backing_file_is_named_in_one_step() -> None:
    storage = memory_qcow(MIB, backing_file="base")
    disk = open_disk(storage)
    disk.pwrite(b"a", 0)
    node = disk.node
    assert isinstance(node, QcowNode)
    drive(node.set_backing("a much longer name/of a file.raw", "raw"))
    disk.pwrite(b"b", MIB - 1)
    disk.close()
    check_sound(storage.content)
    again = open_disk(storage)
    assert isinstance(again.node, QcowNode)
    assert again.node.backing_name == "a much longer name/of a file.raw"
    assert again.pread(1, 0) + again.pread(1, MIB - 1) == b"ab"
    drive(again.node.set_backing(""))
    again.close()
    assert open_disk(storage).node.backing_name == ""
    with pytest.raises(UsageError, match="longer than 1023"):
        drive(again.node.set_backing("x" * 1024))


def test_a_device_is_filled_to_its_end() -> None:
    class Device(MemoryStorage):
        fixed_size = True

        def _reach(self, end: int, offset: int) -> None:
            if end > len(self.content):
                raise NoSpaceError("cannot write past the end of the device", path=self.name, errno=28)

    device = Device(BLOCKING, b"\xaa" * 64 * KIB)  # old content
    drive(write_empty(device, QcowOptions(MIB).header()))
    disk = open_disk(device)
    assert disk.pread(MIB, 0) == bytes(MIB)
    disk.pwrite(b"a" * 100, 10)
    disk.close()
    disk = open_disk(device)  # the end of what is used is found by looking at all tables
    disk.pwrite(b"b" * 4096, 4096)
    assert disk.pread(12288, 0) == bytes(10) + b"a" * 100 + bytes(4096 - 110) + b"b" * 4096 + bytes(4096)
    with pytest.raises(NoSpaceError, match="device is full"):
        disk.pwrite(b"c" * 60 * KIB, 64 * KIB)
    disk.pwrite(b"d" * 12 * 4096, 64 * KIB)
    with pytest.raises(NoSpaceError, match="device is full"):
        disk.pwrite(b"e", 512 * KIB)
    disk.close()
    reader = check_sound(device.content)
    assert reader.read()[64 * KIB : 64 * KIB + 12 * 4096] == b"d" * 12 * 4096


def test_threads_that_share_clusters(tmp_path: Path) -> None:
    path = make_qcow(tmp_path / "x.qcow", 2 * MIB, cluster_size=65536)
    stripe, threads = 3000, 4
    model = bytearray(2 * MIB)
    errors: list[BaseException] = []
    with enban.open(path, writable=True, cache="unsafe") as disk:

        def work(mine: int) -> None:
            try:
                for number in range(mine, len(model) // stripe, threads):
                    data = bytes([mine + 1]) * stripe
                    disk.pwrite(data, number * stripe)
                    model[number * stripe : (number + 1) * stripe] = data
                    if number % 50 == mine:
                        disk.flush()
                    assert disk.pread(stripe, number * stripe) == data
            except BaseException as error:
                errors.append(error)

        running = [threading.Thread(target=work, args=(mine,)) for mine in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert not errors
        assert disk.pread(len(model), 0) == model
    assert check_sound(path.read_bytes()).read() == model


# -- damaged and hostile images --------------------------------------------------------------


def image_with_data() -> MemoryStorage:
    """L1 at 48, L2 table at 4096, guest clusters 0, 1 at 8192, 12288; 2 packed behind."""
    storage = memory_qcow(4 * MIB)
    disk = open_disk(storage)
    disk.pwrite(pattern(8192), 0)
    disk.write_packed(deflater("zlib")(b"p" * 4096), 8192)
    disk.close()
    assert entry_at(storage, 48) == 4096 and entry_at(storage, 4096) == 8192
    return storage


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (48, 1 << 40, "L2 table 0 at 0x10000000000 reaches past the end"),
        (48, (1 << 64) - 512, "past the end"),
        (48, 8, "lies over the header or the L1 table"),
        (48, 48, "lies over the header or the L1 table"),
        (4096, 1 << 40, "guest offset 0x0 points to 0x10000000000, past the end"),
        (4096, 8192 + 100, "no multiple of 512"),
        (4096, (1 << 63) - 1, "past the end"),
        (4096, 0x80C8_0000_0000_4200 | 1 << 40, "not inside the file"),
    ],
)
def test_entries_that_point_nowhere(place: int, value: int, words: str) -> None:
    storage = image_with_data()
    put(storage, place, value)
    disk = open_disk(storage)
    for _ in range(2):
        with pytest.raises(CorruptImageError, match=words) as caught:
            disk.pread(512, 0)
        assert "\n" not in str(caught.value)
    with pytest.raises(CorruptImageError):
        disk.pwrite(b"x", 0)
    disk.close()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (56, 4096, "overlaps another one"),  # two L1 entries, one table
        (56, 4096 + 512, "overlaps another one"),
        (4096, 4096, "points to metadata"),  # data over its own table
        (4096, 512, "metadata"),  # data over the L1 table (48 + 2 entries): 512 is behind it
        (4096, 7680, "points to metadata"),  # the end of the table
    ],
)
def test_no_write_goes_through_tables_that_cannot_be_right(place: int, value: int, words: str) -> None:
    storage = image_with_data()
    if value == 512:
        storage.content[40:48] = (512).to_bytes(8, "big")  # an L1 table at 512
        storage.content[512:528] = storage.content[48:64]
    put(storage, place, value)
    before = bytes(storage.content)
    disk = open_disk(storage)
    with pytest.raises(CorruptImageError, match=words):
        disk.pwrite(b"x" * 100, 0)
    with pytest.raises(CorruptImageError, match="damaged"):
        disk.pwrite(b"x" * 100, 2 * MIB)
    disk.close()
    assert storage.content == before


def test_what_was_written_before_damage_is_met_is_still_flushed() -> None:
    storage = image_with_data()
    put(storage, 4096 + 8, 1 << 40)
    put(storage, 56, 0)
    disk = open_disk(storage)
    disk.pwrite(b"good", 2 * MIB)
    with pytest.raises(CorruptImageError):
        disk.pread(1, 4096)
    with pytest.raises(CorruptImageError, match="damaged"):
        disk.pwrite(b"x", 3 * MIB)
    disk.close()
    assert open_disk(storage).pread(4, 2 * MIB) == b"good"


def test_packed_data_that_is_none() -> None:
    storage = image_with_data()
    extent = next(e for e in open_disk(storage).map() if e.kind == COMPRESSED)
    storage.content[extent.host : extent.host + extent.packed] = b"\xff" * extent.packed
    disk = open_disk(storage)
    with pytest.raises(CorruptDataError):
        disk.pread(512, 8192)
    put(storage, 4096 + 16, 1 << 63 | extent.host)  # no bytes at all
    with pytest.raises(CorruptDataError):
        open_disk(storage).pread(512, 8192)
    disk.pwrite(b"n" * 4096, 8192)  # overwriting the whole cluster needs no look at the old bytes
    assert disk.pread(4096, 8192) == b"n" * 4096
    disk.pwrite(b"o", 0)  # its tables are fine
    disk.close()


def test_an_image_that_is_its_own_table_ends() -> None:
    """An L1 table that points to itself, an L2 table full of pointers to itself."""
    storage = memory_qcow(4 * MIB)
    storage.content.extend(bytes(8192 - len(storage.content)))
    put(storage, 48, 4096)
    storage.content[4096:8192] = (4096).to_bytes(8, "big") * 512
    disk = open_disk(storage)
    assert len(disk.pread(2 * MIB, 0)) == 2 * MIB
    with pytest.raises(CorruptImageError, match="points to metadata"):
        disk.pwrite(b"x", 0)
    assert sum(e.length for e in disk.map()) == 4 * MIB


def test_a_header_that_promises_much_costs_nothing(tmp_path: Path) -> None:
    path = make_qcow(tmp_path / "x.qcow", MIB)
    with path.open("r+b") as file:
        file.seek(24)
        file.write(((1 << 63) - 1).to_bytes(8, "big"))
    with pytest.raises(CorruptImageError, match="past the end of the file"):
        enban.open(path)


@pytest.mark.parametrize("cut", range(0, 600, 7))
def test_a_file_cut_short_is_told(cut: int, tmp_path: Path) -> None:
    path = make_qcow(
        tmp_path / "x.qcow", 100 * MIB, backing_file="base.raw", cluster_size=4096, l2_entries=512
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    try:
        disk = enban.open(path, format="qcow", backing=False)
    except EnbanError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert cut >= 56 + 50 * 8  # header, name and the 50 entries of the L1 table are there
        disk.close()


def test_unaligned_l1_tables_are_read_but_not_written() -> None:
    storage = image_with_data()
    storage.content[40:48] = (52).to_bytes(8, "big")
    storage.content[52:68] = storage.content[48:64]
    disk = open_disk(storage)
    assert disk.pread(8192, 0) == pattern(8192)
    with pytest.raises(UnsupportedOperationError, match="not aligned"):
        disk.pwrite(b"x", 0)


def test_read_only() -> None:
    storage = image_with_data()
    before = bytes(storage.content)
    disk = open_disk(storage, writable=False)
    assert disk.pread(8192, 0) == pattern(8192)
    with pytest.raises(ReadOnlyError):
        disk.pwrite(b"x", 0)
    disk.close()
    assert storage.content == before


# -- creation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster_size": 256}, "cluster size 256"),
        ({"cluster_size": 131072}, "cluster size 131072"),
        ({"cluster_size": 5000}, "cluster size 5000"),
        ({"l2_entries": 32}, "L2 table length 32"),
        ({"l2_entries": 16384}, "L2 table length 16384"),
        ({"backing_file": "x" * 1024}, "longer than 1023"),
        ({"backing_file": "a\0b"}, "NUL"),
        ({"backing_fmt": "raw"}, "needs a backing file"),
        ({"encrypt_format": "luks"}, "'luks' is not known"),
        ({"encrypt_key_file": "key"}, "needs encrypt.format"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        QcowOptions(MIB, **options).header()


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="too large for clusters of 4096"):
        QcowOptions(1 << 45).header()
    with pytest.raises(UsageError):
        QcowOptions(-1024).header()
    assert QcowOptions(1 << 45, cluster_size=65536).header().size == 1 << 45


def test_warnings() -> None:
    assert QcowOptions(MIB).warnings() == []
    assert "weak" in QcowOptions(MIB, encrypt_format="aes").warnings()[0]
    assert "QEMU" in QcowOptions(0).warnings()[0]


# -- forgetting all data ---------------------------------------------------------------------


def test_an_emptied_image_shows_its_backing_file_and_gives_its_space_back() -> None:
    below = b"\xff" * MIB
    storage = memory_qcow(MIB, backing_file="base", cluster_size=4096)
    fresh = bytes(storage.content)
    disk = open_disk(storage, backing=raw_node(below))
    disk.pwrite(b"a" * 100_000, 5000)
    disk.write_packed(deflater("zlib")(b"p" * 4096), 500 * 1024)
    assert disk.pread(10, 500 * 1024) == b"p" * 10
    drive(disk.node.make_empty())
    assert storage.content == fresh
    assert disk.pread(MIB, 0) == below
    disk.write_packed(deflater("zlib")(b"q" * 4096), 500 * 1024)  # lands where the other one was
    assert disk.pread(10, 500 * 1024) == b"q" * 10
    disk.pwrite(b"b", 0)
    assert disk.pread(3, 0) == b"b\xff\xff"
    disk.close()
    assert check_sound(storage.content).read(below)[:3] == b"b\xff\xff"


def test_emptying_keeps_an_l1_table_that_has_moved() -> None:
    storage = memory_qcow(MIB)
    disk = open_disk(storage)
    disk.pwrite(b"a" * MIB, 0)
    disk.resize(20 * MIB)
    drive(disk.node.set_backing("base"))
    disk.pwrite(b"b" * MIB, 15 * MIB)
    drive(disk.node.make_empty())
    disk.pwrite(b"c", 19 * MIB)
    disk.close()
    check_sound(storage.content)
    disk = open_disk(storage)
    assert disk.node.backing_name == "base"
    assert disk.pread(20 * MIB, 0) == bytes(19 * MIB) + b"c" + bytes(MIB - 1)


def test_a_failed_emptying_stops_all_changes() -> None:
    storage = FailingStorage(BLOCKING, memory_qcow(4 * MIB, backing_file="base").content)
    disk = open_disk(storage, backing=raw_node(b"\xff" * MIB))
    disk.pwrite(b"a" * 4096, 0)
    disk.flush()
    storage.fail_at = storage.writes + 1
    with pytest.raises(NoSpaceError):
        drive(disk.node.make_empty())
    assert disk.pread(4096, 0) == b"a" * 4096
    with pytest.raises(CorruptImageError, match="not changed any more"):
        disk.pwrite(b"x", 0)
    disk.close()
    assert check_sound(storage.content).read(b"\xff" * MIB)[:5] == b"aaaaa"


def test_what_it_says_of_itself() -> None:
    assert drive(open_disk(memory_qcow(MIB)).node.describe()) == {"cluster-size": 4096, "dirty-flag": False}


@pytest.mark.parametrize("seed", range(4))
def test_runs_agree_with_extents(seed: int) -> None:
    """What lists a whole image joins packed clusters and nothing else."""
    some = random.Random(seed)
    disk = open_disk(memory_qcow(400 * KIB, cluster_size=512, l2_entries=64))
    pack = deflater("zlib")
    for _ in range(200):
        at = some.randrange(800) * 512
        if some.random() < 0.7:
            disk.write_packed(pack(bytes([some.randrange(256)]) * 512), at)
        else:
            disk.pwrite(b"x" * 512, at)
    assert disk.pread(400 * KIB, 0)
    kinds = {extent.start + step: extent for extent in disk.map() for step in range(0, extent.length, 512)}
    offset = joined = 0
    while offset < disk.size:
        found = disk.node.runs(offset, disk.size - offset)
        assert found is not None
        for start, length, kind, host in found:
            assert start == offset and length > 0
            for at in range(start, start + length, 512):
                extent = kinds[at]
                assert extent.kind == kind
                assert host == -1 or host + at - start == extent.host + at - extent.start
            joined += kind == COMPRESSED and length > 512
            offset += length
    assert offset == disk.size and joined
