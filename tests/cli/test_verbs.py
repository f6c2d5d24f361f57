"""What the verbs make of their flags, and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import enban.cli.check as check_module
import enban.cli.convert as convert_module
from enban import SIBLINGS, TRUSTED
from enban import open as open_disk
from enban.jobs.copier import ConvertResult
from tests.cli.command import command, enban, environment, refused
from tests.support import KIB, MIB, make_qcow2, needs_qemu_img, pattern, qemu_img


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Catches the calls of convert instead of making them."""
    calls: list[dict[str, Any]] = []

    def convert(sources: list[Any], target: str, **options: Any) -> ConvertResult:
        calls.append({"sources": sources, "target": target, **options})
        result = ConvertResult(MIB)
        result.resumed_at = 10 * MIB if options["resume"] else 0
        result.verified = options["verify"]
        return result

    monkeypatch.setattr(convert_module, "convert", convert)
    return calls


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "a b",
            {"sources": ["a"], "target": "b", "target_format": "raw", "source_format": "", "gate": TRUSTED},
        ),
        ("a b c", {"sources": ["a", "b"], "target": "c"}),
        ("-f raw -O qcow2 a b", {"source_format": "raw", "target_format": "qcow2"}),
        (
            "-O qcow2 -o cluster_size=4k,compat=0.10 a b",
            {"options": {"cluster_size": "4k", "compat": "0.10"}},
        ),
        ("-cn a b", {"compress": True, "target_exists": True}),
        ("-S 64k a b", {"sparse_size": 65536}),
        ("-S 0 a b", {"sparse_size": 0}),
        ("a b", {"sparse_size": None, "workers": None, "compress": False, "offload": False}),
        ("-l snapshot.name=x a b", {"snapshot": "snapshot.name=x"}),
        ("-B base -F raw a b", {"backing": "base", "backing_format": "raw"}),
        ("-t none -T unsafe a b", {"target_cache": "none", "source_cache": "unsafe"}),
        ("a b", {"target_cache": "writeback", "source_cache": "writeback"}),
        ("-m 4 -WCU a b", {"workers": 4, "out_of_order": True, "offload": True, "force_share": True}),
        ("--verify --resume a b", {"verify": True, "resume": True}),
        ("--untrusted a b", {"gate": SIBLINGS}),
        ("- b", {"sources": ["-"]}),
        ("a -", {"target": "-"}),
        (
            "--image-opts driver=raw,file.filename=a b",
            {"sources": [{"driver": "raw", "file": {"filename": "a"}}]},
        ),
        (
            "-n --target-image-opts a driver=raw,file.filename=b",
            {"target": 'json:{"driver": "raw", "file": {"filename": "b"}}'},
        ),
    ],
)
def test_flags_of_convert(converted: list[dict[str, Any]], words: str, expected: dict[str, Any]) -> None:
    enban("convert", *words.split())
    (call,) = converted
    assert {key: call[key] for key in expected} == expected


@pytest.mark.parametrize(
    "words",
    [
        "a",
        "",
        "-m 0 a b",
        "-m 17 a b",
        "-m x a b",
        "-S x a b",
        "-t sometimes a b",
        "-o =1 a b",
        "--target-image-opts a driver=raw",
        "-n -O raw --target-image-opts a driver=raw",
        "-f raw --image-opts a b",
        "--image-opts a b",
        "-l snapshot.date=1 a b",
    ],
)
def test_flags_of_convert_that_are_refused(converted: list[dict[str, Any]], words: str) -> None:
    refused("convert", *words.split())
    refused("convert", "", "b")
    refused("convert", "a", "")
    assert converted == []


def test_what_convert_says(converted: list[dict[str, Any]]) -> None:
    assert enban("convert", "a", "b").out == ""
    assert enban("convert", "--resume", "--verify", "a", "b").out.splitlines() == [
        "resumed: 10 MiB were there already",
        "verified: the target reads back as the source",
    ]
    assert enban("convert", "-q", "--resume", "--verify", "a", "b").out == ""
    ran = enban("convert", "--verify", "a", "-")
    assert (ran.out, len(ran.err)) == ("", 1)  # standard output is the image


def test_options_are_listed() -> None:
    for verb, flag in (("create", "-f"), ("convert", "-O"), ("measure", "-O")):
        for asked in ("help", "?", "compat=1.1,help"):
            text = enban(verb, flag, "qcow2", "-o", asked).out
            assert "cluster_size=<size>" in text
            assert "lazy_refcounts=<bool (on/off)>" in text
        assert "preallocation=<str>" in enban(verb, flag, "raw", "-o", "help").out
        refused(verb, flag, "nonsense", "-o", "help")


def test_create_says_what_it_made(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    out = enban("create", "-f", "qcow2", "-o", "cluster_size=4k", path, "1M").out
    assert out == f"Formatting '{path}', fmt=qcow2 cluster_size=4k size=1048576\n"
    assert enban("create", "-q", "-f", "qcow2", path, "1M").out == ""


def test_an_untrusted_image_opens_no_other(tmp_path: Path) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(pattern(64 * KIB))
    (tmp_path / "in").mkdir()
    path = make_qcow2(tmp_path / "in" / "disk.qcow2", MIB, backing_file=str(secret), backing_fmt="raw")
    copy = tmp_path / "in" / "copy.raw"
    assert "not allowed" in refused("map", "--untrusted", path) or "outside" in refused(
        "map", "--untrusted", path
    )
    refused("convert", "--untrusted", path, copy)
    refused("compare", "--untrusted", path, path, code=2)
    refused("dd", "--untrusted", f"if={path}", f"of={copy}")
    refused("measure", "--untrusted", path)
    refused("commit", "--untrusted", path)
    refused("rebase", "--untrusted", "-b", "", path)
    refused("resize", "--untrusted", path, "2M")
    refused("info", "--untrusted", "--backing-chain", path)
    enban("info", "--untrusted", path)
    enban("check", "--untrusted", path)
    assert not copy.exists()
    enban("convert", path, copy)
    assert copy.read_bytes()[: 64 * KIB] == secret.read_bytes()


def test_an_image_in_use(tmp_path: Path) -> None:
    """Reading needs --force-share, writing is refused."""
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    with open_disk(path, writable=True):
        for verb in ("info", "map", "check", "measure"):
            assert "--force-share" in refused(verb, path)
            enban(verb, "-U", path)
            enban(verb, "--force-share", path)
        assert "--force-share" in refused("compare", path, path, code=2)
        enban("compare", "-U", path, path)
        refused("resize", path, "2M")
        refused("check", "-r", "all", path)
        refused("rebase", "-u", "-b", "", path)
        refused("create", "-f", "qcow2", path, "1M")
        refused("convert", path, tmp_path / "copy.raw")
        enban("convert", "-U", path, tmp_path / "copy.raw")


@needs_qemu_img
def test_a_backing_file_in_use(tmp_path: Path) -> None:
    """A new overlay needs nothing but its name and size, as for qemu-img. To read it needs -U."""
    base, alone = make_qcow2(tmp_path / "base.qcow2", MIB), make_qcow2(tmp_path / "alone.qcow2", MIB)
    for path in (base, alone):
        with open_disk(path, writable=True) as disk:
            disk.pwrite(path.name.encode(), 0)
    with open_disk(base, writable=True), open_disk(alone, writable=True):
        for name in ("theirs", "ours"):
            words = ("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", tmp_path / name)
            if name == "ours":
                enban(*words)
            else:
                qemu_img(*words)
            assert json.loads(enban("info", "--output=json", tmp_path / name).out)["virtual-size"] == MIB
        overlay = tmp_path / "ours"
        for target in ("", alone):
            more = ("-F", "qcow2") if target else ()
            assert "--force-share" in refused("rebase", "-b", target, *more, overlay)
        enban("rebase", "-U", "-b", alone, "-F", "qcow2", overlay)
        enban("rebase", "-U", "-b", "", overlay)
        with open_disk(overlay, writable=True) as disk:
            assert disk.pread(16, 0) == b"base.qcow2".ljust(16, b"\0")
            assert "stop it" in refused("rebase", "-U", "-b", "", overlay)  # the image itself stays locked


def test_check_without_a_check(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    assert "format raw has no check" in refused("check", tmp_path / "disk.raw", code=63)


def test_check_prints_findings_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    image = bytearray(path.read_bytes())
    image[2 * 65536 + 2 * 3 : 2 * 65536 + 2 * 3 + 2] = b"\0\2"  # the L1 table counted twice
    path.write_bytes(image)
    ran = enban("check", path, code=3)
    assert "1 leaked clusters were found on the image." in ran.out
    assert [line for line in ran.err if line.startswith("leak: ")]
    assert json.loads(enban("check", "--output=json", path, code=3).out)["leaks"] == 1
    assert enban("check", "-q", path, code=3).out == ""
    ran = enban("check", "-r", "leaks", path)
    assert (
        "The following inconsistencies were found and repaired:\n\n    1 leaked clusters\n    0 corruptions"
        in ran.out
    )
    assert "No errors were found on the image." in ran.out
    enban("check", path)
    assert check_module.EXIT_NO_CHECK == 63


def test_compare_says_where(tmp_path: Path) -> None:
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    one.write_bytes(pattern(MIB))
    other.write_bytes(pattern(MIB)[:-1] + b"?")
    assert enban("compare", one, other, code=1).out == "Content mismatch at offset 1048064!\n"
    assert enban("compare", one, one).out == "Images are identical.\n"
    refused("compare", one, code=2)
    refused("compare", "--frobnicate", one, one, code=2)
    refused("compare", one, tmp_path / "missing", code=2)


def test_compare_of_what_cannot_be_read(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    with open_disk(path, writable=True) as disk:
        disk.pwrite(pattern(MIB), 0)
    image = bytearray(path.read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    image[l1 + 1] = 0xFF  # an L2 table far beyond the end of the file
    path.write_bytes(image)
    other = tmp_path / "other.raw"
    other.write_bytes(pattern(MIB))
    assert "not inside the file" in refused("compare", path, other, code=4)


def test_dd_past_the_end(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(pattern(MIB))
    ran = enban("dd", "-f", "raw", f"if={source}", f"of={tmp_path / 'part.raw'}", "bs=1M", "skip=2")
    assert len(ran.err) == 1
    assert (tmp_path / "part.raw").stat().st_size == 0
    for words in (["if=x"], ["of=x"], ["if=x", "of=y", "obs=1"], ["x", "y"], ["if=x", "of=y", "bs=0"]):
        refused("dd", *words)


def test_rebase_needs_to_be_told(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    assert "-b" in refused("rebase", path)


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal a line is drawn and ended; -q leaves it out, and standard output stays clean."""
    if not hasattr(os, "openpty"):
        pytest.skip("there are no pseudo-terminals on this system")
    for flags, drawn in (([], True), (["-q"], False)):
        ours, theirs = os.openpty()
        with subprocess.Popen(
            command("convert", *flags, "-O", "qcow2", "-", tmp_path / "disk.qcow2"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=environment(),
        ) as running:
            os.close(theirs)
            assert running.stdin is not None
            running.stdin.write(pattern(8 * MIB))
            running.stdin.flush()
            time.sleep(0.5)
            running.stdin.write(pattern(8 * MIB))
            running.stdin.close()
            text = b""
            try:
                while piece := os.read(ours, 65536):
                    text += piece
            except OSError:  # the terminal's other end is closed
                pass
            assert running.wait(60) == 0
            assert running.stdout is not None
            assert running.stdout.read() == b""
        os.close(ours)
        if drawn:
            assert text.startswith(b"\rconvert  ")
            assert text.count(b"\r") >= 2
            assert b"16 MiB" in text
            assert text.endswith(b"\r\n")
        else:
            assert text == b""


def test_progress_without_a_terminal(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(pattern(MIB))
    ran = enban("dd", "-p", "-f", "raw", f"if={source}", f"of={tmp_path / 'copy.raw'}")
    assert len(ran.err) == 1
    assert "100 %  1 MiB of 1 MiB" in ran.err[0]
    assert enban("dd", "-f", "raw", f"if={source}", f"of={tmp_path / 'copy.raw'}").err == []
