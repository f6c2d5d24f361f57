"""Images made to hurt: broken or lying headers, tables, streams and chains.

Whatever an image says, using it ends in data or in one EnbanError of one line that names the
file: no other exception, no hang (every test has an alarm), no memory in proportion to a
number the image states.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

import enban
from enban.block.codec import deflater
from enban.block.disk import Disk
from enban.block.gate import SIBLINGS, TRUSTED, Gate
from enban.block.runtime import BLOCKING, drive
from enban.errors import (
    CorruptDataError,
    CorruptImageError,
    EnbanError,
    GateError,
    HostError,
    ImageError,
    UnsupportedFeatureError,
    UsageError,
)
from enban.lab.damage import COMPRESSED, COPIED, Map
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.cli.command import command, environment, process, refused
from tests.cli.command import enban as cli
from tests.support import KIB, MIB, check_bytes, empty_image, make_qcow2, open_memory, pattern

SECONDS = 10  # more than any case may take
MOST_MEMORY = 64 * MIB
CLUSTER = 4 * KIB
SIZE = 256 * KIB


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A test that hangs fails."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still running after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def vet(error: EnbanError, name: str) -> str:
    """The error's text: one line that names the file."""
    text = str(error)
    assert len(text.splitlines()) == 1 and text.isprintable(), repr(text)
    assert name in text, text
    return text


def fails(act: Callable[[], object], kind: type[EnbanError], words: str, name: str) -> str:
    """Run something that must fail with one error of a kind, within bounded memory."""
    tracemalloc.start()
    try:
        with pytest.raises(kind) as caught:
            act()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = vet(caught.value, name)
    assert words in text, text
    assert peak < MOST_MEMORY, f"{peak} bytes for: {text}"
    return text


def use(path: Path, *, writable: bool = False, gate: Gate = SIBLINGS, format: str = "qcow2") -> None:
    """Open an image and read it (its first 16 MiB); with `writable` write, flush."""
    with enban.open(path, writable=writable, gate=gate, format=format) as disk:
        for offset in range(0, min(disk.size, 16 * MIB), MIB):
            disk.pread(min(MIB, disk.size - offset), offset)
        if writable:
            disk.pwrite(b"x" * 512, 0)
            disk.flush()


def used_image(**options: object) -> bytearray:
    """A small image with data in clusters 0..3 and 20, zeroes in 30, the rest not allocated."""
    content = empty_image(SIZE, **{"cluster_size": CLUSTER, **options})
    storage = MemoryStorage(BLOCKING, content)
    disk = Disk(drive(open_memory(storage)))
    disk.pwrite(pattern(4 * CLUSTER), 0)
    disk.pwrite(pattern(CLUSTER, 2), 20 * CLUSTER)
    if options.get("compat") != "0.10":
        disk.write_zeroes(30 * CLUSTER, CLUSTER)
    disk.close()
    return storage.content


def put(image: bytearray, offset: int, form: str, value: int) -> None:
    struct.pack_into(">" + form, image, offset, value)


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def named(image: bytearray, name: bytes) -> bytearray:
    """The image with a backing file's name, at the end of the header's cluster."""
    place = 2048
    image[place : place + len(name)] = name
    put(image, 8, "Q", place)
    put(image, 16, "I", len(name))
    return image


# -- the header ------------------------------------------------------------------------------

# What is written where, the error, and words of its message.
HEADERS: dict[str, tuple[list[tuple[int, str, int]], type[EnbanError], str]] = {
    "magic": ([(0, "I", 0)], CorruptImageError, "not a qcow2 image"),
    "version-0": ([(4, "I", 0)], UnsupportedFeatureError, "version 0"),
    "version-4": ([(4, "I", 4)], UnsupportedFeatureError, "version 4"),
    "cluster-bits-0": ([(20, "I", 0)], CorruptImageError, "cluster size"),
    "cluster-bits-8": ([(20, "I", 8)], CorruptImageError, "cluster size"),
    "cluster-bits-22": ([(20, "I", 22)], CorruptImageError, "cluster size"),
    "cluster-bits-huge": ([(20, "I", 0xFFFFFFFF)], CorruptImageError, "cluster size"),
    "size-huge": ([(24, "Q", 0xFFFFFFFFFFFFFFFF)], CorruptImageError, "virtual size"),
    "size-past-l1": ([(24, "Q", 1 << 50)], CorruptImageError, "too small"),
    "crypt-method": ([(32, "I", 7)], UnsupportedFeatureError, "encryption method 7"),
    "crypt-aes": ([(32, "I", 1)], UnsupportedFeatureError, "encrypted"),
    "l1-none": ([(36, "I", 0)], CorruptImageError, "too small"),
    "l1-giant": ([(36, "I", 0xFFFFFFFF)], CorruptImageError, "larger than 32 MiB"),
    "l1-largest": ([(36, "I", 4 << 20)], CorruptImageError, "past the end"),
    "l1-past-end": ([(40, "Q", 1 << 40)], CorruptImageError, "past the end"),
    "l1-unaligned": ([(40, "Q", CLUSTER + 512)], CorruptImageError, "L1 table"),
    "l1-on-header": ([(40, "Q", 0)], CorruptImageError, "L1 table"),
    "l1-above-2^56": ([(40, "Q", 1 << 60)], CorruptImageError, "L1 table"),
    "reftable-giant": ([(56, "I", 0xFFFFFFFF)], CorruptImageError, "refcount table"),
    "reftable-none": ([(56, "I", 0)], CorruptImageError, "no refcount table"),
    "reftable-on-header": ([(48, "Q", 0)], CorruptImageError, "refcount table"),
    "reftable-unaligned": ([(48, "Q", CLUSTER + 8)], CorruptImageError, "refcount table"),
    "snapshots-giant": (
        [(60, "I", 0xFFFFFFFF), (64, "Q", CLUSTER)],
        CorruptImageError,
        "snapshots are more",
    ),
    "snapshots-unaligned": ([(60, "I", 1), (64, "Q", 77)], CorruptImageError, "snapshot table"),
    "refcount-order": ([(96, "I", 7)], CorruptImageError, "refcount width"),
    "refcount-order-huge": ([(96, "I", 0xFFFFFFFF)], CorruptImageError, "refcount width"),
    "header-length-0": ([(100, "I", 0)], CorruptImageError, "header length"),
    "header-length-odd": ([(100, "I", 109)], CorruptImageError, "header length"),
    "header-length-giant": ([(100, "I", 0xFFFFFFF8)], CorruptImageError, "header length"),
    "compression": ([(79, "B", 8), (104, "B", 9)], UnsupportedFeatureError, "compression type 9"),
    "compression-no-bit": ([(104, "B", 1)], CorruptImageError, "feature bit"),
    "extended-small": ([(79, "B", 16)], CorruptImageError, "extended L2"),
    "extension-giant": ([(112, "I", 0x12345678), (116, "I", 0xFFFFFFF0)], CorruptImageError, "extension"),
    "name-giant": ([(8, "Q", 2048), (16, "I", 0xFFFFFFFF)], CorruptImageError, "1023"),
    "name-past-end": ([(8, "Q", 1 << 62), (16, "I", 10)], CorruptImageError, "outside the header"),
    "corrupt-bit": ([(79, "B", 2)], CorruptImageError, "marked corrupt"),
    "no-data-file": ([(79, "B", 4), (112, "I", 0)], ImageError, "data file"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path: Path, case: str) -> None:
    changes, kind, words = HEADERS[case]
    image = used_image()
    for offset, form, value in changes:
        put(image, offset, form, value)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    fails(lambda: use(path, writable=True), kind, words, str(path))
    assert path.read_bytes() == image


@pytest.mark.parametrize("change", [(48, "Q", 1 << 50), (56, "I", 2048), (60, "I", 65536)])
def test_what_reading_does_not_need_may_lie(tmp_path: Path, change: tuple[int, str, int]) -> None:
    """A lost refcount or snapshot table refuses writing; the data can still be read."""
    image = used_image()
    put(image, 64, "Q", CLUSTER)
    put(image, *change)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    fails(lambda: use(path, writable=True), CorruptImageError, "table", str(path))
    with enban.open(path) as disk:
        assert disk.pread(4 * CLUSTER, 0) == pattern(4 * CLUSTER)
    assert path.read_bytes() == image


def test_every_truncation(tmp_path: Path) -> None:
    image = used_image()
    path = tmp_path / "disk.qcow2"
    kept = [*range(0, 120, 7), 104, 111, 112, 512, *range(CLUSTER, len(image), CLUSTER), len(image) - 1]
    for length in kept:
        path.write_bytes(image[:length])
        try:
            use(path)
        except ImageError as error:
            vet(error, str(path))
        else:
            assert length > CLUSTER, length


def test_every_bit_of_the_header(tmp_path: Path) -> None:
    image = used_image()
    for bit in range(112 * 8):
        mutant = bytearray(image)
        mutant[bit // 8] ^= 1 << bit % 8
        attack(mutant, f"bit {bit}")


def test_an_unknown_feature_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = used_image()
    put(image, 72, "Q", 1 << 40 | 1 << 41)
    table = bytes((0, 40)) + b"turbo".ljust(46, b"\0") + bytes((1, 41)) + b"of another kind".ljust(46, b"\0")
    tail = extension(0x6803F857, table) + bytes(8)
    image[112 : 112 + len(tail)] = tail
    path.write_bytes(image)
    text = fails(lambda: use(path), UnsupportedFeatureError, "feature 'turbo' (bit 40)", str(path))
    assert "unnamed feature (bit 41)" in text and "another kind" not in text


def test_a_feature_name_cannot_forge_lines(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = used_image()
    put(image, 72, "Q", 1 << 40)
    tail = extension(0x6803F857, bytes((0, 40)) + b"a\nenban: all is well\x1b[2J".ljust(46, b"\0")) + bytes(8)
    image[112 : 112 + len(tail)] = tail
    path.write_bytes(image)
    fails(lambda: use(path), UnsupportedFeatureError, "bit 40", str(path))


@pytest.mark.parametrize("flaw", ["count", "extra", "name", "l1-entries", "l1-unaligned"])
def test_snapshot_tables_that_lie(tmp_path: Path, flaw: str) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", SIZE, cluster_size=CLUSTER)
    with enban.open(path, writable=True) as disk:
        disk.create_snapshot("one")
    image = bytearray(path.read_bytes())
    (at,) = struct.unpack_from(">Q", image, 64)
    change = {
        "count": (60, "I", 65536),
        "extra": (at + 36, "I", 0xFFFFFFFF),
        "name": (at + 14, "H", 0xFFFF),
        "l1-entries": (at + 8, "I", 0xFFFFFFFF),
        "l1-unaligned": (at, "Q", CLUSTER + 1),
    }[flaw]
    put(image, *change)
    path.write_bytes(image)
    fails(lambda: use(path, writable=True), CorruptImageError, "snapshot", str(path))
    use(path)  # the active state does not need them


def test_many_snapshots_with_giant_tables_that_are_not_there(tmp_path: Path) -> None:
    """Each says its L1 table has 32 MiB, in clusters of 512 bytes; 40 bytes of file a snapshot."""
    image = empty_image(SIZE, cluster_size=512)
    image += bytes(-len(image) % 512)
    put(image, 60, "I", 200)
    put(image, 64, "Q", len(image))
    for number in range(200):
        image += struct.pack(">QIHHIIQII", (number + 1) << 40, 4 << 20, 0, 0, 0, 0, 0, 0, 0)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    fails(lambda: use(path, writable=True), CorruptImageError, "snapshot", str(path))
    image[79] |= 2  # marked corrupt, else untouched
    assert path.read_bytes() == image


def test_the_largest_tables_of_a_sparse_file(tmp_path: Path) -> None:
    """Nothing is past the end of this file, so the limits of the format are what bounds memory."""
    image = used_image()
    put(image, 36, "I", 4 << 20)
    put(image, 40, "Q", 1 << 30)
    put(image, 48, "Q", 1 << 31)
    put(image, 56, "I", 2048)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    os.truncate(path, 1 << 33)
    tracemalloc.start()
    try:
        use(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 32 * MIB
    finally:
        tracemalloc.stop()


# -- tables ----------------------------------------------------------------------------------


def reading(image: bytearray, tmp_path: Path, kind: type[EnbanError], words: str, offset: int = 0) -> None:
    """Reading one cluster fails, the same again the second time; another cluster reads well."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    with enban.open(path) as disk:
        for _ in range(2):
            fails(lambda: disk.pread(512, offset), kind, words, str(path))


@pytest.mark.parametrize("entry", [1 << 40, 1 << 55, CLUSTER + 512, 512])
def test_l1_entries_to_nowhere(tmp_path: Path, entry: int) -> None:
    image = used_image()
    put(image, Map(image).l1[0], "Q", entry | COPIED)
    reading(image, tmp_path, CorruptImageError, "L2 table")
    path = tmp_path / "disk.qcow2"
    with enban.open(path, writable=True) as disk:
        fails(lambda: disk.pwrite(b"x", 0), CorruptImageError, "enban check", str(path))


def test_l2_entries_not_at_a_cluster(tmp_path: Path) -> None:
    image = used_image()
    places = Map(image)
    place = places.data_places()[0]
    places.put(place, places.word(place) + 512)
    reading(image, tmp_path, CorruptImageError, "no cluster")
    path = tmp_path / "disk.qcow2"
    with enban.open(path, writable=True) as disk:
        fails(lambda: disk.pwrite(b"x", 0), CorruptImageError, "", str(path))
        assert disk.pread(512, CLUSTER) == pattern(CLUSTER + 512)[CLUSTER:]


def test_a_zero_flag_in_version_2(tmp_path: Path) -> None:
    image = used_image(compat="0.10")
    places = Map(image)
    place = places.data_places()[0]
    places.put(place, places.word(place) | 1)
    reading(image, tmp_path, CorruptImageError, "version 2")


def test_an_l2_entry_past_the_end(tmp_path: Path) -> None:
    """Data that is not in the file: zeros or an error, nothing else, and no memory for the gap."""
    image = used_image()
    places = Map(image)
    places.put(places.data_places()[0], 1 << 50 | COPIED)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    try:
        with enban.open(path) as disk:
            assert disk.pread(512, 0) == bytes(512)
    except EnbanError as error:
        vet(error, str(path))


def metadata_of(places: Map) -> dict[str, int]:
    return {
        "header": 0,
        "L1 table": places.l1_offset,
        "L2 table": places.l2_tables[0],
        "refcount table": places.table_offset,
        "refcount block": places.blocks[0],
    }


@pytest.mark.parametrize("target", ["header", "L1 table", "L2 table", "refcount table", "refcount block"])
def test_guest_data_on_metadata_is_not_written(tmp_path: Path, target: str) -> None:
    image = used_image()
    places = Map(image)
    places.put(places.data_places()[1], metadata_of(places)[target] | COPIED)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    disk = enban.open(path, writable=True)
    if target == "header":  # offset 0 is "not allocated": a write must get a new cluster
        disk.pwrite(b"\xee" * CLUSTER, CLUSTER)
        disk.close()
        assert check_bytes(path.read_bytes(), leaks=True)
    else:
        fails(lambda: disk.pwrite(b"\xee" * CLUSTER, CLUSTER), CorruptImageError, "metadata", str(path))
        fails(lambda: disk.pwrite(b"\xee" * CLUSTER, 0), CorruptImageError, "", str(path))
        try:
            disk.close()
        except CorruptImageError as error:
            vet(error, str(path))
    after = path.read_bytes()
    assert Map(bytearray(after)).word(80) == places.word(80)  # the autoclear bits
    assert b"\xee" * 512 not in after or target == "header"


def test_tables_that_overlap_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    for place in ("L1 table", "refcount table", "refcount block"):
        image = used_image()
        places = Map(image)
        places.put(places.l1[0], metadata_of(places)[place] | COPIED)
        path.write_bytes(image)
        with enban.open(path, writable=True) as disk:
            fails(lambda: disk.pwrite(b"x", 0), CorruptImageError, "enban check", str(path))


@pytest.mark.parametrize("target", ["header", "L1 table", "L2 table", "refcount table", "refcount block"])
def test_metadata_that_counts_as_free(tmp_path: Path, target: str) -> None:
    """A write that would get the cluster is refused, marks the image, and no later one gets through."""
    image = used_image()
    places = Map(image)
    free = metadata_of(places)[target] // CLUSTER
    put(image, places.blocks[0] + 2 * free, "H", 0)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    disk = enban.open(path, writable=True)
    fails(lambda: disk.pwrite(b"\xee" * CLUSTER, 10 * CLUSTER), CorruptImageError, "refcount 0", str(path))
    fails(lambda: disk.pwrite(b"\xee" * CLUSTER, 11 * CLUSTER), CorruptImageError, "", str(path))
    assert disk.pread(CLUSTER, 0) == pattern(CLUSTER)
    try:
        disk.close()
    except CorruptImageError as error:
        vet(error, str(path))
    after = bytearray(path.read_bytes())
    assert after[79] & 2, "the corrupt bit is not set"
    assert b"\xee" * 512 not in after
    after[79] &= ~2
    assert after == image
    fails(lambda: use(path, writable=True), CorruptImageError, "marked corrupt", str(path))


@pytest.mark.parametrize("entry", [1 << 50, CLUSTER + 512])
def test_a_refcount_block_to_nowhere(tmp_path: Path, entry: int) -> None:
    image = used_image()
    places = Map(image)
    places.put(places.table[0], entry)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    disk = enban.open(path, writable=True)
    fails(lambda: disk.pwrite(b"x", 10 * CLUSTER), CorruptImageError, "refcount block", str(path))
    try:
        disk.close()
    except CorruptImageError as error:
        vet(error, str(path))


# -- compressed clusters ---------------------------------------------------------------------


def packed_image(stream: bytes, cluster: int = CLUSTER, **options: object) -> bytearray:
    """Cluster 0 is this stream, whatever it is; it reaches to the end of the file."""
    image = empty_image(SIZE, cluster_size=cluster, **options)
    storage = MemoryStorage(BLOCKING, image)
    disk = Disk(drive(open_memory(storage)))
    disk.pwrite(pattern(2 * cluster), 0)
    disk.close()
    image = storage.content
    image += bytes(-len(image) % cluster)
    place = Map(image).data_places()[0]
    shift = 62 - (cluster.bit_length() - 1 - 8)
    sectors = (len(stream) - 1) // 512
    put(image, place, "Q", COMPRESSED | sectors << shift | len(image))
    return image + stream


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


STREAMS = {
    "nothing": bytes(512),
    "noise": random.Random(1).randbytes(600),
    "cut": raw_deflate(random.Random(2).randbytes(CLUSTER))[:1000],
    "short": raw_deflate(b"only this"),
    "reserved-block": b"\x07" * 100,
}


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
@pytest.mark.parametrize("stream", STREAMS)
def test_broken_streams(tmp_path: Path, stream: str, codec: str) -> None:
    image = packed_image(STREAMS[stream], compression_type=codec)
    reading(image, tmp_path, CorruptDataError, "compressed cluster")
    with enban.open(tmp_path / "disk.qcow2", writable=True) as disk:
        assert disk.pread(CLUSTER, CLUSTER) == pattern(2 * CLUSTER)[CLUSTER:]
        path = tmp_path / "disk.qcow2"
        fails(lambda: disk.pwrite(b"x", 9), CorruptDataError, "compressed cluster", str(path))
        disk.pwrite(bytes([7]) * CLUSTER, 0)  # replaced whole, it is not needed
        assert disk.pread(CLUSTER, 0) == bytes([7]) * CLUSTER


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_bombs(tmp_path: Path, codec: str) -> None:
    """A stream that would unpack to 64 MiB gives at most one cluster, or an error."""
    cluster = 64 * KIB
    plain = bytes(64 * MIB)
    stream = raw_deflate(plain) if codec == "zlib" else deflater("zstd")(plain)
    assert len(stream) <= 2 * cluster
    path = tmp_path / "disk.qcow2"
    path.write_bytes(packed_image(stream[:cluster], cluster, compression_type=codec))
    del plain
    tracemalloc.start()
    try:
        with enban.open(path) as disk:
            assert disk.pread(cluster, 0) == bytes(cluster)
    except CorruptDataError as error:
        vet(error, str(path))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 * MIB


@pytest.mark.parametrize("host", [0, 1 << 52, (1 << 54) - 1])
def test_compressed_entries_to_nowhere(tmp_path: Path, host: int) -> None:
    image = used_image()
    places = Map(image)
    places.put(places.data_places()[0], COMPRESSED | 0xF << 58 | host)
    reading(image, tmp_path, EnbanError, "")


# -- chains ----------------------------------------------------------------------------------


def overlay(path: Path, name: str, **options: object) -> Path:
    """An empty 64 KiB overlay that names a backing file, with no look at what that is."""
    return make_qcow2(path, 64 * KIB, cluster_size=CLUSTER, backing_file=name, **options)


def test_a_file_that_backs_itself(tmp_path: Path) -> None:
    path = overlay(tmp_path / "self.qcow2", "self.qcow2")
    fails(lambda: use(path), CorruptImageError, "backing chain", "self.qcow2")
    link = tmp_path / "link.qcow2"
    os.link(path, link)  # another name of the same file changes nothing
    fails(lambda: use(link), CorruptImageError, "backing chain", "self.qcow2")


def test_a_loop_of_two(tmp_path: Path) -> None:
    path = overlay(tmp_path / "a.qcow2", "b.qcow2")
    overlay(tmp_path / "b.qcow2", "a.qcow2")
    fails(lambda: use(path), CorruptImageError, "backing chain", "a.qcow2")


def test_a_missing_base(tmp_path: Path) -> None:
    path = overlay(tmp_path / "top.qcow2", "gone.qcow2")
    fails(lambda: use(path), HostError, "no such file", "gone.qcow2")
    assert process("info", path).returncode == 0  # what the image says can still be seen


def test_a_chain_of_a_hundred(tmp_path: Path) -> None:
    base = tmp_path / "0.raw"
    base.write_bytes(pattern(64 * KIB))
    below = "0.raw"
    for number in range(1, 101):
        path = overlay(tmp_path / f"{number}.qcow2", below, backing_fmt="raw" if number == 1 else "qcow2")
        below = path.name
    with enban.open(tmp_path / "100.qcow2", writable=True) as disk:
        assert disk.pread(64 * KIB, 0) == pattern(64 * KIB)
        disk.pwrite(b"\xaa" * 100, 5000)
        assert disk.pread(CLUSTER, CLUSTER) == (
            pattern(64 * KIB)[CLUSTER:5000] + b"\xaa" * 100 + pattern(64 * KIB)[5100 : 2 * CLUSTER]
        )


def outside_names(tmp_path: Path) -> list[str]:
    return [
        str(tmp_path / "secret.raw"),
        "../secret.raw",
        "link",
        f"file:{tmp_path}/secret.raw",
        "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "s")}}),
        "nbd://127.0.0.1:1/x",
        "http://127.0.0.1:1/x",
    ]


def test_names_that_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(pattern(64 * KIB))
    (tmp_path / "s").write_bytes(pattern(64 * KIB))
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(tmp_path / "secret.raw")
    path = home / "disk.qcow2"
    names = outside_names(tmp_path)
    for name in names:
        path.unlink(missing_ok=True)
        overlay(path, name)
        fails(lambda: use(path), GateError, "outside its own directory", str(path))
        assert "outside its own directory" in only_line("convert", "--untrusted", path, home / "out", code=1)
        if "127.0.0.1" in name:
            with pytest.raises(EnbanError) as caught:
                use(path, gate=TRUSTED)
            assert not isinstance(caught.value, GateError)
            assert len(str(caught.value).splitlines()) == 1
        else:
            with enban.open(path, gate=TRUSTED) as disk:
                assert disk.pread(64 * KIB, 0) == pattern(64 * KIB), name
    assert not (home / "out").exists()


def test_a_data_file_outside(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "victim").write_bytes(pattern(64 * KIB))
    path = tmp_path / "home" / "disk.qcow2"
    image = used_image()
    put(image, 72, "Q", 4)
    tail = extension(0x44415441, str(tmp_path / "victim").encode()) + bytes(8)
    image[112 : 112 + len(tail)] = tail
    path.write_bytes(image)
    fails(lambda: use(path, writable=True), GateError, "data file", str(path))
    assert (tmp_path / "victim").read_bytes() == pattern(64 * KIB)


JSON_NAMES = [
    "json:",
    "json:{",
    "json:[]",
    "json:5",
    "json:" + "[" * 1000,
    "json:" + '{"a":' * 150,
    'json:{"filename":5}',
    'json:{"filename":null}',
    'json:{"filename":""}',
    'json:{"filename":"a\\u0000b"}',
    'json:{"filename":"\\ud800"}',
    'json:{"driver":5}',
    'json:{"driver":"qcow2"}',
    'json:{"driver":"qcow2","file":5}',
    'json:{"driver":"qcow2","file":[]}',
    'json:{"driver":"qcow2","file":{"driver":"qcow2","file":{"driver":"qcow2"}}}',
    'json:{"driver":"raw","file":"base.raw","size":"many"}',
    'json:{"driver":"raw","file":"base.raw","offset":-512}',
    'json:{"driver":"raw","file":"base.raw","offset":[]}',
    'json:{"driver":"raw","file":"base.raw","backing":5}',
    'json:{"driver":"nbd"}',
    'json:{"driver":"nbd","host":5,"port":[]}',
    'json:{"driver":"nbd","path":5}',
    'json:{"driver":"nbd","server":5}',
    'json:{"driver":"nbd","server":{"type":"unix","path":{}}}',
    'json:{"file.filename":"a","file":5}',
    'json:{"file":5,"file.filename":"a"}',
]


@pytest.mark.parametrize("name", JSON_NAMES, ids=range(len(JSON_NAMES)))
def test_json_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(64 * KIB))
    path = tmp_path / "disk.qcow2"
    path.write_bytes(named(empty_image(64 * KIB, cluster_size=CLUSTER), name.encode()))
    fails(lambda: use(path), GateError, "outside", str(path))
    with pytest.raises(EnbanError) as caught:
        use(path, gate=TRUSTED)
    assert str(caught.value).isprintable()


def test_names_with_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(named(used_image(), b"base\0.raw"))
    fails(lambda: use(path), CorruptImageError, "NUL", str(path))
    for name in (b"/a\nenban: forged", b"../\x1b[2Jx", b"gone\nagain", b"/\xff\xfe", b"/\xe2\x80\xa8x"):
        path.write_bytes(named(used_image(), name))
        for gate in (SIBLINGS, TRUSTED):
            with pytest.raises((GateError, HostError)) as caught:
                use(path, gate=gate)
            assert len(str(caught.value).splitlines()) == 1, str(caught.value)


# -- what is no image ------------------------------------------------------------------------


@pytest.mark.parametrize("writable", [False, True])
def test_what_is_no_file(tmp_path: Path, writable: bool) -> None:
    fifo, empty = tmp_path / "fifo", tmp_path / "empty"
    os.mkfifo(fifo)
    empty.touch()
    for path in (fifo, tmp_path, empty, tmp_path / "missing", Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(EnbanError) as caught:
            use(path, writable=writable)
        vet(caught.value, str(path))
    for path in (fifo, tmp_path, tmp_path / "missing"):
        with pytest.raises(EnbanError) as caught:
            use(path, writable=writable, format="")
        vet(caught.value, str(path))


def test_names_no_system_takes(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 5000, ""):
        with pytest.raises((UsageError, HostError)) as caught:
            enban.open(name)
        assert str(caught.value).isprintable()


# -- the command -----------------------------------------------------------------------------


def only_line(*words: str | Path, code: int) -> str:
    """Run a command that must fail in one line, in this process."""
    return refused(*words, code=code)


def hostile_files(directory: Path) -> dict[str, Path]:
    """Files that no verb can do anything with."""
    made: dict[str, Path] = {}
    for case in ("cluster-bits-huge", "l1-giant", "header-length-giant", "name-giant", "version-4"):
        image = used_image()
        for offset, form, value in HEADERS[case][0]:
            put(image, offset, form, value)
        made[case] = directory / f"{case}.qcow2"
        made[case].write_bytes(image)
    made["cut"] = directory / "cut.qcow2"
    made["cut"].write_bytes(used_image()[:90])
    made["fifo"] = directory / "fifo"
    os.mkfifo(made["fifo"])
    made["directory"] = directory / "dir"
    made["directory"].mkdir()
    return made


@pytest.mark.parametrize("verb", ["info", "convert", "check", "map"])
def test_commands_fail_in_one_line(tmp_path: Path, verb: str) -> None:
    """Each file in one process under a limit of address space; all files of a verb at once."""
    limit = f'ulimit -v {1 << 20} && exec "$@"'
    out = tmp_path / "out.raw"
    running = []
    for name, path in hostile_files(tmp_path).items():
        words = [verb, *(("-f", "qcow2") if name == "cut" else ()), str(path)]
        if verb == "convert":
            words += [str(out)]
        running.append(
            (
                path,
                subprocess.Popen(
                    ["sh", "-c", limit, "sh", *command(*words)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    stdin=subprocess.DEVNULL,
                    text=True,
                    env=environment(),
                ),
            )
        )
    for path, child in running:
        try:
            _, err = child.communicate(timeout=SECONDS)
        finally:
            child.kill()
        assert child.returncode not in (0, 70) and child.returncode > 0, (path, err)
        assert len(err.splitlines()) == 1 and "Traceback" not in err and "internal error" not in err, err
        assert str(path) in err
    assert not out.exists()


def test_commands_on_broken_tables(tmp_path: Path) -> None:
    """Images that open: `info` tells about them, `check` finds it, `convert` and `map` fail in one line."""
    path, out = tmp_path / "disk.qcow2", tmp_path / "out.raw"
    image = used_image()
    put(image, Map(image).l1[0], "Q", 1 << 50 | COPIED)
    path.write_bytes(image)
    cli("info", path)
    cli("check", path, code=2)
    assert str(path) in only_line("convert", path, out, code=1)
    assert str(path) in only_line("map", path, code=1)
    path.write_bytes(packed_image(STREAMS["noise"]))
    assert str(path) in only_line("convert", path, out, code=1)
    assert not out.exists()
    path.unlink()
    overlay(path, "disk.qcow2")
    for verb in ("convert", "map"):
        words = [path, out] if verb == "convert" else [path]
        assert "backing chain" in only_line(verb, *words, code=1)
    assert not out.exists()


# -- mutants ---------------------------------------------------------------------------------


def attack(image: bytearray, note: str) -> bool:
    """Use an image in every way; only EnbanErrors of one line come out. Whether it could be opened."""
    storage = MemoryStorage(BLOCKING, image, limit=64 * MIB)
    storage.name = "mutant"
    try:
        disk = Disk(drive(open_memory(storage)))
    except EnbanError as error:
        vet(error, "mutant")
        return False
    size = disk.size
    calls: list[Callable[[], object]] = [
        *(
            lambda at=at: disk.pread(min(64 * KIB, size - at), at)
            for at in range(0, min(size, 512 * KIB), 64 * KIB)
        ),
        lambda: disk.pwrite(b"\xdb" * min(700, size), 0),
        lambda: disk.pwrite(b"\xdb" * min(700, size), max(0, size - 700)),
        lambda: disk.write_zeroes(0, min(size, 20 * KIB)),
        disk.flush,
        lambda: disk.discard(0, min(size, 40 * KIB)),
        lambda: sum(extent.length for extent in disk.map(0, min(size, MIB))),
        disk.close,
    ]
    for call in calls:
        try:
            call()
        except EnbanError as error:
            vet(error, "mutant")
        except Exception as error:
            raise AssertionError(f"{note}: {type(error).__name__}: {error}") from error
    return True


def fuzz_image(shape: str) -> bytearray:
    options: dict[str, dict[str, object]] = {
        "plain": {"cluster_size": 512},
        "compressed": {"cluster_size": CLUSTER},
        "extended": {"cluster_size": 16 * KIB, "extended_l2": True},
        "snapshot": {"cluster_size": 1024},
    }
    storage = MemoryStorage(BLOCKING, empty_image(200 * KIB, **options[shape]))
    disk = Disk(drive(open_memory(storage)))
    disk.pwrite(pattern(30 * KIB), 700)
    if shape == "snapshot":
        disk.create_snapshot("before")
        disk.pwrite(pattern(20 * KIB, 3), 5 * KIB)
    if shape == "compressed":
        for number in range(10, 20):
            disk.write_packed(deflater("zlib")(bytes([number]) * CLUSTER), number * CLUSTER)
    disk.write_zeroes(100 * KIB, 16 * KIB)
    disk.pwrite(pattern(2000, 5), 190 * KIB)
    disk.close()
    assert Qcow2Reader(storage.content).check().clean
    return storage.content


def mutate(image: bytearray, dice: random.Random) -> str:
    """One to four changes, most of them where numbers stand that matter."""
    places = Map(bytearray(image))
    notes = []
    spots = [
        *range(8, 112, 4),
        *places.l1,
        *places.snapshot_l1,
        *places.table[:4],
        *places.blocks[:4],
        *places.l2_places(),
        *((places.snapshots_offset + at for at in range(0, 64, 4)) if places.snapshots_offset else ()),
    ]
    for _ in range(dice.choice((1, 1, 2, 4))):
        place = dice.choice(spots) if dice.random() < 0.85 else dice.randrange(len(image) - 8)
        width = dice.choice((1, 4, 8))
        old = int.from_bytes(image[place : place + width], "big")
        new = dice.choice(
            (
                old ^ 1 << dice.randrange(8 * width),
                old ^ 1 << dice.randrange(8 * width),
                dice.getrandbits(8 * width),
                0,
                (1 << 8 * width) - 1,
                dice.randrange(len(image)) // places.cluster * places.cluster,
                old + dice.choice((1, 8, 512, places.cluster)),
            )
        ) & ((1 << 8 * width) - 1)
        image[place : place + width] = new.to_bytes(width, "big")
        notes.append(f"{width} bytes at {place:#x}: {old:#x} -> {new:#x}")
    if dice.random() < 0.1:
        cut = dice.randrange(len(image))
        del image[cut:]
        notes.append(f"cut at {cut:#x}")
    return ", ".join(notes)


@pytest.mark.parametrize("shape", ["plain", "compressed", "extended", "snapshot"])
def test_mutants(shape: str) -> None:
    original = fuzz_image(shape)
    opened = 0
    for seed in range(100):
        dice = random.Random(f"{shape} {seed}")
        image = bytearray(original)
        note = f"{shape}, seed {seed}: {mutate(image, dice)}"
        opened += attack(image, note)
    assert 20 < opened < 100, opened  # the mutants neither all die at the door nor all live
