"""What an image says of itself: kept if unknown and harmless, refused by name if not, or cleared."""

from __future__ import annotations

import struct
from typing import Any

import pytest

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import CorruptImageError, ImageError, UnsupportedFeatureError
from enban.formats.qcow2.node import Qcow2Node
from enban.storage.memory import MemoryStorage
from enban.wire.qcow2 import parse_header
from tests.support import KIB, MIB, check_bytes, empty_image, open_memory


def image(**options: Any) -> bytearray:
    return empty_image(MIB, **{"cluster_size": 4096, **options})


def open_(content: bytes | bytearray, *, writable: bool = True) -> tuple[enban.Disk, MemoryStorage]:
    memory = MemoryStorage(BLOCKING, content)
    return enban.Disk(drive(open_memory(memory, writable=writable))), memory


def bits(content: bytes | bytearray) -> tuple[int, int, int]:
    found = struct.unpack(">QQQ", content[72:96])
    return found[0], found[1], found[2]


def with_bits(
    content: bytearray, incompatible: int = 0, compatible: int = 0, autoclear: int = 0
) -> bytearray:
    old = bits(content)
    content[72:96] = struct.pack(">QQQ", old[0] | incompatible, old[1] | compatible, old[2] | autoclear)
    return content


def with_extensions(content: bytearray, *extensions: tuple[int, bytes]) -> bytearray:
    """The header's extensions replaced."""
    length = int.from_bytes(content[100:104], "big")
    area = b"".join(
        kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data + bytes(-len(data) % 8)
        for kind, data in extensions
    )
    content[length : length + len(area) + 8] = area + bytes(8)
    return content


# -- feature bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [5, 17, 63])
def test_unknown_incompatible_features_are_refused_by_name(bit: int) -> None:
    content = with_bits(image(), incompatible=1 << bit)
    before = bytes(content)
    for writable in (True, False):
        with pytest.raises(UnsupportedFeatureError, match=rf"bit {bit}") as info:
            open_(content, writable=writable)
        assert "\n" not in str(info.value)
    assert content == before
    names = bytes((0, bit)) + b"time travel".ljust(46, b"\0")
    with pytest.raises(UnsupportedFeatureError, match="time travel"):
        open_(with_extensions(content, (0x6803F857, names)))


def test_unknown_compatible_features_are_kept() -> None:
    disk, memory = open_(with_bits(image(), compatible=1 << 40 | 1 << 7))
    disk.pwrite(b"x" * 5000, 0)
    disk.resize(2 * MIB)
    disk.close()
    assert bits(memory.content)[1] == 1 << 40 | 1 << 7
    check_bytes(memory.content)


def test_unknown_autoclear_features_are_cleared_at_the_first_change_and_not_before() -> None:
    content = with_bits(image(), autoclear=1 | 1 << 9)
    disk, memory = open_(content, writable=False)
    disk.pread(100, 0)
    disk.close()
    disk, memory = open_(content)
    disk.pread(100, 0)
    disk.flush()
    disk.close()
    assert bits(memory.content)[2] == 1 | 1 << 9 and memory.content == content
    disk, memory = open_(content)
    disk.pwrite(b"x", 0)
    assert bits(memory.content)[2] == 0, "bitmaps (say) would be trusted although data has changed"
    disk.close()


def test_a_raw_data_file_stays_marked_raw() -> None:
    memory = MemoryStorage(BLOCKING, image(data_file="d", data_file_raw=True))
    data = MemoryStorage(BLOCKING)
    disk = enban.Disk(drive(open_memory(memory, data=data)))
    disk.pwrite(b"raw" * 1000, 7777)
    disk.write_zeroes(8000, 1000)
    disk.discard(64 * KIB, 64 * KIB)
    shown = disk.pread(MIB, 0)
    disk.close()
    assert bits(memory.content)[2] == 2
    assert bytes(data.content).ljust(MIB, b"\0")[:MIB] == shown


def test_the_corrupt_bit_forbids_writing_only() -> None:
    content = with_bits(image(), incompatible=2)
    with pytest.raises(CorruptImageError, match="marked corrupt") as info:
        open_(content)
    assert "repair" in str(info.value) or "check" in str(info.value)
    disk, _ = open_(content, writable=False)
    assert disk.pread(10, 0) == bytes(10)
    disk.close()


def test_lazy_refcounts_are_kept_as_a_wish_and_never_used() -> None:
    """The image may say so; enban keeps counts in step anyway, so it never leaves the dirty bit."""
    disk, memory = open_(image(lazy_refcounts=True))
    disk.pwrite(b"x" * 20_000, 0)
    disk.flush()
    assert bits(memory.content)[:2] == (0, 1)
    check_bytes(memory.content, leaks=True)
    disk.close()
    assert bits(memory.content)[:2] == (0, 1)


# -- header extensions -----------------------------------------------------------------------


def test_unknown_extensions_are_carried_along() -> None:
    odd = (0x12345678, b"odd length!")
    content = with_extensions(image(), odd, (0x0BADF00D, b""), (0xE2792ACA, b"raw"))
    disk, memory = open_(content)
    disk.pwrite(b"x" * 100, 0)
    node = disk.node
    assert isinstance(node, Qcow2Node) and node.backing_format == "raw"
    drive(node.write_header())
    disk.close()
    header = parse_header(memory.content[:4096])
    assert header.extensions[:2] == [odd, (0x0BADF00D, b"")]
    assert header.extension(0xE2792ACA) == b"raw"
    check_bytes(memory.content)


def test_a_header_longer_than_we_know_keeps_its_bytes() -> None:
    content = image()
    extra = b"\0" * 7 + b"from the future "  # after the compression byte: padding, then new fields
    old = bytes(content[112:600])
    content[104 : 104 + 8 + 16] = bytes(1) + extra
    content[100:104] = (128).to_bytes(4, "big")
    content[128 : 128 + len(old)] = old
    disk, memory = open_(content)
    disk.pwrite(b"x", 0)
    node = disk.node
    assert isinstance(node, Qcow2Node)
    drive(node.write_header())
    disk.close()
    assert memory.content[112:128] == b"from the future " and memory.content[100:104] == (128).to_bytes(
        4, "big"
    )
    check_bytes(memory.content)


def test_version_2_headers_of_every_age() -> None:
    """A name directly behind the header, no extensions; garbage behind is not taken for one."""
    content = image(compat="0.10", backing_file="b")
    assert parse_header(content[:4096]).backing_name == b"b"
    name_at = int.from_bytes(content[8:16], "big")
    content[name_at : name_at + 20] = bytes(20)
    content[72:80] = b"old-base"  # as the first writers did: where extensions stand today
    content[8:20] = (72).to_bytes(8, "big") + (8).to_bytes(4, "big")
    header = parse_header(content[:4096])
    assert header.backing_name == b"old-base" and header.extensions == []


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, b"QFI\xfa", "no header"),
        (4, struct.pack(">I", 4), "version 4"),
        (20, struct.pack(">I", 8), "cluster size"),
        (20, struct.pack(">I", 22), "cluster size"),
        (24, struct.pack(">Q", 1 << 63), "too large"),
        (32, struct.pack(">I", 3), "encryption method 3"),
        (32, struct.pack(">I", 1), "encrypted"),
        (36, struct.pack(">I", 0), "too small"),
        (36, struct.pack(">I", 1 << 23), "larger"),
        (40, struct.pack(">Q", 513), "boundary"),
        (40, struct.pack(">Q", 1 << 60), "boundary"),
        (48, struct.pack(">Q", 0), "boundary"),
        (56, struct.pack(">I", 0), "refcount table"),
        (56, struct.pack(">I", 1 << 20), "larger"),
        (60, struct.pack(">I", 1 << 20), "snapshots"),
        (96, struct.pack(">I", 7), "refcount width"),
        (100, struct.pack(">I", 96), "header length"),
        (100, struct.pack(">I", 8192), "header length"),
        (104, b"\1", "compression type"),
        (8, struct.pack(">QI", 4000, 200), "outside"),
        (8, struct.pack(">QI", 1000, 2000), "longer"),
    ],
)
def test_impossible_headers_say_what_is_wrong(offset: int, value: bytes, words: str) -> None:
    content = image()
    content[offset : offset + len(value)] = value
    with pytest.raises(ImageError) as info:
        open_(content)
    assert words in str(info.value) and "\n" not in str(info.value)


def test_tables_that_lie_on_each_other_are_not_written() -> None:
    """Reading goes on; a change of one table would destroy the other."""
    for overlap in ("L1 on refcount table", "L1 on refcount block", "L2 on L1", "block on header"):
        content = image()
        block = int.from_bytes(content[4096:4104], "big")
        l1 = int.from_bytes(content[40:48], "big")
        if overlap == "L1 on refcount table":
            content[40:48] = (4096).to_bytes(8, "big")
        elif overlap == "L1 on refcount block":
            content[40:48] = block.to_bytes(8, "big")
        elif overlap == "L2 on L1":
            content.extend(bytes(8192 - len(content) % 4096))
            content[l1 : l1 + 8] = (1 << 63 | l1).to_bytes(8, "big")
        else:
            content[4104:4112] = bytes(8)
            content[4096:4104] = (8 * 4096).to_bytes(8, "big")
            content.extend(bytes(9 * 4096 - len(content)))
            content[4104:4112] = (8 * 4096).to_bytes(8, "big")
        before = bytes(content)
        disk, memory = open_(content)
        with pytest.raises(CorruptImageError, match=r"other metadata|refcount 0"):
            disk.pwrite(b"x" * 4096, 512 * KIB)
        assert memory.content[:72] == before[:72] and memory.content[80:] == before[80:], overlap
        assert bits(memory.content)[0] == 2
