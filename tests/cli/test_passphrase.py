"""Passphrases of encrypted images: asked for at a terminal, in files, and by --object."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest

import enban as library
from tests.cli.command import command, enban, environment, refused
from tests.qcow_support import PASSPHRASE, needs_cryptography
from tests.support import MIB, pattern

pytestmark = needs_cryptography

WEAK = "enban: warning: the encryption of qcow images is weak; use it only where an old program needs it"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw disk and a key file; names in the tests are relative to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal, wherever the tests run
    (tmp_path / "a.raw").write_bytes(pattern(MIB))
    (tmp_path / "key").write_bytes(PASSPHRASE)
    return tmp_path


def at_terminal(*words: str, answers: list[str], code: int = 0) -> str:
    """Run a command at a terminal and answer each question that ends with ': '; what it showed."""
    own, other = pty.openpty()
    with subprocess.Popen(
        command(*words), stdin=other, stdout=other, stderr=other, env=environment(), start_new_session=True
    ) as running:
        os.close(other)
        shown, left, deadline = b"", list(answers), time.monotonic() + 60
        try:
            while True:
                assert time.monotonic() < deadline, shown
                if not select.select([own], [], [], 1)[0]:
                    continue
                try:
                    more = os.read(own, 4096)
                except OSError:  # the other end is closed
                    break
                if not more:
                    break
                shown += more
                if shown.endswith(b": ") and left:
                    time.sleep(0.1)  # echo is switched off around the question
                    os.write(own, left.pop(0).encode() + b"\n")
            assert running.wait(30) == code, shown
        finally:
            if running.poll() is None:
                running.kill()
            os.close(own)
    assert not left, shown
    return shown.decode().replace("\r\n", "\n")


def test_asked_for_at_a_terminal(folder: Path) -> None:
    word = PASSPHRASE.decode()
    make = ("convert", "-f", "raw", "-O", "qcow", "-o", "encrypt.format=aes", "a.raw", "x.qcow")
    shown = at_terminal(*make, answers=[word, word])
    assert f"Passphrase of {folder}/x.qcow: \nAgain: \n" in shown and WEAK in shown
    assert word not in shown
    with library.open("x.qcow", passphrase=PASSPHRASE) as disk:
        assert disk.pread(MIB, 0) == pattern(MIB)
    shown = at_terminal("convert", "x.qcow", "y.raw", answers=[word])
    assert "Passphrase of x.qcow: " in shown and "Again" not in shown
    assert Path("y.raw").read_bytes() == pattern(MIB)


def test_what_is_refused_at_a_terminal(folder: Path) -> None:
    make = ("convert", "-q", "-f", "raw", "-O", "qcow", "-o", "encryption=on", "a.raw", "x.qcow")
    assert "enban: " + str(folder / "x.qcow") + ": the two passphrases differ" in at_terminal(
        *make, answers=["one", "two"], code=1
    )
    assert "an empty passphrase protects nothing" in at_terminal(*make, answers=[""], code=1)
    assert sorted(os.listdir()) == ["a.raw", "key"]


def test_key_files_and_secrets(folder: Path) -> None:
    secret = ("--object", "secret,id=s0,file=key")
    source = "driver=qcow,encrypt.key-secret=s0,file.filename="
    made = enban("create", "-f", "qcow", "-o", "encryption=on", "new.qcow", "1M")
    assert made.err == [WEAK]
    assert not enban("create", "-q", "-f", "qcow", "-o", "encryption=on", "new.qcow", "1M").err
    for name, options in (("x", "encrypt.key-file=key"), ("y", "encrypt.key-secret=s0")):
        words = ("-f", "raw", "-O", "qcow", "-o", f"encrypt.format=aes,{options}", "a.raw", f"{name}.qcow")
        assert enban("convert", *secret, *words).err == [WEAK]
        enban("compare", *secret, "--image-opts", "driver=raw,file.filename=a.raw", f"{source}{name}.qcow")
    enban("dd", *secret, "--image-opts", f"if={source}x.qcow", "of=part.raw", "bs=1k", "count=2")
    assert Path("part.raw").read_bytes() == pattern(2048)
    json_name = '{"driver": "qcow", "encrypt.key-secret": "s0", "file.filename": "x.qcow"}'
    enban("convert", *secret, f"json:{json_name}", "z.raw")
    assert Path("z.raw").read_bytes() == pattern(MIB)
    # into an image that is there
    target = ("-n", "--target-image-opts", "-f", "raw", "a.raw", f"{source}new.qcow")
    enban("convert", *secret, *target)
    with library.open("new.qcow", passphrase=PASSPHRASE) as disk:
        assert disk.pread(MIB, 0) == pattern(MIB)


def test_tables_are_read_without_a_passphrase(folder: Path) -> None:
    enban(
        *("convert", "-f", "raw", "-O", "qcow", "-o", "encrypt.format=aes,encrypt.key-file=key"),
        *("a.raw", "x.qcow"),
    )
    assert '"data": true' in enban("map", "--output=json", "x.qcow").out
    assert "encrypted: yes" in enban("info", "x.qcow").out
    assert enban("check", "x.qcow").out.startswith("No errors")
    enban("measure", "-O", "qcow2", "x.qcow")


def test_verbs_that_need_no_passphrase_know_secrets_too(folder: Path) -> None:
    """So that one name of an image, with its secret, goes with every verb."""
    enban("create", "-q", "-f", "qcow", "-o", "encryption=on", "-b", "a.raw", "-F", "raw", "x.qcow")
    secret = ("--object", "secret,id=s0,file=key", "--image-opts")
    name = "driver=qcow,encrypt.key-secret=s0,file.filename=x.qcow"
    assert "encrypted: yes" in enban("info", *secret, name).out
    assert enban("check", *secret, name).out.startswith("No errors")
    enban("map", "--output=json", *secret, name)
    enban("measure", "-O", "qcow2", *secret, name)
    assert enban("snapshot", "-l", *secret, name).out == ""
    assert "has no dirty bitmaps" in refused("bitmap", "--add", *secret, name, "b")
    assert "nothing can be amended" in refused("amend", "-o", "compat=1.1", *secret, name)
    enban("stream", *secret, name)
    Path("a.raw").unlink()
    with library.open("x.qcow", passphrase=PASSPHRASE) as disk:
        assert disk.pread(MIB, 0) == pattern(MIB)


def test_one_line_for_what_is_missing_or_wrong(folder: Path) -> None:
    enban(
        *("convert", "-f", "raw", "-O", "qcow", "-o", "encrypt.format=aes,encrypt.key-file=key"),
        *("a.raw", "x.qcow"),
    )
    opts = "driver=qcow,encrypt.key-secret=s0,file.filename=x.qcow"
    to_raw = ("--image-opts", opts, "y.raw")
    assert "there is no secret 's0'" in refused("convert", *to_raw)
    for text, complaint in (
        ("secret,id=s0,data=x", "is not known; give a passphrase as secret,id=NAME,file=FILE"),
        ("secret,id=s0", "must be a file"),
        ("secret,id=s0,file=key,format=base64", "must be a file with the passphrase as it is"),
        ("tls-creds-x509,id=s0", "is not known"),
        ("secret,id=s0,file=nothing", "nothing: cannot read the key file: no such file"),
    ):
        assert complaint in refused("convert", "--object", text, *to_raw)
    assert "no passphrase was given" in refused("convert", "x.qcow", "y.raw")
    assert "no passphrase was given" in refused("serve", "x.qcow")
    assert "only qcow images can be made encrypted" in refused(
        "create", "-f", "qcow2", "-o", "encrypt.format=aes", "z", "1M"
    )
