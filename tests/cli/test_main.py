"""Errors and exit codes: whatever goes wrong, one line and a number."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import enban as enban_package
import enban.cli.info as info_module
from enban.cli import main
from enban.errors import CorruptImageError, NoSpaceError
from tests.cli.command import command, enban, environment, process, refused
from tests.support import make_qcow2


def test_version() -> None:
    assert enban("--version").out == f"enban {enban_package.__version__}\n"
    assert enban("-V").out == enban("--version").out


def test_a_missing_image() -> None:
    for verb in ("info", "map", "check", "measure"):
        line = refused(verb, "no-such-image")
        assert "no-such-image" in line
        assert "no such file" in line


def test_an_image_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(600))
    assert str(path) in refused("info", path)
    assert "is a directory" in refused("info", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused("info", tmp_path / "pipe")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            CorruptImageError("broken", path="x", offset=4096, hint="mend it"),
            1,
            "x: broken (at offset 0x1000); mend it",
        ),
        (NoSpaceError("full", path="x"), 1, "x: full"),
        (PermissionError(13, "Permission denied", "name"), 1, "name: Permission denied"),
        (MemoryError(), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("surprise"), 70, "internal error (ValueError: surprise); please report it"),
        (CorruptImageError("two\nlines"), 1, "two\\x0alines"),
    ],
)
def test_one_line_for_every_error(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.delenv("ENBAN_DEBUG", raising=False)
    monkeypatch.setattr(info_module, "image_info", fail)
    assert refused("info", "x", code=code).startswith(f"enban: {text}")


def test_debugging_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ValueError("surprise")

    monkeypatch.setenv("ENBAN_DEBUG", "1")
    monkeypatch.setattr(info_module, "image_info", fail)
    with pytest.raises(ValueError, match="surprise"):
        main(["info", "x"])


def test_the_reader_goes_away(tmp_path: Path) -> None:
    """As with other programs: no message, and the exit code of SIGPIPE."""
    path = make_qcow2(tmp_path / "disk.qcow2", 64 << 20, cluster_size=512)
    with enban_package.open(path, writable=True) as disk:
        for cluster in range(0, 40000, 2):
            disk.pwrite(b"x", cluster * 512)
    with subprocess.Popen(
        command("map", "--output=json", path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(10)
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("info", path),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment(),
        )
    assert done.returncode == 1
    assert "No space left" in done.stderr.splitlines()[0]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A file name is bytes: it comes out as it went in."""
    name = os.fsencode(tmp_path) + b"/\xff\xfe.qcow2"
    make_qcow2(os.fsdecode(name), 1 << 20)
    done = subprocess.run(
        [os.fsencode(word) for word in command("info")] + [name],
        capture_output=True,
        check=True,
        env=environment(),
    )
    assert done.stdout.splitlines()[0] == b"image: " + name.replace(b"\xff\xfe", b"\\xdcff\\xdcfe")
    found = json.loads(process("info", "--output=json", os.fsdecode(name)).stdout)
    assert os.fsencode(found["filename"]) == name


def test_python_m_enban(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    done = process("info", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "virtual size: 1 MiB (1048576 bytes)" in done.stdout
    assert process("info", "missing").returncode == 1
