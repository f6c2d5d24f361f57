"""Encrypted qcow images: whole sectors on disk, any bytes for the guest, and passphrases by every road."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import enban
from enban.block.door import Door
from enban.block.runtime import BLOCKING, drive
from enban.catalog import Opener, open_door
from enban.errors import UnsupportedOperationError, UsageError
from enban.extent import DATA, UNALLOCATED
from enban.wire.image_options import parse_image_opts
from tests.qcow_support import PASSPHRASE, check_sound, make_qcow, memory_qcow, needs_cryptography, open_disk
from tests.support import KIB, MIB, pattern, raw_node

pytestmark = needs_cryptography


def encrypted(path: Path, size: int = MIB, **options: Any) -> dict[str, Any]:
    """A new encrypted image and its key file; how to open it."""
    make_qcow(path, size, encrypt_format="aes", **options)
    key = path.with_suffix(".key")
    key.write_bytes(PASSPHRASE)
    return {"driver": "qcow", "file": {"filename": str(path)}, "encrypt": {"key-file": str(key)}}


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_any_bytes_of_any_sector(cluster: int) -> None:
    below = pattern(300 * KIB, 3)
    storage = memory_qcow(400 * KIB, encrypt_format="aes", cluster_size=cluster, backing_file="base")
    disk = open_disk(storage, passphrase=PASSPHRASE, backing=raw_node(below))
    model = bytearray(below.ljust(400 * KIB, b"\0"))
    for number, (offset, length) in enumerate(
        [
            (0, 1),
            (511, 2),
            (700, 5000),
            (512, 512),
            (300 * KIB - 5, 10),
            (390 * KIB, 10 * KIB),
            (1000, 200_000),
        ]
    ):
        data = pattern(length, number + 10)
        disk.pwrite(data, offset)
        model[offset : offset + length] = data
        assert disk.pread(len(model), 0) == model
    disk.write_zeroes(5000, 100_000)
    model[5000:105_000] = bytes(100_000)
    disk.discard(0, 400 * KIB)  # gives nothing back: a hole would not decrypt to zeros
    assert disk.pread(len(model), 0) == model
    assert disk.pread(3, 1023) == model[1023:1026]
    disk.close()
    check_sound(storage.content)
    for offset in (700, 1536, 200 * KIB):
        assert bytes(model[offset : offset + 64]) not in storage.content
    again = open_disk(storage, passphrase=PASSPHRASE, backing=raw_node(below))
    assert again.pread(len(model), 0) == model
    other = open_disk(storage, passphrase=b"another", backing=raw_node(below))
    assert other.pread(512, 512) != model[512:1024]


def test_the_last_sector_of_an_odd_size() -> None:
    storage = memory_qcow(8 * KIB, encrypt_format="aes")
    storage.content[24:32] = (5000).to_bytes(8, "big")
    disk = open_disk(storage, passphrase=PASSPHRASE)
    disk.pwrite(b"x" * 100, 4900)
    disk.pwrite(b"y", 4999)
    disk.close()
    disk = open_disk(storage, passphrase=PASSPHRASE)
    assert disk.pread(200, 4800) == bytes(100) + b"x" * 99 + b"y"


def test_nothing_reaches_past_the_cipher() -> None:
    disk = open_disk(memory_qcow(MIB, encrypt_format="aes"), passphrase=PASSPHRASE)
    disk.pwrite(b"a" * 8192, 0)
    assert disk.node.locate(0, 512) == disk.node.locate_write(0, 512) == -1
    extents = list(disk.map())
    assert [(e.start, e.length, e.kind, e.storage) for e in extents] == [
        (0, 8192, DATA, None),
        (8192, MIB - 8192, UNALLOCATED, None),
    ]
    with pytest.raises(UnsupportedOperationError, match="encrypted"):
        disk.write_packed(b"x", 0)


def test_an_encrypted_overlay_over_an_encrypted_image(tmp_path: Path) -> None:
    base = encrypted(tmp_path / "base.qcow")
    with enban.open(base, writable=True) as disk:
        disk.pwrite(b"base" * 1024, 0)
    top = encrypted(tmp_path / "top.qcow", backing_file="base.qcow")
    with enban.open({**top, "backing": base}, writable=True) as disk:
        disk.pwrite(b"top", 4094)
        assert disk.pread(10, 4090) == b"sebatop\0\0\0"
    with pytest.raises(
        UsageError,
        match=r"base\.qcow \(backing file of .*top\.qcow\): the image is encrypted and no passphrase",
    ):
        enban.open(top)


def test_passphrases(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow"
    reference = encrypted(path)
    with enban.open(reference, writable=True) as disk:
        disk.pwrite(b"hello", 1000)
    options = parse_image_opts(f"driver=qcow,encrypt.key-file={tmp_path}/x.key,file.filename={path}")
    with enban.open(options) as disk:
        assert disk.pread(5, 1000) == b"hello"
    asked = []

    def ask(name: str) -> bytes:
        asked.append(name)
        return PASSPHRASE

    door = drive(open_door(str(path), BLOCKING, passphrase=ask))
    buffer = bytearray(5)
    drive(door.read_into(buffer, 1000))
    assert buffer == b"hello" and asked == [str(path)]
    drive(door.close())

    with pytest.raises(UsageError, match="no passphrase was given"):
        enban.open(path)
    door = Door(drive(Opener(BLOCKING, metadata_only=True).open_chain(str(path))), writable=False)
    assert door.node.encrypted and drive(door.extent(0, 4096)).kind == DATA
    with pytest.raises(UsageError, match="no passphrase was given"):
        drive(door.read_into(buffer, 0))
    drive(door.close())


def test_an_image_that_is_not_encrypted_asks_for_nothing(tmp_path: Path) -> None:
    def ask(name: str) -> bytes:
        raise AssertionError(name)

    door = drive(open_door(str(make_qcow(tmp_path / "x", MIB)), BLOCKING, passphrase=ask))
    assert not door.node.encrypted
    drive(door.close())


def test_an_empty_key_file_makes_no_image(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    with pytest.raises(UsageError, match="key file is empty"):
        make_qcow(tmp_path / "x", MIB, encrypt_format="aes", encrypt_key_file=str(tmp_path / "key"))
