"""Jobs on qcow images: create, convert, commit, rebase to none, serve; encrypted ones too."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import enban
import enban.aio
from enban.errors import HostError, UnsupportedOperationError, UsageError
from enban.jobs.create import creation_warnings
from tests.exports.nbd_peer import open_disk, serving
from tests.qcow_support import PASSPHRASE, check_sound, make_qcow, needs_cryptography
from tests.support import (
    KIB,
    MIB,
    make_qcow2,
    needs_qemu_img,
    pattern,
    qemu_img,
    qemu_same,
)

if TYPE_CHECKING:
    from enban.block.cipher import Passphrase

SIZE = 3 * MIB + 512
AES = {"encrypt.format": "aes"}


def content() -> bytes:
    """Data, zeros, and the start of a cluster at the end."""
    return pattern(MIB) + bytes(MIB) + pattern(MIB + 512, 2)


def reads(path: Path, passphrase: Passphrase = None) -> bytes:
    with enban.open(path, passphrase=passphrase) as disk:
        return disk.pread(disk.size, 0)


def qemu_sees(path: Path, expected: bytes, key: Path | None = None) -> None:
    """QEMU reads these bytes; `key`: the file with the passphrase."""
    if key is None:
        qemu_same(path, expected, path.parent, format="qcow")
        return
    seen = path.with_suffix(".seen")
    name = f"driver=qcow,encrypt.format=aes,encrypt.key-secret=k,file.filename={path}"
    qemu_img("convert", "--object", f"secret,id=k,file={key}", "--image-opts", name, "-O", "raw", seen)
    assert seen.read_bytes() == expected


@needs_qemu_img
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cluster_size": "512"}, {"cluster_size": "64k"}, {"cluster_size": "1k", "l2_entries": "64"}],
    ids=["4k", "512", "64k", "1k-64"],
)
def test_to_qcow_and_on_to_every_format(tmp_path: Path, options: dict[str, str], compress: bool) -> None:
    (tmp_path / "a.raw").write_bytes(content())
    path = tmp_path / "a.qcow"
    enban.convert(
        tmp_path / "a.raw",
        path,
        source_format="raw",
        target_format="qcow",
        options=options,
        compress=compress,
        verify=True,
    )
    assert reads(path) == content()
    assert check_sound(path.read_bytes()).read() == content()
    assert enban.check(path).clean
    qemu_sees(path, content())
    facts = json.loads(qemu_img("info", "--output=json", path))
    assert facts["cluster-size"] == {"512": 512, "64k": 65536, "1k": 1024}.get(
        options.get("cluster_size", ""), 4096
    )
    enban.convert(path, tmp_path / "b.qcow2", target_format="qcow2", compress=compress)
    qemu_same(tmp_path / "b.qcow2", content(), tmp_path)
    enban.convert(tmp_path / "b.qcow2", tmp_path / "c.qcow", target_format="qcow", compress=not compress)
    qemu_sees(tmp_path / "c.qcow", content())
    enban.convert(tmp_path / "c.qcow", tmp_path / "d.raw")
    assert (tmp_path / "d.raw").read_bytes() == content()


@needs_qemu_img
@needs_cryptography
@pytest.mark.parametrize("options", [AES, {"encryption": "on", "cluster_size": "512"}], ids=["aes", "old"])
def test_convert_to_an_encrypted_image_and_back(tmp_path: Path, options: dict[str, str]) -> None:
    (tmp_path / "a.raw").write_bytes(content())
    key = tmp_path / "key"
    key.write_bytes(PASSPHRASE)
    by_file, by_call = tmp_path / "file.qcow", tmp_path / "call.qcow"
    asked = []

    def ask(name: str) -> str:
        asked.append(name)
        return PASSPHRASE.decode()

    convert: dict[str, Any] = {"source_format": "raw", "target_format": "qcow"}
    enban.convert(
        tmp_path / "a.raw", by_file, options={**options, "encrypt.key-file": str(key)}, verify=True, **convert
    )
    enban.convert(tmp_path / "a.raw", by_call, options=options, passphrase=ask, **convert)
    assert asked == [str(by_call)]
    for path in (by_file, by_call):
        assert pattern(64) not in path.read_bytes()
        assert reads(path, PASSPHRASE) == content()
        assert reads(path, "another") != content()
        qemu_sees(path, content(), key)
    enban.convert(by_call, tmp_path / "b.qcow2", target_format="qcow2", passphrase=PASSPHRASE)
    qemu_same(tmp_path / "b.qcow2", content(), tmp_path)


@needs_cryptography
def test_what_an_encrypted_target_needs(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(content())
    convert: dict[str, Any] = {"source_format": "raw", "target_format": "qcow"}
    for settings, kind, text in (
        ({"options": AES}, UsageError, "no passphrase was given"),
        ({"options": {"encrypt.format": "luks"}}, UsageError, "'luks' is not known"),
        ({"options": {"encrypt.key-file": "key"}}, UsageError, "needs encrypt.format=aes"),
        ({"options": {**AES, "encrypt.key-file": str(tmp_path / "no")}}, HostError, "cannot read the key"),
        (
            {"options": AES, "passphrase": b"x", "compress": True},
            UnsupportedOperationError,
            "cannot hold compressed",
        ),
    ):
        with pytest.raises(kind, match=text):
            enban.convert(tmp_path / "a.raw", tmp_path / "x.qcow", **convert, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.raw"]


@needs_qemu_img
@needs_cryptography
def test_create_an_encrypted_image(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(PASSPHRASE)
    ours, theirs = tmp_path / "ours.qcow", tmp_path / "theirs.qcow"
    assert enban.create(ours, "qcow", AES, size=10 * MIB) == 10 * MIB
    qemu_img(
        "create",
        *("--object", f"secret,id=k,file={tmp_path / 'key'}"),
        *("-f", "qcow", "-o", "encrypt.format=aes,encrypt.key-secret=k", theirs, "10M"),
    )
    assert ours.read_bytes() == theirs.read_bytes()
    with enban.open(ours, writable=True, passphrase=PASSPHRASE) as disk:
        disk.pwrite(content(), 0)
    qemu_sees(ours, content().ljust(10 * MIB, b"\0"), tmp_path / "key")


def test_warnings() -> None:
    assert creation_warnings("qcow", AES, MIB) == [
        "the encryption of qcow images is weak; use it only where an old program needs it"
    ]
    assert creation_warnings("qcow", {}, 0) == ["QEMU does not open qcow images of size 0"]
    assert not creation_warnings("qcow", {}, MIB) + creation_warnings("qcow2", {}, 0)


@needs_qemu_img
def test_sizes_at_the_edges(tmp_path: Path) -> None:
    """QEMU opens nothing smaller than a sector; the largest size is the one whose L1 table we take."""
    for size, made in ((0, 0), (1, 512), (512, 512), (513, 1024), (16 << 40, 16 << 40)):
        path = tmp_path / f"{size}.qcow"
        assert enban.create(path, "qcow", size=size) == made
        assert enban.check(path).clean
        if made:
            assert json.loads(qemu_img("info", "--output=json", path))["virtual-size"] == made
    with pytest.raises(UsageError, match="too large for clusters of 4096 bytes"):
        enban.create(tmp_path / "x", "qcow", size=(16 << 40) + 1)
    enban.convert(tmp_path / "0.qcow", tmp_path / "0.raw")
    assert (tmp_path / "0.raw").read_bytes() == b""


# -- overlays ----------------------------------------------------------------------------------


def base_of(folder: Path, format: str) -> Path:
    """A base of 2 MiB + 512 bytes full of data."""
    path = folder / f"base.{format}"
    if format == "raw":
        path.touch()
        path.write_bytes(pattern(2 * MIB + 512, 5))
        return path
    (make_qcow2 if format == "qcow2" else make_qcow)(path, 2 * MIB + 512)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(pattern(2 * MIB + 512, 5), 0)
    return path


def overlay_of(base: Path, size: int, **settings: Any) -> tuple[Path, bytearray]:
    """A qcow overlay made by the job, with data and zeros in it, and what it reads."""
    path = base.parent / "top.qcow"
    options = {"backing_file": base.name, "backing_fmt": base.suffix[1:], **settings.pop("options", {})}
    enban.create(path, "qcow", options, size=size)
    model = bytearray(pattern(2 * MIB + 512, 5).ljust(size, b"\0")[:size])
    with enban.open(path, writable=True, **settings) as disk:
        for offset, data in ((1000, b"x" * 5000), (MIB - 3, b"y" * 7), (size - 700, b"z" * 600)):
            disk.pwrite(data, offset)
            model[offset : offset + len(data)] = data
        disk.write_zeroes(1200 * KIB, 100 * KIB)
        model[1200 * KIB : 1300 * KIB] = bytes(100 * KIB)
        assert disk.pread(size, 0) == model
    return path, model


@needs_qemu_img
@pytest.mark.parametrize("format", ["raw", "qcow2", "qcow"])
@pytest.mark.parametrize("size", [3 * MIB, 2 * MIB], ids=["longer", "shorter"])
def test_commit(tmp_path: Path, format: str, size: int) -> None:
    base = base_of(tmp_path, format)
    top, model = overlay_of(base, size)
    below = bytearray(pattern(2 * MIB + 512, 5).ljust(size, b"\0"))
    below[:size] = model
    enban.commit(str(top))
    assert reads(top) == model
    assert reads(base) == below
    with enban.open(top) as disk:
        assert all(extent.depth == 1 for extent in disk.map(0, 2 * MIB))
    assert check_sound(top.read_bytes()).read(bytes(below)) == model
    qemu_sees(top, bytes(model))


@needs_qemu_img
@pytest.mark.parametrize("format", ["raw", "qcow2", "qcow"])
@pytest.mark.parametrize("size", [3 * MIB, 2 * MIB], ids=["longer", "shorter"])
def test_rebase_to_none(tmp_path: Path, format: str, size: int) -> None:
    base = base_of(tmp_path, format)
    top, model = overlay_of(base, size)
    assert enban.rebase(str(top), "") > MIB
    base.unlink()
    assert reads(top) == model
    assert enban.image_info(str(top))[0].get("backing-filename") is None
    assert enban.check(top).clean
    qemu_sees(top, bytes(model))


@needs_qemu_img
def test_rebase_to_another_base(tmp_path: Path) -> None:
    top, model = overlay_of(base_of(tmp_path, "qcow2"), 3 * MIB)
    (tmp_path / "other.raw").write_bytes(pattern(MIB, 5) + b"o" * (2 * MIB))
    assert enban.rebase(str(top), "other.raw", "raw") > MIB
    (tmp_path / "base.qcow2").unlink()
    assert reads(top) == model
    qemu_sees(top, bytes(model))


@needs_qemu_img
@needs_cryptography
def test_an_encrypted_overlay_is_committed_and_rebased(tmp_path: Path) -> None:
    """Over a plain base, as QEMU allows; the passphrase is that of the overlay."""
    (tmp_path / "key").write_bytes(PASSPHRASE)
    base = base_of(tmp_path, "raw")
    top, model = overlay_of(base, 3 * MIB, options=AES, passphrase=PASSPHRASE)
    qemu_sees(top, bytes(model), tmp_path / "key")
    with pytest.raises(UsageError, match="no passphrase"):
        enban.commit(str(top))
    enban.commit(str(top), passphrase=PASSPHRASE, keep=True)
    assert base.read_bytes() == model
    enban.rebase(str(top), "", passphrase=PASSPHRASE)
    base.unlink()
    assert reads(top, PASSPHRASE) == model
    qemu_sees(top, bytes(model), tmp_path / "key")


# -- over NBD ----------------------------------------------------------------------------------


def nbd_uri(path: str) -> str:
    return f"nbd+unix:///?socket={path}"


@needs_qemu_img
@pytest.mark.parametrize("format", ["", "aes"], ids=["plain", "encrypted"])
def test_served_over_nbd_and_opened_by_asyncio(tmp_path: Path, format: str) -> None:
    """Written and read by many tasks at once through NBD; the image behind it is sound and right."""
    if format:
        pytest.importorskip("cryptography")
    path = make_qcow(tmp_path / "x.qcow", SIZE, **({"encrypt_format": format} if format else {}))
    passphrase = PASSPHRASE if format else None
    model = bytearray(SIZE)

    async def use(uri: str) -> None:
        async with await enban.aio.open(uri, writable=True, format="raw") as disk:
            assert disk.size == SIZE
            writes = [(number * 131_000 % (SIZE - 9000), 100 + number * 797) for number in range(10)]
            writes = [(at, n) for place, (at, n) in enumerate(writes) if not _meets(writes[:place], at, n)]
            for number, (offset, length) in enumerate(writes):
                model[offset : offset + length] = pattern(length, number + 1)
            await asyncio.gather(
                *(disk.pwrite(pattern(n, number + 1), at) for number, (at, n) in enumerate(writes))
            )
            await disk.write_zeroes(4096, 1000)
            model[4096:5096] = bytes(1000)
            await disk.flush()
            read = await asyncio.gather(*(disk.pread(4000, at) for at in range(0, SIZE - 4000, 100_003)))
            for number, data in enumerate(read):
                at = number * 100_003
                assert data == model[at : at + 4000], f"at {at}"

    with serving(open_disk(path, passphrase=passphrase), folder=tmp_path) as running:
        asyncio.run(use(nbd_uri(str(running.path))))
        qemu_img("convert", "-f", "raw", "-O", "raw", nbd_uri(str(running.path)), tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == model
    check_sound(path.read_bytes())
    assert reads(path, passphrase) == model

    async def directly() -> bytes:
        async with await enban.aio.open(path, passphrase=passphrase) as disk:
            return await disk.pread(disk.size, 0)

    assert asyncio.run(directly()) == model


def _meets(ranges: list[tuple[int, int]], offset: int, length: int) -> bool:
    return any(at < offset + length and offset < at + n for at, n in ranges)
