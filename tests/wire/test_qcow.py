"""qcow structures: fields to bytes and back, and what a header may not say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.errors import CorruptImageError, ImageError, UnsupportedFeatureError
from enban.wire.qcow import (
    HEADER,
    MAGIC,
    MAX_L1_BYTES,
    Header,
    largest_packed_host,
    pack_compressed,
    parse_header,
    unpack_compressed,
)

FILE = 1 << 20


def fields(**changes: int) -> bytes:
    values = {
        "version": 1,
        "backing_offset": 0,
        "backing_length": 0,
        "mtime": 0,
        "size": 10 << 20,
        "cluster_bits": 12,
        "l2_bits": 9,
        "padding": 0,
        "crypt_method": 0,
        "l1_offset": 48,
    }
    values.update(changes)
    return HEADER.pack(MAGIC, *values.values())


def test_layout_of_a_header_that_qemu_made() -> None:
    # qemu-img 7.2: create -f qcow -b back.raw -F raw x 1000448
    data = bytes.fromhex(
        "514649fb000000010000000000000030000000080000000000000000000f4400090c000000000000000000000000003862"
    )
    header = parse_header(data, 568)
    assert (header.backing_offset, header.backing_length, header.mtime) == (48, 8, 0)
    assert (header.size, header.cluster_size, header.l2_entries) == (1000448, 512, 4096)
    assert (header.crypt_method, header.l1_offset, header.l1_entries) == (0, 56, 1)
    header.backing_name = b"back.raw"
    assert header.build() == data[:48] + b"back.raw"


@given(
    backing_offset=st.sampled_from((0, 48, 4096)),
    backing_length=st.integers(0, 1023),
    mtime=st.integers(0, 2**32 - 1),
    size=st.integers(0, 2**40),
    cluster_bits=st.integers(9, 16),
    l2_bits=st.integers(6, 13),
    padding=st.integers(0, 2**16 - 1),
    crypt_method=st.sampled_from((0, 1)),
    l1_offset=st.integers(48, 2**63),
)
def test_fields_survive(**values: int) -> None:
    data = fields(**values)
    try:
        header = parse_header(data, 1 << 64)
    except UnsupportedFeatureError:
        assert values["size"] > MAX_L1_BYTES // 8 << values["cluster_bits"] + values["l2_bits"]
        return
    for name, value in values.items():
        assert getattr(header, name) == value
    assert header.build() == data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"cluster_bits": 8}, "cluster size 2^8"),
        ({"cluster_bits": 17}, "cluster size 2^17"),
        ({"cluster_bits": 255}, "cluster size 2^255"),
        ({"l2_bits": 5}, "2^5 entries"),
        ({"l2_bits": 14}, "2^14 entries"),
        ({"crypt_method": 2}, "encryption method 2"),
        ({"size": 1 << 63}, "too large"),
        ({"size": (1 << 64) - 1}, "too large"),
        ({"size": (1 << 63) - 1}, "past the end"),
        ({"l1_offset": FILE - 8}, "past the end"),
        ({"l1_offset": (1 << 64) - 1}, "past the end"),
        ({"l1_offset": 40}, "lies on the header"),
        ({"backing_offset": 48, "backing_length": 1024}, "longer than 1023"),
        ({"backing_offset": FILE - 3, "backing_length": 4}, "past the end"),
        ({"backing_offset": 1 << 63, "backing_length": 4}, "past the end"),
    ],
)
def test_what_a_header_may_not_say(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ImageError, match="image.qcow: .*" + words.replace("^", r"\^")) as caught:
        parse_header(fields(**changes), FILE, path="image.qcow")
    assert "\n" not in str(caught.value)


def test_an_l1_table_of_gigabytes_is_refused_though_the_file_has_it() -> None:
    with pytest.raises(UnsupportedFeatureError, match="L1 table of 268435456 bytes"):
        parse_header(fields(size=64 << 40), 1 << 40)


@pytest.mark.parametrize("data", [b"", MAGIC, fields()[:47], b"\0" * 48, b"QFI\xfa" + fields()[4:]])
def test_no_header(data: bytes) -> None:
    with pytest.raises(CorruptImageError, match="no header"):
        parse_header(data, FILE)


@given(data=st.binary(min_size=48, max_size=48), size=st.integers(0, 2**64))
def test_any_bytes_give_a_header_or_one_clear_error(data: bytes, size: int) -> None:
    for start in (data, MAGIC + b"\0\0\0\1" + data[8:]):
        try:
            header = parse_header(start, size, path="x")
        except ImageError as error:
            assert str(error).startswith("x: ")
        else:
            assert isinstance(header, Header)
            assert header.l1_offset + header.l1_entries * 8 <= size
            assert header.l1_entries * 8 <= MAX_L1_BYTES


def test_packed_entry_that_qemu_wrote() -> None:
    # qemu-img 7.2: convert -c; 25 packed bytes at 0x4200 of an image with 4 KiB clusters
    assert unpack_compressed(0x80C8_0000_0000_4200, 12) == (0x4200, 25)
    assert pack_compressed(0x4200, 25, 12) == 0x80C8_0000_0000_4200


@given(data=st.data(), bits=st.integers(9, 16))
def test_packed_entries_survive(data: st.DataObject, bits: int) -> None:
    host = data.draw(st.integers(0, largest_packed_host(bits)))
    length = data.draw(st.integers(0, (1 << bits) - 1))
    entry = pack_compressed(host, length, bits)
    assert 1 << 63 <= entry < 1 << 64
    assert unpack_compressed(entry, bits) == (host, length)
