"""The table of keys, against the data it is made of and against the facts of Japanese keyboards."""

from __future__ import annotations

import csv
import ctypes.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from enban.errors import UsageError
from enban.guest.keyboard import keys
from enban.guest.keyboard.keys import all_keys, by_name, from_browser, from_evdev, from_vnc, from_x, x_driver
from enban.guest.keyboard.layouts import layout

ROOT = Path(__file__).parents[3]

# name, set 1, QKeyCode, evdev, X evdev, X kbd (None: not there), KeyboardEvent.code
JAPANESE = (
    ("grave_accent", 0x29, "grave_accent", 41, 49, 49, "Backquote"),
    ("yen", 0x7D, "yen", 124, 132, 133, "IntlYen"),
    ("ro", 0x73, "ro", 89, 97, 211, "IntlRo"),
    ("henkan", 0x79, "henkan", 92, 100, 129, "Convert"),
    ("muhenkan", 0x7B, "muhenkan", 94, 102, 131, "NonConvert"),
    ("katakanahiragana", 0x70, "katakanahiragana", 93, 101, 208, "KanaMode"),
    ("hiragana", 0x77, "hiragana", 91, 99, None, "Lang4"),
    ("equal", 0x0D, "equal", 13, 21, 21, "Equal"),
    ("minus", 0x0C, "minus", 12, 20, 20, "Minus"),
    ("bracket_left", 0x1A, "bracket_left", 26, 34, 34, "BracketLeft"),
    ("bracket_right", 0x1B, "bracket_right", 27, 35, 35, "BracketRight"),
    ("backslash", 0x2B, "backslash", 43, 51, 51, "Backslash"),
    ("semicolon", 0x27, "semicolon", 39, 47, 47, "Semicolon"),
    ("apostrophe", 0x28, "apostrophe", 40, 48, 48, "Quote"),
    ("caps_lock", 0x3A, "caps_lock", 58, 66, 66, "CapsLock"),
    ("backspace", 0x0E, "backspace", 14, 22, 22, "Backspace"),
)


@pytest.mark.parametrize("row", JAPANESE, ids=lambda row: row[0])
def test_japanese_keys_in_every_world(row: tuple[str, int, str, int, int, int | None, str]) -> None:
    name, set1, qcode, evdev, x, kbd, browser = row
    key = by_name(name)
    assert (key.set1, key.qcode, key.evdev, key.x, key.x_kbd) == (set1, qcode, evdev, x, kbd)
    assert from_evdev(evdev) is key
    assert from_x(x) is key
    assert from_browser(browser) is key
    assert from_vnc(set1) is key
    assert keys.from_set1(set1) is key
    if kbd is not None:
        assert from_x(kbd, "kbd") is key


def test_both_generations_of_the_kbd_driver() -> None:
    assert from_x(120, "kbd", japanese=True) is from_x(208, "kbd") is by_name("katakanahiragana")
    assert from_x(123, "kbd", japanese=True) is from_x(211, "kbd") is by_name("ro")
    assert from_x(120, "kbd") is not by_name("katakanahiragana")
    with pytest.raises(UsageError, match="driver 'quartz'"):
        from_x(9, "quartz")


def test_keys_that_qemu_cannot_send_have_substitutes() -> None:
    for found, sent in (
        (from_browser("Lang5"), "grave_accent"),
        (from_evdev(85), "grave_accent"),
        (from_browser("Lang3"), "katakanahiragana"),
        (from_evdev(90), "katakanahiragana"),
        (from_evdev(95), "kp_comma"),
    ):
        assert found is not None
        assert found.sent is by_name(sent)
        assert found.qcode == sent


def test_numbers_of_no_key() -> None:
    assert from_evdev(0) is from_evdev(767) is from_x(7) is from_browser("Fn") is from_vnc(0) is None


def test_extended_codes_of_vnc() -> None:
    assert from_vnc(0x9D) is from_vnc(0xE01D) is by_name("ctrl_r")
    assert from_vnc(0xB7) is by_name("print")
    assert from_vnc(0x54) is by_name("sysrq")
    for key in all_keys():
        assert from_vnc(key.vnc) is key


def test_the_x_driver() -> None:
    assert x_driver("evdev+aliases(qwerty)") == "evdev"
    assert x_driver("xfree86+aliases(qwerty)") == x_driver("xfree86(basic)") == "kbd"
    assert x_driver(page_up_keycode=112) == "evdev"
    assert x_driver(page_up_keycode=99) == "kbd"
    for name in ("xfree86(basic)", ""):
        assert x_driver(name, page_up_keycode=99) == "kbd"
    with pytest.raises(UsageError, match="from 'macintosh' and Page_Up at 124; name it: evdev or kbd"):
        x_driver("macintosh", page_up_keycode=124)
    with pytest.raises(UsageError, match="from nothing; name it"):
        x_driver()


def test_names_people_use() -> None:
    assert by_name("Enter") is by_name("ret")
    assert by_name("AltGr") is by_name("alt_r")
    for alias in keys.ALIASES:
        assert alias not in {key.name for key in all_keys()}
        by_name(alias)
    with pytest.raises(UsageError, match="no key 'any'"):
        by_name("any")


def test_no_two_keys_share_a_place() -> None:
    for world in ("name", "set1", "evdev", "x", "x_kbd", "usb"):
        values = [getattr(key, world) for key in all_keys() if getattr(key, world) is not None]
        assert len(values) == len(set(values)), world


def test_against_keycodemapdb() -> None:
    """Every row of keycodemapdb that QEMU has a key for says what our table says."""
    seen = set()
    with (ROOT / "scripts" / "keyboard" / "keymaps.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            name = row["QEMU QKeyCode"]
            if not name or name in ("unmapped", "asterisk", "sysrq"):
                continue
            key = by_name(name)
            seen.add(name)
            assert key.evdev == int(row["Linux Keycode"])
            if name != "print":
                assert key.set1 == int(row["AT set1 keycode"], 16)
            if row["HTML code"]:
                assert from_browser(row["HTML code"]) is key
            if row["XKB key name"]:
                assert keys.from_xkb(row["XKB key name"]) is key
    assert seen == {key.name for key in all_keys() if key.name == key.qcode} - {"sysrq"}


def run(script: str, *, other_data: int | None = None) -> None:
    """A script's own check. other_data: its exit code where it has nothing to compare with."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--check"], capture_output=True, text=True, timeout=60
    )
    if done.returncode == other_data:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def test_tables_are_what_the_kept_data_gives() -> None:
    run("keyboard_tables.py")


@pytest.mark.interop
@pytest.mark.skipif(
    ctypes.util.find_library("xkbcommon") is None or not Path("/usr/share/X11/xkb").exists(),
    reason="libxkbcommon or xkb-data is missing (Debian packages libxkbcommon0, xkb-data)",
)
def test_layouts_against_xkb_data() -> None:
    """libxkbcommon, asked anew with the installed xkb-data, gives what is kept."""
    run("keyboard_sources.py", other_data=3)


def test_every_layout_types_ascii() -> None:
    from enban.guest.keyboard.layouts import layout_names

    assert layout_names() == [
        "ja",
        "en-us",
        "en-gb",
        "de",
        "de-nodeadkeys",
        "fr",
        "es",
        "it",
        "sv",
        "pt-br",
        "ko",
    ]
    for name in layout_names():
        missing = {chr(code) for code in range(32, 127)} - layout(name).ways.keys()
        assert not missing, (name, missing)


def test_every_package_has_the_notices_of_the_data() -> None:
    """The tables go into the wheel, so the licences of what they are made of must too."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["project"]["license-files"]
    found = {path.name for pattern in patterns for path in ROOT.glob(pattern)}
    assert found >= {"LICENSE", "LICENSE.keycodemapdb", "LICENSE.xkb-data"}
