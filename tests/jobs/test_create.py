"""Creating images: options by name, sizes, backing files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import enban
from enban.errors import GateError, HostError, UsageError
from enban.jobs.create import FORMATS, create, option_table, prepare_target, read_options
from enban.jobs.dd import dd
from enban.jobs.measure import measure
from enban.jobs.resize import parse_change, resize
from tests.support import KIB, MIB, check_file, make_qcow2, pattern


def test_options_are_read_by_kind() -> None:
    values = read_options(
        "qcow2",
        {"cluster_size": "64k", "lazy_refcounts": "on", "refcount_bits": "8", "compat": "1.1", "size": "1M"},
    )
    assert values == {
        "cluster_size": 65536,
        "lazy_refcounts": True,
        "refcount_bits": 8,
        "compat": "1.1",
        "size": MIB,
    }


@pytest.mark.parametrize(
    ("format", "options", "text"),
    [
        ("qcow2", {"colour": "red"}, "has no option 'colour'"),
        ("qcow2", {"refcount_bits": "-1"}, "needs a number"),
        ("qcow2", {"lazy_refcounts": "maybe"}, "is on or off"),
        ("qcow2", {"cluster_size": "big"}, "is not a size"),
        ("qcow2", {"encrypt.format": "luks"}, "has no option 'encrypt.format'; only qcow"),
        ("raw", {"backing_file": "x"}, "cannot have a backing file"),
        ("raw", {"cluster_size": "64k"}, "has no option"),
        ("vmdk", {}, "cannot be made"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, format: str, options: dict[str, str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        create(str(tmp_path / "x"), format, options, size=MIB)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(tmp_path: Path, format: str) -> None:
    path = tmp_path / "disk"
    assert create(str(path), format, size=MIB + 1) == MIB + 512
    with enban.open(path, writable=True, format=format) as disk:
        assert disk.size == MIB + 512
        assert disk.pread(disk.size, 0) == bytes(MIB + 512)
        disk.pwrite(b"x", MIB)
    assert {option.name for option in option_table(format)} >= {"size"}


@pytest.mark.parametrize("base_format", ["raw", "qcow2", "qcow"])
@pytest.mark.parametrize("format", ["qcow2", "qcow"])
def test_size_from_the_backing_file(tmp_path: Path, format: str, base_format: str) -> None:
    create(str(tmp_path / "base"), base_format, size=3 * MIB)
    with enban.open(tmp_path / "base", writable=True, format=base_format) as disk:
        disk.pwrite(b"below", 5000)
    options = {"backing_file": "base", "backing_fmt": base_format}
    assert create(str(tmp_path / "top"), format, options) == 3 * MIB
    with enban.open(tmp_path / "top", format=format) as disk:
        assert disk.pread(5, 5000) == b"below"
    assert create(str(tmp_path / "top"), format, options, size=MIB) == MIB


def test_the_format_of_the_backing_file_must_be_said(tmp_path: Path) -> None:
    make_qcow2(tmp_path / "base", MIB)
    with pytest.raises(UsageError, match="looks like qcow2: add -F qcow2"):
        create(str(tmp_path / "top"), "qcow2", {"backing_file": "base"})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_image_cannot_be_its_own_base(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", MIB)
    content = path.read_bytes()
    for name in ("disk", "./disk", str(path)):
        with pytest.raises(UsageError, match="its own backing file"):
            create(str(path), "qcow2", {"backing_file": name, "backing_fmt": "qcow2"})
    # Nor may it replace an image further down its own chain.
    make_qcow2(tmp_path / "layer", MIB, backing_file="disk", backing_fmt="qcow2")
    for size in (None, MIB):
        with pytest.raises(UsageError, match="of its own backing chain"):
            create(str(path), "qcow2", {"backing_file": "layer", "backing_fmt": "qcow2"}, size=size)
    create(str(tmp_path / "external"), "qcow2", {"data_file": "data"}, size=MIB)
    data = (tmp_path / "data").read_bytes()
    with pytest.raises(UsageError, match="of its own backing chain"):
        create(str(tmp_path / "data"), "qcow2", {"backing_file": "external", "backing_fmt": "qcow2"})
    assert (tmp_path / "data").read_bytes() == data
    assert path.read_bytes() == content


def test_the_gate_holds_below_the_named_file(tmp_path: Path) -> None:
    """The caller named the backing file; what that one names is up to the gate."""
    outside = make_qcow2(tmp_path / "outside", MIB)
    (tmp_path / "in").mkdir()
    make_qcow2(tmp_path / "in" / "base", MIB, backing_file=str(outside), backing_fmt="qcow2")
    options = {"backing_file": "base", "backing_fmt": "qcow2"}
    with pytest.raises(GateError):
        create(str(tmp_path / "in" / "top"), "qcow2", options, gate=enban.SIBLINGS)
    create(str(tmp_path / "in" / "top"), "qcow2", options, gate=enban.TRUSTED)
    named = {"backing_file": str(outside), "backing_fmt": "qcow2"}
    create(str(tmp_path / "in" / "other"), "qcow2", named, gate=enban.SIBLINGS)


def test_a_target_reads_its_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(pattern(MIB))
    options = {"backing_file": "base.raw", "backing_fmt": "raw"}
    with prepare_target(str(tmp_path / "top"), "qcow2", options, size=MIB) as target:
        target.disk.pwrite(b"own", 100)
        assert target.disk.pread(200, 0) == pattern(MIB)[:100] + b"own" + pattern(MIB)[103:200]
        target.commit()
    check_file(tmp_path / "top")


@pytest.mark.parametrize(
    ("text", "size"), [("5M", 5 * MIB), ("+1M", 3 * MIB), ("-1M", MIB), ("+0", 2 * MIB), ("1k", KIB)]
)
def test_changes_of_size(text: str, size: int) -> None:
    assert parse_change(text, 2 * MIB) == size


@pytest.mark.parametrize("text", ["0", "-2M", "-3M", "", "+", "x", "+-1", "1.5.5M"])
def test_changes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_change(text, 2 * MIB)


def test_shrinking_must_be_asked_for(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk", 2 * MIB)
    with enban.open(path, writable=True) as disk:
        with pytest.raises(UsageError, match="--shrink"):
            resize(disk, MIB)
        with pytest.raises(UsageError, match="growing only"):
            resize(disk, MIB, shrink=True, preallocation="full")
        assert disk.size == 2 * MIB
        resize(disk, MIB, shrink=True)
        assert disk.size == MIB
    check_file(path)


def test_dd_takes_no_more_space_than_there_is_data(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    content = bytearray(8 * MIB)
    content[MIB : MIB + 70 * KIB] = pattern(70 * KIB)
    source.write_bytes(content)
    with enban.open(source, format="raw") as disk:
        result = dd(disk, str(tmp_path / "part.raw"), block_size=1000, skip=100, count=5000)
        assert (result.length, result.beyond) == (5_000_000, False)
        beyond = dd(disk, str(tmp_path / "none.raw"), block_size=MIB, skip=9)
        assert (beyond.length, beyond.beyond) == (0, True)
        with pytest.raises(UsageError):
            dd(disk, str(tmp_path / "x.raw"), block_size=0)
    part = tmp_path / "part.raw"
    assert part.read_bytes()[:5_000_000] == content[100_000:5_100_000]
    assert part.stat().st_blocks * 512 < 100 * KIB


def test_dd_onto_its_own_source(tmp_path: Path) -> None:
    source = make_qcow2(tmp_path / "disk.qcow2", MIB)
    content = source.read_bytes()
    with enban.open(source) as disk, pytest.raises(HostError):
        dd(disk, str(source), "qcow2")
    assert source.read_bytes() == content


def test_what_was_measured_is_enough(tmp_path: Path) -> None:
    """An image written full is no larger than measure said."""
    for options in (
        {},
        {"cluster_size": "512"},
        {"extended_l2": "on"},
        {"refcount_bits": "64", "cluster_size": "4k"},
    ):
        told = measure("qcow2", options, size=3 * MIB)
        path = tmp_path / "disk.qcow2"
        create(str(path), "qcow2", options, size=3 * MIB)
        with enban.open(path, writable=True) as disk:
            disk.pwrite(pattern(3 * MIB), 0)
            filled = measure("qcow2", options, source=disk)
        assert path.stat().st_size <= told["fully-allocated"]
        assert filled["required"] == filled["fully-allocated"] == told["fully-allocated"]
        assert told["required"] < told["fully-allocated"]


@pytest.mark.parametrize("wrong", [{}, {"size": MIB, "options": {"size": "1M"}}])
def test_what_cannot_be_measured(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        measure("qcow2", **wrong)
