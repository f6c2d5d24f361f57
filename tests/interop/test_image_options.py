"""What is said of an image is taken as said or refused, as QEMU does; nothing is passed over in silence."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import enban
from enban.catalog import probe
from enban.errors import UsageError
from tests.cli.command import enban as run
from tests.cli.command import refused
from tests.support import KIB, MIB, make_qcow2, needs_qemu_img, pattern

pytestmark = pytest.mark.interop

REFUSED = (
    "driver=raw,file.filename=a.raw,ofset=64k",
    "driver=raw,file.filename=a.raw,size=64k,lazy-refcounts=on,frob=1",
    "driver=raw,file.filename=a.raw,file.offset=64k",
    "driver=raw,file.filename=a.raw,data-file=a.raw",
    "driver=qcow2,file.filename=a.qcow2,offset=64k",
    "driver=qcow2,file.filename=a.qcow2,file.frob=1",
    "driver=nbd,server.type=unix,server.path=s,frob=1",
    "driver=nbd,server.type=unix,server.path=s,server.frob=1",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.raw").write_bytes(pattern(256 * KIB))
    make_qcow2(Path("a.qcow2"), MIB)
    return tmp_path


@needs_qemu_img
@pytest.mark.parametrize("options", REFUSED)
def test_what_is_not_an_option_is_refused(folder: Path, options: str) -> None:
    """A misspelt offset, passed over, would be the wrong disk."""
    told = refused("map", "--image-opts", options)
    assert "has no option '" in told
    peer = subprocess.run(
        ["qemu-img", "map", "--image-opts", options], capture_output=True, text=True, timeout=60, check=False
    )
    assert peer.returncode == 1


def test_a_format_found_out_has_its_own_options_only(folder: Path) -> None:
    with enban.open({"filename": "a.raw", "offset": "64k", "size": "64k"}) as disk:
        assert disk.pread(disk.size, 0) == pattern(256 * KIB)[64 * KIB : 128 * KIB]
    with pytest.raises(UsageError, match="driver qcow2 has no option 'offset'"):
        enban.open({"filename": "a.qcow2", "offset": "64k"})
    with pytest.raises(UsageError, match="driver raw has no option 'data-file'"):
        enban.open({"filename": "a.raw", "data-file": "a.qcow2"})


def test_what_only_tunes_qemu_is_passed_over(folder: Path) -> None:
    words = "driver=qcow2,node-name=n,discard=unmap,cache.direct=on,l2-cache-size=1M,read-only=on"
    run("map", "--image-opts", f"{words},file.filename=a.qcow2,file.aio=native,file.auto-read-only=on")


def test_an_image_that_is_called_read_only_is_not_written(folder: Path) -> None:
    for options in (
        "driver=qcow2,file.filename=a.qcow2,read-only=on",
        "driver=qcow2,file.filename=a.qcow2,file.read-only=true",
    ):
        assert "read-only" in refused("resize", "--image-opts", options, "+1M")
        run("check", "-q", "--image-opts", options)
    run("resize", "--image-opts", "driver=qcow2,file.filename=a.qcow2,read-only=off", "+1M")


def test_a_format_is_not_the_file_of_another(folder: Path) -> None:
    """Its bytes, not its content, would have been the disk."""
    told = refused("map", "--image-opts", "driver=raw,file.driver=qcow2,file.file.filename=a.qcow2")
    assert "driver qcow2 cannot be the file of another driver" in told


STARTS = (
    *(b"version=1\n", b"version=2\r\n", b"version=3\n", b"version=4\n", b"version=1"),
    *(
        b"# x\nversion=1\n",
        b"# x\r\n# y\nversion=2\n",
        b"  \nversion=1\n",
        b" version=1\n",
        b"\r\nversion=1\n",
    ),
    *(
        b"#!/bin/sh\nfoo",
        b"COWD",
        b"KDMV",
        b"# Disk DescriptorFile\nversion=1\n",
        bytes(64) + b"\x7f\x10\xda\xbe",
    ),
    *(b"Bochs Virtual HD Image", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 "),
    *(b"QED\0", b"LUKS\xba\xbe\0\1", b"conectix", b"vhdxfile", b"WithoutFreeSpace\2\0\0\0"),
    *(
        b"WithouFreSpacExt\2\0\0\0",
        b"QFI\xfb\0\0\0\0",
        b"QFI\xfb\0\0\0\1",
        b"QFI\xfb\0\0\0\2",
        b"QFI\xfb\0\0\0\7",
    ),
)


@needs_qemu_img
@pytest.mark.parametrize("start", STARTS)
def test_what_qemu_takes_for_another_format_is_not_raw(folder: Path, start: bytes) -> None:
    """Else a guest could make a raw image, of a format that was guessed, one that QEMU opens otherwise."""
    Path("a.raw").write_bytes(start.ljust(MIB, b"\0"))
    peer = subprocess.run(
        ["qemu-img", "info", "a.raw"], capture_output=True, text=True, timeout=60, check=False
    )
    if peer.returncode or "file format: raw" not in peer.stdout:
        assert probe(start.ljust(512, b"\0")) != "raw"
        Path("a.raw").write_bytes(bytes(MIB))
        with enban.open("a.raw", writable=True) as disk, pytest.raises(UsageError, match="look like"):
            disk.pwrite(start, 0)
