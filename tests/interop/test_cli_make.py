"""create, resize, dd, rebase and commit: what they leave is what qemu-img leaves, and QEMU finds it clean."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import enban, refused
from tests.cli.zoo import overlay, scattered_qcow2
from tests.support import KIB, MIB, needs_qemu_img, needs_qemu_io, qemu_check, qemu_img, qemu_io

pytestmark = [pytest.mark.interop]


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", path, cwd=path.parent))
    return found


def reads_same(one: Path, other: Path) -> None:
    qemu_img("compare", one, other, cwd=one.parent)


OPTIONS = [
    "",
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "compression_type=zstd",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
    "preallocation=metadata,extended_l2=on",
    "preallocation=metadata,cluster_size=512,refcount_bits=1",
    "preallocation=full,compat=0.10,cluster_size=4k",
    "data_file=@.data",
    "data_file=@.data,data_file_raw=on",
    "data_file=@.data,preallocation=falloc",
]


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", ["0", "1000", "5M", "5000k"])
def test_create_qcow2(tmp_path: Path, options: str, size: str) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    flags = ["-o", options] if options else []
    enban("create", "-f", "qcow2", *(flag.replace("@", "ours") for flag in flags), ours, size)
    qemu_img(
        "create",
        "-q",
        "-f",
        "qcow2",
        *(flag.replace("@", "theirs") for flag in flags),
        theirs,
        size,
        cwd=tmp_path,
    )
    qemu_check(ours)
    mine, peers = info(ours), info(theirs)
    for found in (mine, peers):
        found["format-specific"]["data"].pop("data-file", None)
        del found["filename"]
        del found["actual-size"]  # theirs writes tables that ours leaves as holes
    assert mine == peers
    reads_same(ours, theirs)
    assert list(tmp_path.glob("*enban*")) == []
    if size != "0":
        qemu_io(ours, "write -P 3 0 512", "read -P 3 0 512", cwd=tmp_path)
        qemu_check(ours)


@needs_qemu_img
@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_create_raw(tmp_path: Path, mode: str) -> None:
    ours, theirs = tmp_path / "ours.raw", tmp_path / "theirs.raw"
    enban("create", "-f", "raw", "-o", f"preallocation={mode}", ours, "3000k")
    qemu_img("create", "-q", "-f", "raw", "-o", f"preallocation={mode}", theirs, "3000k")
    mine, peers = info(ours), info(theirs)
    assert mine["virtual-size"] == peers["virtual-size"] == 3000 * KIB
    assert mine["actual-size"] <= peers["actual-size"]
    assert mine["actual-size"] >= (0 if mode == "off" else 3000 * KIB)
    assert ours.read_bytes() == theirs.read_bytes()


@needs_qemu_img
def test_space_preallocated_is_there(tmp_path: Path) -> None:
    for mode in ("falloc", "full"):
        path = tmp_path / f"{mode}.qcow2"
        enban("create", "-q", "-f", "qcow2", "-o", f"preallocation={mode}", path, "8M")
        assert info(path)["actual-size"] >= 8 * MIB
    path = tmp_path / "metadata.qcow2"
    enban("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "8M")
    assert info(path)["actual-size"] < MIB


@needs_qemu_img
@needs_qemu_io
def test_create_over_a_backing_file(tmp_path: Path) -> None:
    base = scattered_qcow2(tmp_path / "base.qcow2")
    (tmp_path / "sub").mkdir()
    layer = tmp_path / "sub" / "layer.qcow2"
    enban("create", "-f", "qcow2", "-b", "../base.qcow2", "-F", "qcow2", layer)
    found = info(layer)
    assert found["virtual-size"] == 4 * MIB
    assert found["backing-filename"] == "../base.qcow2"
    assert found["backing-filename-format"] == "qcow2"
    reads_same(base, layer)
    qemu_check(layer)


@needs_qemu_img
@pytest.mark.parametrize(
    "words",
    [
        ["-f", "qcow2", "x.qcow2"],  # no size
        ["-f", "qcow2", "-o", "nonsense=1", "x.qcow2", "1M"],
        ["-f", "qcow2", "-o", "cluster_size=1000", "x.qcow2", "1M"],
        ["-f", "qcow2", "-o", "cluster_size=4M", "x.qcow2", "1M"],
        ["-f", "qcow2", "-o", "refcount_bits=3", "x.qcow2", "1M"],
        ["-f", "qcow2", "-o", "compat=0.10,lazy_refcounts=on", "x.qcow2", "1M"],
        ["-f", "qcow2", "-o", "compat=0.10,extended_l2=on", "x.qcow2", "1M"],
        ["-f", "qcow2", "-o", "extended_l2=on,cluster_size=8k", "x.qcow2", "1M"],
        ["-f", "qcow2", "-o", "data_file_raw=on", "x.qcow2", "1M"],
        ["-f", "qcow2", "-o", "preallocation=some", "x.qcow2", "1M"],
        ["-f", "qcow2", "-o", "lazy_refcounts=perhaps", "x.qcow2", "1M"],
        ["-f", "qcow2", "-b", "base.raw", "x.qcow2", "1M"],  # no format of the backing file
        ["-f", "qcow2", "-F", "raw", "x.qcow2", "1M"],  # a format without a file
        ["-f", "qcow2", "-b", "missing", "-F", "raw", "x.qcow2", "1M"],
        ["-f", "qcow2", "-u", "-b", "missing", "-F", "raw", "x.qcow2"],
        ["-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o", "preallocation=full", "x.qcow2"],
        ["-f", "raw", "-b", "base.raw", "-F", "raw", "x.raw"],
        ["-f", "raw", "-o", "preallocation=metadata", "x.raw", "1M"],
        ["-f", "raw", "-o", "size=1M", "x.raw", "1M"],
        ["-f", "raw", "x.raw", "-1M"],
        ["-f", "raw", "x.raw", "8E"],
        ["-f", "vhdy", "x.raw", "1M"],
        ["-f", "qcow2", "-o", "cluster_size=512", "x.qcow2", "1P"],
    ],
)
def test_create_refuses_what_qemu_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(bytes(1 * MIB))
    qemu_img("create", *words, ok=(1,))
    for left in tmp_path.glob("x.*"):
        left.unlink()  # QEMU leaves some behind
    refused("create", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["base.raw"]


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize(
    "options", ["", "compat=0.10", "cluster_size=512", "extended_l2=on", "data_file=x.data"]
)
@pytest.mark.parametrize("change", ["+1M", "+512", "6M", "-1M", "100k", "512", "-4000k"])
def test_resize_qcow2(tmp_path: Path, options: str, change: str) -> None:
    path = scattered_qcow2(tmp_path / "disk.qcow2", *([options] if options else []))
    before = tmp_path / "before.raw"
    qemu_img("convert", "-O", "raw", path, before, cwd=tmp_path)
    enban("resize", "--shrink", path, change)
    qemu_img("resize", "-q", "-f", "raw", "--shrink", before, "--", change)
    qemu_check(path)
    assert info(path)["virtual-size"] == info(before)["virtual-size"]
    reads_same(path, before)


@needs_qemu_img
@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_resize_with_preallocation(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    enban("resize", f"--preallocation={mode}", path, "9M")
    qemu_check(path)
    assert (info(path)["actual-size"] >= 8 * MIB) == (mode != "metadata")
    if mode != "metadata":
        raw = tmp_path / "disk.raw"
        raw.write_bytes(b"\x01" * MIB)
        enban("resize", "-f", "raw", f"--preallocation={mode}", raw, "9M")
        assert raw.read_bytes() == b"\x01" * MIB + bytes(8 * MIB)
        assert info(raw)["actual-size"] >= 9 * MIB


@needs_qemu_img
@pytest.mark.parametrize(
    "words",
    [
        ["disk.qcow2", "512k"],  # smaller without --shrink
        ["disk.qcow2", "--", "-512k"],
        ["--shrink", "disk.qcow2", "0"],
        ["--shrink", "disk.qcow2", "--", "-2M"],
        ["disk.qcow2", "+1000"],  # not whole sectors
        ["disk.qcow2", "huge"],
        ["--preallocation=full", "disk.qcow2", "1M"],  # not grown
        ["--shrink", "--preallocation=full", "disk.qcow2", "512k"],
        ["disk.qcow2"],
        ["missing.qcow2", "2M"],
    ],
)
def test_resize_refuses_what_qemu_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "1M")
    content = Path("disk.qcow2").read_bytes()
    qemu_img("resize", *words, ok=(1,))
    refused("resize", *words)
    assert Path("disk.qcow2").read_bytes() == content


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize(
    "words",
    [
        "bs=1M",
        "bs=1M count=2",
        "bs=1M skip=1",
        "bs=64k count=17",
        "bs=1000 count=77",
        "bs=3000 skip=500",
        "count=100",
        "bs=1M count=100",
        "bs=5M skip=1",
        "bs=1M skip=4",
    ],
)
@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_dd(tmp_path: Path, words: str, target: str) -> None:
    source = scattered_qcow2(tmp_path / "disk.qcow2")
    ours, theirs = tmp_path / f"ours.{target}", tmp_path / f"theirs.{target}"
    arguments = ["-O", target, f"if={source}", *words.split()]
    enban("dd", *arguments, f"of={ours}")
    qemu_img("dd", *arguments, f"of={theirs}")
    assert info(ours)["virtual-size"] == info(theirs)["virtual-size"]
    reads_same(ours, theirs)
    if target == "qcow2":
        qemu_check(ours)


@needs_qemu_img
def test_dd_counts_as_dd_does(tmp_path: Path) -> None:
    source, ours, theirs = (tmp_path / name for name in ("disk.raw", "ours.raw", "theirs.raw"))
    source.write_bytes(bytes(range(256)) * 400)
    words = ["bs=1024", "skip=3", "count=5"]
    enban("dd", "-f", "raw", f"if={source}", f"of={ours}", *words)
    subprocess.run(["dd", f"if={source}", f"of={theirs}", *words], check=True, capture_output=True)
    assert ours.read_bytes() == theirs.read_bytes()


def make_chain(folder: Path, top_options: str = "", base_format: str = "qcow2") -> tuple[Path, Path, Path]:
    """base <- middle <- top, with data, zeros and holes in each."""
    folder.mkdir(exist_ok=True)
    base = scattered_qcow2(folder / "base.qcow2")
    if base_format == "raw":
        qemu_img("convert", "-O", "raw", base, folder / "base.raw")
        base = folder / "base.raw"
    middle = overlay(folder / "middle.qcow2", base, base_format, "cluster_size=4k")
    qemu_io(middle, "write -P 21 200k 30k", "write -z 1M 8k", "discard 3100k 50k", "write -P 23 3500k 8k")
    top = overlay(folder / "top.qcow2", middle, "qcow2", *([top_options] if top_options else []), size="5M")
    qemu_io(top, "write -P 22 64k 64k", "write -z 2M 64k", "write -P 24 4500k 20k")
    return base, middle, top


TOP_OPTIONS = ["", "compat=0.10", "cluster_size=512", "extended_l2=on", "cluster_size=2M"]


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("options", TOP_OPTIONS)
@pytest.mark.parametrize("onto", ["none", "base", "longer", "shorter", "raw"])
def test_rebase_keeps_the_content(tmp_path: Path, options: str, onto: str) -> None:
    base, _, top = make_chain(tmp_path, options)
    before = tmp_path / "before.raw"
    qemu_img("convert", "-O", "raw", top, before)
    others = {"none": ("", ""), "base": (base.name, "qcow2")}
    for name, size in (("longer", "9M"), ("shorter", "1500k")):
        other = tmp_path / f"{name}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", other, size)
        qemu_io(other, "write -P 61 0 300k", "write -P 1 700k 64k")
        others[name] = (other.name, "qcow2")
    (tmp_path / "other.raw").write_bytes(b"\x05" * (2 * MIB + 700))
    others["raw"] = ("other.raw", "raw")
    name, format = others[onto]
    flags = ["-b", name, *(["-F", format] if format else [])]
    enban("rebase", *flags, top)
    qemu_check(top)
    found = info(top)
    assert found.get("backing-filename", "") == name
    assert found.get("backing-filename-format", "") == format
    reads_same(top, before)


@needs_qemu_img
@needs_qemu_io
def test_rebase_over_a_layer_copies_only_that_layer(tmp_path: Path) -> None:
    """The image grows no more than by what the layer left out held."""
    base, _, top = make_chain(tmp_path)
    theirs = tmp_path / "theirs.qcow2"
    shutil.copy(top, theirs)
    enban("rebase", "-b", base.name, "-F", "qcow2", top)
    qemu_img("rebase", "-b", base.name, "-F", "qcow2", theirs)
    reads_same(top, theirs)
    assert top.stat().st_size <= theirs.stat().st_size


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("options", TOP_OPTIONS)
def test_unsafe_rebase_changes_the_name_alone(tmp_path: Path, options: str) -> None:
    base, middle, top = make_chain(tmp_path, options)
    layout = qemu_img("map", "--output=json", top)
    (tmp_path / "moved").mkdir()
    middle.rename(tmp_path / "moved" / "renamed.qcow2")
    base.rename(tmp_path / "moved" / base.name)
    for name in (
        "moved/renamed.qcow2",
        "./moved/../moved/renamed.qcow2",
        str(tmp_path / "moved/renamed.qcow2"),
    ):
        enban("rebase", "-u", "-b", name, "-F", "qcow2", top)
        qemu_check(top)
        assert info(top)["backing-filename"] == name
        assert info(top)["backing-filename-format"] == "qcow2"
        assert qemu_img("map", "--output=json", top) == layout
    enban("rebase", "-u", "-b", "", top)
    assert "backing-filename" not in info(top)
    qemu_check(top)
    enban("rebase", "-u", "-b", "moved/renamed.qcow2", "-F", "qcow2", top)
    assert qemu_img("map", "--output=json", top) == layout


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("options", TOP_OPTIONS)
@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
@pytest.mark.parametrize("flags", [[], ["-d"], ["-b", "base"], ["-d", "-b", "middle.qcow2"]])
def test_commit(tmp_path: Path, options: str, base_format: str, flags: list[str]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    base, middle, top = make_chain(ours, options, base_format)
    shutil.copytree(ours, theirs)
    before = tmp_path / "before.raw"
    qemu_img("convert", "-O", "raw", top, before)
    flags = [base.name if flag == "base" else flag for flag in flags]
    enban("commit", *flags, top)
    qemu_img("commit", *flags, "top.qcow2", cwd=theirs)
    for path in (base, middle, top):
        peers = theirs / path.name
        reads_same(path, peers)
        assert info(path)["virtual-size"] == info(peers)["virtual-size"]
        if path.suffix == ".qcow2":
            qemu_check(path)
    reads_same(top, before)
    if flags in ([], ["-d"]):
        mine, peers_map = (
            [
                entry
                for entry in json.loads(qemu_img("map", "--output=json", folder / "top.qcow2"))
                if entry["depth"] == 0
            ]
            for folder in (ours, theirs)
        )
        assert [(e["start"], e["length"], e["data"]) for e in mine if e["present"]] == [
            (e["start"], e["length"], e["data"]) for e in peers_map if e["present"]
        ]


@needs_qemu_img
@needs_qemu_io
def test_commit_gives_the_space_back(tmp_path: Path) -> None:
    _base, _middle, top = make_chain(tmp_path)
    qemu_io(top, "write -P 77 0 4M")
    enban("commit", top)
    report = qemu_check(top)
    assert report.get("allocated-clusters", 0) == 0
    assert info(top)["actual-size"] < MIB


@needs_qemu_img
@needs_qemu_io
def test_commit_of_an_image_with_snapshots(tmp_path: Path) -> None:
    """A snapshot of the overlay keeps the clusters it shares."""
    _base, _middle, top = make_chain(tmp_path)
    qemu_img("snapshot", "-c", "kept", top)
    qemu_io(top, "write -P 78 64k 4k", "write -P 79 1M 64k")
    snapshot = tmp_path / "snapshot.raw"
    before = tmp_path / "before.raw"
    qemu_img("convert", "-O", "raw", top, before)
    enban("commit", top)
    qemu_check(top)
    reads_same(top, before)
    qemu_img("convert", "-l", "kept", "-O", "raw", top, snapshot)
    assert snapshot.read_bytes()[64 * KIB : 128 * KIB] == b"\x16" * (64 * KIB)
