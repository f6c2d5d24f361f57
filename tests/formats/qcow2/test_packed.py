"""Compressed clusters: reading, overwriting in whole and in part, sharing host clusters, and bad data."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

import enban
from enban.block.codec import deflater
from enban.block.runtime import BLOCKING, drive
from enban.errors import CorruptDataError, EnbanError, OutOfRangeError, UnsupportedOperationError
from enban.extent import COMPRESSED
from enban.formats.qcow2.node import Qcow2Node
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.support import KIB, check_bytes, empty_image, open_memory, pattern, raw_node

CASES: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 4096},
    {"cluster_size": 65536},
    {"cluster_size": 4096, "compression_type": "zstd"},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 512, "refcount_bits": 2},
]


def make(size: int, backing: bytes = b"", **options: Any) -> tuple[enban.Disk, MemoryStorage]:
    memory = MemoryStorage(BLOCKING, empty_image(size, **options))
    return enban.Disk(drive(open_memory(memory, backing=raw_node(backing) if backing else None))), memory


def pack(disk: enban.Disk, at: int, content: bytes) -> None:
    drive(disk.door.write_packed(deflater(disk.node.codec)(content), at))


def text(length: int, seed: int) -> bytes:
    """Packs to less than its length, each time to another one."""
    return (pattern(length // 4 + seed % 7 * 8, seed) + b"-" * length)[:length]


def finish(disk: enban.Disk, memory: MemoryStorage, model: bytes | bytearray, backing: bytes = b"") -> None:
    assert disk.pread(len(model), 0) == model
    disk.close()
    check_bytes(memory.content)
    assert Qcow2Reader(memory.content).read(backing=backing) == model


@pytest.mark.parametrize("options", CASES, ids=str)
def test_written_read_and_written_over(options: dict[str, Any]) -> None:
    cluster = options["cluster_size"]
    backing = pattern(30 * cluster, 99)
    disk, memory = make(40 * cluster + 512, backing, **options)
    model = bytearray(backing.ljust(40 * cluster + 512, b"\0"))
    for number in range(40):
        content = text(cluster, number + 1)
        pack(disk, number * cluster, content)
        model[number * cluster : (number + 1) * cluster] = content
    node = disk.node
    assert isinstance(node, Qcow2Node)
    assert {e.kind for e in disk.map(0, 40 * cluster)} == {COMPRESSED}
    for at, length in ((0, 1), (cluster - 1, 2), (3 * cluster // 2, 5 * cluster), (7 * cluster + 9, 100)):
        assert disk.pread(length, at) == model[at : at + length]
    for number in (0, 5, 6, 7, 30):  # whole, packed again
        content = text(cluster, number + 500)
        pack(disk, number * cluster, content)
        model[number * cluster : (number + 1) * cluster] = content
    for at, length in (
        (8 * cluster, cluster),
        (10 * cluster + 17, 5),
        (12 * cluster - 100, 200),
        (15 * cluster, 3 * cluster),
    ):
        data = pattern(length, at + 1)  # plain, whole and in part
        disk.pwrite(data, at)
        model[at : at + length] = data
    disk.flush()
    disk.write_zeroes(20 * cluster + 3, cluster)
    model[20 * cluster + 3 : 21 * cluster + 3] = bytes(cluster)
    disk.discard(25 * cluster, 2 * cluster)
    model[25 * cluster : 27 * cluster] = disk.pread(2 * cluster, 25 * cluster)
    if options.get("compat") != "0.10":
        assert not any(model[25 * cluster : 27 * cluster])
    finish(disk, memory, model, backing)


def test_packed_clusters_share_host_clusters_and_each_is_counted() -> None:
    disk, memory = make(64 * KIB, cluster_size=4096)
    for number in range(10):
        pack(disk, number * 4096, text(4096, 5))
    disk.flush()
    hosts = [e.host for e in disk.map(0, 40960)]
    assert len({host // 4096 for host in hosts}) < 8, "every packed cluster has a host cluster of its own"
    node = disk.node
    assert isinstance(node, Qcow2Node)
    counts = [drive(node.refcounts.get(cluster)) for cluster in {host // 4096 for host in hosts}]
    assert max(counts) > 1
    disk.write_zeroes(0, 40960)
    for _ in range(2):
        disk.flush()
    assert all(drive(node.refcounts.get(host // 4096)) == 0 for host in hosts)
    finish(disk, memory, bytes(64 * KIB))


def test_space_of_packed_clusters_is_used_again() -> None:
    disk, memory = make(64 * KIB, cluster_size=512)
    sizes = []
    for turn in range(40):
        for number in range(20):
            pack(disk, number * 512, text(512, turn * 20 + number + 1))
        disk.flush()
        sizes.append(len(memory.content))
    assert sizes[-1] <= sizes[8] + 4 * KIB, sizes
    finish(disk, memory, disk.pread(64 * KIB, 0))


def test_a_cache_of_unpacked_clusters_never_outlives_them() -> None:
    """Read (which keeps the unpacked cluster), free, use the same host place for other data, read."""
    disk, memory = make(64 * KIB, cluster_size=4096)
    seen = set()
    for turn in range(60):
        content = text(4096, turn + 1)
        pack(disk, 0, content)
        assert disk.pread(10, 100) == content[100:110]
        assert disk.pread(10, 4000) == content[4000:4010]
        seen.add(next(iter(disk.map(0, 1))).host)
        disk.flush()
        disk.flush()
    assert len(seen) < 60, "no place was used twice: nothing was proved"
    finish(disk, memory, content.ljust(64 * KIB, b"\0"))


def test_what_cannot_be_stored_packed() -> None:
    disk, memory = make(64 * KIB + 512, cluster_size=4096)
    for length in (0, 4096, 5000):
        with pytest.raises(UnsupportedOperationError):
            drive(disk.door.write_packed(b"x" * length, 0))
    with pytest.raises(OutOfRangeError):
        drive(disk.door.write_packed(b"x", 68 * KIB))
    assert disk.door.ledger.in_flight == []
    pack(disk, 64 * KIB, text(4096, 3))  # the last cluster, of which 512 bytes are on the disk
    assert disk.pread(512, 64 * KIB) == text(4096, 3)[:512]
    finish(disk, memory, bytes(64 * KIB) + text(4096, 3)[:512])
    external = MemoryStorage(BLOCKING, empty_image(64 * KIB, cluster_size=4096, data_file="d"))
    disk = enban.Disk(drive(open_memory(external, data=MemoryStorage(BLOCKING))))
    with pytest.raises(UnsupportedOperationError):
        drive(disk.door.write_packed(b"x" * 10, 0))
    disk.close()


BROKEN = {
    "noise": b"\xff" * 100,
    "empty": b"\0" * 100,
    "short": (lambda p: p.compress(b"x" * 100) + p.flush())(zlib.compressobj(9, zlib.DEFLATED, -12)),
    "cut": (lambda p: p.compress(pattern(4096)) + p.flush())(zlib.compressobj(9, zlib.DEFLATED, -12))[:700],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_packed_data_is_an_error_of_the_data_and_of_nothing_else(name: str) -> None:
    disk, memory = make(64 * KIB, cluster_size=4096)
    pack(disk, 0, text(4096, 1))
    drive(disk.door.write_packed(BROKEN[name], 4096))
    pack(disk, 8192, text(4096, 2))
    disk.flush()
    for length, at in ((1, 4096), (8192, 0), (100, 5000)):
        with pytest.raises(CorruptDataError) as info:
            disk.pread(length, at)
        assert "\n" not in str(info.value) and info.value.offset is not None
    with pytest.raises(CorruptDataError):
        disk.pwrite(b"part", 4100)  # needs the rest of the cluster
    assert disk.pread(4096, 0) == text(4096, 1) and disk.pread(4096, 8192) == text(4096, 2)
    assert not memory.content[79] & 2, "lost data is no damage of the tables"
    disk.pwrite(b"whole" * 1000, 4096 - 452)  # a whole cluster over it heals it
    assert disk.pread(4096, 4096)[:4] == (b"whole" * 1000)[452:456]
    finish(disk, memory, disk.pread(64 * KIB, 0))


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_a_bomb_is_cut_at_one_cluster(codec: str) -> None:
    """A megabyte of packed zeros in a few bytes: never unpacked beyond the cluster."""
    disk, _ = make(256 * KIB, cluster_size=16384, compression_type=codec)
    bomb = deflater(codec)(bytes(32 << 20)) if codec == "zstd" else zlib.compress(bytes(12 << 20), 9)[2:]
    bomb = bomb[:16000]
    drive(disk.door.write_packed(bomb, 0))
    try:
        assert disk.pread(16384, 0) == bytes(16384)
    except EnbanError as error:
        assert isinstance(error, CorruptDataError)
    disk.close()


def test_a_window_larger_than_the_rule_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old writers used windows of 32 KiB."""
    disk, memory = make(256 * KIB, cluster_size=65536)
    content = pattern(30 * KIB) * 3
    content = content[:65536]
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    drive(disk.door.write_packed(stream.compress(content) + stream.flush(), 0))
    assert disk.pread(65536, 0) == content
    disk.close()
    check_bytes(memory.content)
