"""`enban keys`: pictures, descriptions, and keys seen on a device or a terminal."""

from __future__ import annotations

import os
import pty
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from enban.guest.keyboard import layout, layout_names, qemu_keymap
from enban.guest.keyboard.keys import all_keys
from enban.guest.keyboard.picture import describe, draw, rows
from tests.cli.command import command, enban, environment, process, refused


def test_a_picture() -> None:
    lines = enban("keys", "show", "-k", "ja").out.splitlines()
    assert lines[2].split("|")[1:5] == ["     ", " !   ", ' "   ', " #   "]
    assert lines[3].split("|")[12:15] == [" -   ", " ^   ", " \\   "]
    assert "| Muh |" in lines[-2]


@pytest.mark.parametrize("name", layout_names())
def test_pictures_are_whole(name: str) -> None:
    chosen = layout(name)
    lines = draw(chosen)
    assert len({len(line) for line in lines}) == 1
    drawn = {key for row in rows(chosen) for key, _ in row}
    # Every key that a character is typed with is on it.
    assert {key.name for way in chosen.ways.values() for key, _ in way.presses} <= drawn | {"esc"}
    text = "".join(lines)
    for character in map(chr, range(0x21, 0x7F)):
        assert character in text or character.islower()


def test_how_a_character_is_typed() -> None:
    assert enban("keys", "show", "-k", "de", "^").out.startswith("'^' is typed with grave_accent, then spc\n")
    assert enban("keys", "show", "-k", "de", "\\").out.startswith("'\\' is typed with AltGr+minus\n")


@pytest.mark.parametrize("word", ["yen", "AE13", "<AE13>", "IntlYen", "0x7d", "132", "0x89"])
def test_a_key_by_any_name(word: str) -> None:
    out = enban("keys", "show", "-k", "ja", word).out
    assert "PC set 1              0x7d\n" in out
    assert "in layout ja          \\  Shift |" in out


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("Eisu_toggle", "caps_lock"),
        ("0xff2a", "grave_accent"),
        ("0xff21", "grave_accent"),  # Kanji, which no layout has: what a client means by it
        ("Henkan_Mode", "henkan"),
        ("0xff0d", "ret"),
    ],
)
def test_a_key_by_its_keysym(word: str, name: str) -> None:
    out = enban("keys", "show", "-k", "ja", word).out
    assert f"{word} as X keysym: {name}\n" in out


def test_keysyms_of_a_key() -> None:
    out = enban("keys", "show", "-k", "ja", "yen").out
    assert "  X keysyms             backslash 0x5c, bar 0x7c\n" in out
    refused("keys", "show", "-k", "en-us", "0xff2a")  # there the key has another meaning


def test_numbers_of_old_japanese_hosts() -> None:
    """XFree86 before 2004, on a Japanese keyboard only."""
    for number, name in (("120", "katakanahiragana"), ("123", "ro")):
        line = f"{number} as X keycode (kbd, before 2004): {name}\n"
        assert line in enban("keys", "show", "-k", "ja", number).out
        assert line not in enban("keys", "show", "-k", "de", number).out


def test_every_key_in_one_line() -> None:
    lines = enban("keys", "show", "-k", "ja", "--all").out.splitlines()
    assert [line.split()[0] for line in lines] == [key.name for key in all_keys()]
    (yen,) = [line for line in lines if line.startswith("yen ")]
    assert yen.split("  ")[-1].strip() == "\\ |"
    assert "evdev 124  X 132  kbd 133  set 1 7d  code IntlYen  QEMU yen  USB 89" in yen


def test_a_keymap_file_for_qemu() -> None:
    out = enban("keys", "show", "-k", "jp106", "--qemu-keymap").out
    assert out == qemu_keymap("ja", keysym_only=True)
    assert "U005c 0x7d  # backslash\n" in out and "Uff27 0x70  # Hiragana_Katakana\n" in out
    assert "each stand alone" in refused("keys", "show", "--all", "--qemu-keymap")
    assert "each stand alone" in refused("keys", "show", "--qemu-keymap", "a")


def test_numbers_name_their_world() -> None:
    out = enban("keys", "show", "124").out
    assert "124 as Linux evdev: yen\n" in out
    assert "124 as X keycode (evdev): power\n" in out


def test_every_key_is_described() -> None:
    for key in all_keys():
        assert describe(key, layout("ja"))[0] == key.name


@pytest.mark.parametrize(
    "words", [("show", "nokey"), ("show", "9999"), ("show", "あ"), ("show", "-k", "xx"), ("show", "")]
)
def test_what_is_refused(words: tuple[str, ...]) -> None:
    refused("keys", *words)


def events(*pairs: tuple[int, int]) -> bytes:
    sync = struct.pack("@llHHi", 0, 0, 0, 0, 0)
    return b"".join(struct.pack("@llHHi", 1, 2, 1, code, value) + sync for code, value in pairs)


def test_keys_of_a_device(tmp_path: Path) -> None:
    device = tmp_path / "event0"
    device.write_bytes(events((124, 1), (124, 2), (124, 0), (700, 1)))
    lines = enban("keys", "test", "-k", "ja", "--device", device).out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["press", "yen"],
        ["repeat", "yen"],
        ["release", "yen"],
        ["press", "evdev"],
    ]
    assert "X 132  kbd 133  set 1 7d  code IntlYen  QEMU yen" in lines[1]
    lines = enban("keys", "test", "--count", "1", "--device", device).out.splitlines()
    assert len(lines) == 2


def test_devices_that_are_none(tmp_path: Path) -> None:
    assert "no such file" in refused("keys", "test", "--device", tmp_path / "none")
    (tmp_path / "short").write_bytes(b"abc")
    assert "no input device" in refused("keys", "test", "--device", tmp_path / "short")
    assert "is no number" in refused("keys", "test", "--count", "x")


def test_a_pipe_for_a_terminal() -> None:
    done = subprocess.run(
        command("keys", "test", "-k", "de"),
        input="Äé\x01q\x1b[Aw\x1bOP\x1bx\x1b[1;5A\x1b[[B\x1b".encode(),
        capture_output=True,
        env=environment(),
        timeout=60,
    )
    lines = done.stdout.decode().splitlines()
    assert lines[1].startswith("Ä           Shift+apostrophe")
    assert lines[2].startswith("é           equal then e ")
    assert lines[3].startswith("U+0001      Ctrl+A")
    # Keys and sequences that were read at once are told apart.
    assert [line[12:].split()[0] for line in lines[4:8]] == ["q", "up", "w", "f1"]
    assert lines[8].startswith("Esc x       Alt with: x           x ")
    assert lines[9] == "Esc [ 1 ; 5 A a sequence of the terminal's own"
    assert [line[12:].split()[0] for line in lines[10:]] == ["f2", "esc"]


def test_a_terminal_is_put_back() -> None:
    """Characters and the terminal's sequences, then Ctrl-C; the terminal is as before."""
    import termios

    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    child = subprocess.Popen(
        command("keys", "test", "-k", "ja"),
        stdin=theirs,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith("Type")
    os.write(ours, b"\\")
    assert child.stdout.readline().startswith("\\           ro ")
    os.write(ours, b"\x1b[5~")
    assert child.stdout.readline().split()[:5] == ["Esc", "[", "5", "~", "pgup"]
    os.write(ours, b"\r")
    assert child.stdout.readline().startswith("U+000A      ret ")
    os.write(ours, b"\x03")
    assert child.wait(20) == 0
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_ctrl_c_is_the_way_to_end_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "event1")
    child = subprocess.Popen(
        command("keys", "test", "--device", tmp_path / "event1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    with (tmp_path / "event1").open("wb", buffering=0) as keys:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("Press")
        keys.write(events((30, 1)))
        assert child.stdout.readline().startswith("press    a ")
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 0
    assert child.stderr is not None and child.stderr.read() == ""


def test_without_a_reader() -> None:
    assert process("keys", "show").returncode == 0
    done = subprocess.run(
        f"{sys.executable} -m enban keys show | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.stderr == ""
