"""Making qcow2 images: the option matrix, limits, and what must be refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import EnbanError, NoSpaceError, UnsupportedOperationError, UsageError
from enban.formats.qcow2.create import Qcow2Options, largest_size, write_empty
from enban.formats.qcow2.opening import read_header
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from enban.wire.qcow2 import EXT_FEATURE_NAMES
from tests.support import KIB, MIB, check_bytes, empty_image, open_memory, pattern, raw_node

SIZES = (0, 512, 65536, 1_000_448, 37 * MIB + 512)


@pytest.mark.parametrize("bits", range(9, 22))
@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_cluster_size_by_refcount_width(bits: int, refcount_bits: int) -> None:
    for size in SIZES:
        image = empty_image(size, cluster_size=1 << bits, refcount_bits=refcount_bits)
        check_bytes(image)
        reader = Qcow2Reader(image)
        assert (reader.size, reader.cluster_bits, reader.refcount_bits) == (size, bits, refcount_bits)
    disk = enban.Disk(drive(open_memory(MemoryStorage(BLOCKING, image))))
    data = pattern(3 * (1 << min(bits, 16)) + 700)
    disk.pwrite(data, 5000)
    disk.close()
    memory = disk.node.file
    assert isinstance(memory, MemoryStorage)
    check_bytes(memory.content)
    assert Qcow2Reader(memory.content).read()[5000 : 5000 + len(data)] == data


FLAGS: dict[str, list[dict[str, Any]]] = {
    "version": [{"compat": "0.10"}, {"compat": "1.1"}, {"compat": "v3"}],
    "lazy": [{}, {"lazy_refcounts": True}],
    "packing": [{}, {"compression_type": "zstd"}],
    "entries": [{}, {"extended_l2": True}],
    "backing": [{}, {"backing_file": "b"}, {"backing_file": "b", "backing_fmt": "raw"}],
    "data": [{}, {"data_file": "d"}, {"data_file": "d", "data_file_raw": True}],
}


@pytest.mark.parametrize("combination", list(itertools.product(*FLAGS.values())), ids=lambda _: "")
def test_options_together(combination: tuple[dict[str, Any], ...]) -> None:
    """Each combination is either refused, or made, found as wished, and usable."""
    options: dict[str, Any] = {}
    for part in combination:
        options |= part
    try:
        image = empty_image(MIB, cluster_size=16384, **options)
    except UsageError as error:
        assert "\n" not in str(error)
        version_2 = (
            options["compat"] == "0.10" and len(set(options) - {"compat", "backing_file", "backing_fmt"}) > 0
        )
        assert version_2 or {"data_file_raw", "backing_file"} <= set(options), options
        return
    check_bytes(image, data_file=b"" if "data_file" in options else None)
    memory = MemoryStorage(BLOCKING, image)
    data = MemoryStorage(BLOCKING) if "data_file" in options else None
    backing = raw_node(b"\x77" * 100_000) if "backing_file" in options else None
    door = drive(open_memory(memory, data=data, backing=backing))
    facts = drive(door.node.describe())["format-specific"]["data"]
    assert facts["compat"] == ("0.10" if options["compat"] == "0.10" else "1.1")
    if options["compat"] != "0.10":
        assert facts["lazy-refcounts"] == options.get("lazy_refcounts", False)
        assert facts["extended-l2"] == options.get("extended_l2", False)
        assert facts["compression-type"] == options.get("compression_type", "zlib")
    assert door.node.backing_name == options.get("backing_file", "")
    assert door.node.backing_format == options.get("backing_fmt", "")
    disk = enban.Disk(door)
    disk.pwrite(b"\x11" * 20_000, 90_000)
    expected = (b"\x77" * 100_000 if backing else b"").ljust(MIB, b"\0")
    expected = expected[:90_000] + b"\x11" * 20_000 + expected[110_000:]
    assert disk.pread(MIB, 0) == expected
    disk.close()
    content = data.content if data is not None else None
    check_bytes(memory.content, data_file=content)
    assert (
        Qcow2Reader(memory.content, data_file=content).read(backing=b"\x77" * 100_000 if backing else b"")
        == expected
    )


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 256},
        {"cluster_size": 4 * MIB},
        {"cluster_size": 5000},
        {"cluster_size": 0},
        {"cluster_size": -512},
        {"refcount_bits": 0},
        {"refcount_bits": 3},
        {"refcount_bits": 128},
        {"compat": "2"},
        {"compression_type": "lzo"},
        {"extended_l2": True, "cluster_size": 8192},
        {"preallocation": "some"},
        {"data_file_raw": True},
        {"backing_fmt": "raw"},
        {"backing_file": "x" * 1024},
        {"backing_file": "b", "preallocation": "full"},
    ],
)
def test_what_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as info:
        Qcow2Options(MIB, **options).header()
    assert str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("extended", [False, True])
def test_the_largest_size_and_one_more(bits: int, extended: bool) -> None:
    if extended:
        bits = max(bits, 14)
    options = Qcow2Options(0, cluster_size=1 << bits, extended_l2=extended)
    limit = largest_size(options.header())
    storage = MemoryStorage(BLOCKING, limit=80 * MIB)
    header = Qcow2Options(limit, cluster_size=1 << bits, extended_l2=extended).header()
    drive(write_empty(storage, header))
    disk = enban.Disk(drive(open_memory(storage)))
    assert disk.size == limit
    disk.pwrite(b"the last sector".ljust(512), limit - 512)
    assert disk.pread(512, limit - 512).startswith(b"the last")
    assert disk.pread(4096, limit // 2) == bytes(4096)
    disk.close()
    with pytest.raises(UsageError, match="too large"):
        drive(
            write_empty(
                MemoryStorage(BLOCKING),
                Qcow2Options(limit + 512, cluster_size=1 << bits, extended_l2=extended).header(),
            )
        )


def test_a_full_disk_leaves_an_error_not_an_image() -> None:
    storage = MemoryStorage(BLOCKING, limit=100 * KIB)
    with pytest.raises(NoSpaceError):
        drive(write_empty(storage, Qcow2Options(MIB).header()))


def test_the_names_of_features_give_way_in_a_small_header() -> None:
    """512 bytes: with a backing file there is no room for the table that only helps error messages."""
    header = Qcow2Options(MIB, cluster_size=512, backing_file="b" * 300, backing_fmt="qcow2").header()
    storage = MemoryStorage(BLOCKING)
    drive(write_empty(storage, header))
    found = drive(read_header(storage, "x"))
    assert found.backing_name == b"b" * 300 and found.extension(EXT_FEATURE_NAMES) is None
    check_bytes(storage.content)
    with pytest.raises(EnbanError) as info:
        header = Qcow2Options(MIB, cluster_size=512, backing_file="b" * 500).header()
        drive(write_empty(MemoryStorage(BLOCKING), header))
    assert isinstance(info.value, UnsupportedOperationError) and "cluster" in str(info.value)


def test_old_content_of_a_device_does_not_shine_through() -> None:
    class Device(MemoryStorage):
        fixed_size = True

    device = Device(BLOCKING, b"\xee" * MIB, limit=MIB)
    drive(write_empty(device, Qcow2Options(4 * MIB, cluster_size=4096).header()))
    disk = enban.Disk(drive(open_memory(device)))
    assert disk.pread(4 * MIB, 0) == bytes(4 * MIB)
    disk.pwrite(b"\x11" * 10, 100)  # a new cluster lies on old content
    assert disk.pread(8192, 0) == bytes(100) + b"\x11" * 10 + bytes(8082)
    disk.close()
    check_bytes(device.content)
