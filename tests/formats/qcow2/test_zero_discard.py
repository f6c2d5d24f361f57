"""Write-zeroes and discard: what is read after them, what space they free or keep, what they leave."""

from __future__ import annotations

from typing import Any

import pytest

import enban
from enban.block.runtime import BLOCKING, drive
from enban.formats.qcow2.node import Qcow2Node
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.support import KIB, check_bytes, empty_image, open_memory, pattern, raw_node

SIZE = 256 * KIB + 512


class Bench:
    """A disk, optionally over a backing file, whose host clusters can be counted."""

    def __init__(self, backing: bytes = b"", **options: Any) -> None:
        self.backing = backing
        self.cluster = options.setdefault("cluster_size", 16 * KIB)
        if backing:
            options["backing_file"] = "b"
        self.memory = MemoryStorage(BLOCKING, empty_image(SIZE, **options))
        self.disk = enban.Disk(
            drive(open_memory(self.memory, backing=raw_node(backing) if backing else None))
        )

    def used(self) -> int:
        """Clusters counted, after everything pending has been settled."""
        for _ in range(2):
            self.disk.flush()
        node = self.disk.node
        assert isinstance(node, Qcow2Node)
        return sum(
            1 for c in range(len(self.memory.content) // self.cluster + 1) if drive(node.refcounts.get(c))
        )

    def close(self) -> bytes:
        self.disk.close()
        check_bytes(self.memory.content)
        return Qcow2Reader(self.memory.content).read(backing=self.backing)


VERSIONS: list[dict[str, Any]] = [{}, {"compat": "0.10"}, {"extended_l2": True}, {"cluster_size": 512}]


@pytest.mark.parametrize("unmap", [True, False])
@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("options", VERSIONS, ids=str)
def test_zeroes_over_a_backing_file_hide_it(options: dict[str, Any], longer: bool, unmap: bool) -> None:
    """At every alignment: inside a cluster, across, whole, and to the end of the disk."""
    backing = pattern(SIZE + 4 * KIB if longer else SIZE // 2 + 700)
    bench = Bench(backing, **dict(options))
    model = bytearray(backing[:SIZE].ljust(SIZE, b"\0"))
    for number, (offset, length) in enumerate(
        (
            (100, 200),
            (16 * KIB, 16 * KIB),
            (40 * KIB + 1, 30 * KIB),
            (SIZE - 512, 512),
            (SIZE - 20 * KIB, 20 * KIB),
        )
    ):
        if number % 2:
            start = max(0, offset - 4000)
            bench.disk.pwrite(b"\xdd" * 4500, start)
            model[start : start + 4500] = b"\xdd" * 4500
        bench.disk.write_zeroes(offset, length, unmap=unmap)
        model[offset : offset + length] = bytes(length)
        assert bench.disk.pread(SIZE, 0) == model
        bench.disk.pwrite(b"\xcc", offset + length // 2)  # a partial write keeps the zeros around it
        model[offset + length // 2] = 0xCC
        assert bench.disk.pread(SIZE, 0) == model
    assert bench.close() == model


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}])
def test_unmap_frees_and_no_unmap_keeps(options: dict[str, Any]) -> None:
    for over_backing in (b"", pattern(SIZE)):
        bench = Bench(over_backing, **dict(options))
        bench.disk.pwrite(b"x" * 128 * KIB, 0)
        full = bench.used()
        bench.disk.write_zeroes(0, 64 * KIB, unmap=False)
        assert bench.used() == full
        hosts = [e.host for e in bench.disk.map(0, 16 * KIB)]
        bench.disk.pwrite(b"y" * 100, 10)  # the kept cluster is put to use: no new one
        assert bench.used() == full
        assert [e.host for e in bench.disk.map(0, 16 * KIB)][:1] == hosts[:1]
        bench.disk.write_zeroes(64 * KIB, 64 * KIB, unmap=True)
        assert bench.used() == full - 4
        bench.disk.write_zeroes(0, 64 * KIB, unmap=True)
        assert bench.used() == full - 8
        bench.close()


def test_zeroes_where_nothing_is_take_no_space() -> None:
    bench = Bench()
    before = bench.used()
    bench.disk.write_zeroes(0, SIZE)
    bench.disk.write_zeroes(1000, 5000)
    bench.disk.discard(0, SIZE)
    assert bench.used() == before
    bench.close()


@pytest.mark.parametrize("options", VERSIONS, ids=str)
def test_discard_gives_zeros_or_nothing_never_the_backing_file(options: dict[str, Any]) -> None:
    backing = pattern(SIZE, 7)
    bench = Bench(backing, **dict(options))
    bench.disk.pwrite(b"x" * 100 * KIB, 0)
    before = bytearray(bench.disk.pread(SIZE, 0))
    bench.disk.discard(5000, 60 * KIB)
    after = bench.disk.pread(SIZE, 0)
    grain = bench.disk.node.grain
    for at in range(0, SIZE, 512):
        first = at - at % grain
        gone = first >= 5000 and first + grain <= 5000 + 60 * KIB
        if options.get("compat") == "0.10":
            gone = False  # there nothing can say zero: what was, stays
        assert after[at : at + 512] == (bytes(512) if gone else before[at : at + 512]), f"{at:#x}"
    assert bench.close() == after


def test_discard_frees_whole_clusters_and_leaves_edges() -> None:
    bench = Bench()
    bench.disk.pwrite(b"x" * 128 * KIB, 0)
    full = bench.used()
    bench.disk.discard(1, 16 * KIB - 1)
    bench.disk.discard(0, 16 * KIB - 1)
    assert bench.used() == full and bench.disk.pread(16 * KIB, 0) == b"x" * 16 * KIB
    bench.disk.discard(16 * KIB - 1, 32 * KIB + 2)
    assert bench.used() == full - 2
    bench.disk.pwrite(b"t" * 512, SIZE - 512)
    grown = bench.used()
    bench.disk.discard(256 * KIB, 512)  # the last cluster, as far as the disk goes: whole enough
    assert bench.used() == grown - 1
    bench.close()


def test_a_freed_cluster_waits_for_its_unlinking_to_be_durable() -> None:
    bench = Bench(cluster_size=512)
    bench.disk.pwrite(b"old" * 1000, 0)
    bench.disk.flush()
    hosts = {e.host + at for e in bench.disk.map(0, 3000) for at in range(0, e.length, 512)}
    bench.disk.discard(0, 3072)
    bench.disk.pwrite(b"new" * 1000, 64 * KIB)  # without a flush between
    again = {e.host + at for e in bench.disk.map(64 * KIB, 3000) for at in range(0, e.length, 512)}
    assert not hosts & again
    bench.disk.flush()
    bench.disk.pwrite(b"now" * 1000, 128 * KIB)
    assert hosts & {e.host + at for e in bench.disk.map(128 * KIB, 3000) for at in range(0, e.length, 512)}
    bench.close()


def test_options_that_name_the_backing_file_count_as_one() -> None:
    """The header names none; the caller stacks one below. Discards must not show it."""
    backing = pattern(SIZE)
    memory = MemoryStorage(BLOCKING, empty_image(SIZE, cluster_size=4096))
    disk = enban.Disk(drive(open_memory(memory, backing=raw_node(backing))))
    disk.pwrite(b"x" * 8192, 0)
    disk.discard(0, 4096)
    disk.write_zeroes(16384, 4096)
    assert disk.pread(8192, 0) == bytes(4096) + b"x" * 4096
    assert disk.pread(4096, 16384) == bytes(4096)
    disk.pwrite(b"y" * 10, 20 * KIB + 100)
    assert (
        disk.pread(4096, 20 * KIB) == backing[20 * KIB :][:100] + b"y" * 10 + backing[20 * KIB + 110 :][:3986]
    )
    disk.close()
    check_bytes(memory.content)


def test_a_part_of_a_compressed_cluster() -> None:
    from enban.block.codec import deflater

    cases: list[dict[str, Any]] = [{}, {"extended_l2": True}]
    for options in cases:
        bench = Bench(**options)
        content = pattern(4096) + b"z" * 12288
        drive(bench.disk.door.write_packed(deflater("zlib")(content), 0))
        bench.disk.discard(0, 8192)
        assert bench.disk.pread(16384, 0) == content
        bench.disk.write_zeroes(4096, 2048)
        assert bench.disk.pread(16384, 0) == content[:4096] + bytes(2048) + content[6144:]
        bench.disk.write_zeroes(0, 16384)
        assert bench.disk.pread(16384, 0) == bytes(16384)
        assert bench.close() == bytes(SIZE)
