"""Makes enban's tables of keys and layouts from the data kept in scripts/keyboard.

    .venv/bin/python scripts/keyboard_tables.py            # rewrites key_data.py, layout_data.py and keys.md
    .venv/bin/python scripts/keyboard_tables.py --check    # exit code 1 if that would change them

keymaps.csv is keycodemapdb's (3-clause BSD, LICENSE.keycodemapdb), xkb.tsv is taken from xkb-data by
keyboard_sources.py (MIT and X11 licences, LICENSE.xkb-data). Both name a key by its XKB name, which is how
they are brought together. A key is in our table if QEMU has a QKeyCode for it, or a substitute.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "src" / "enban" / "guest" / "keyboard"

# Linux keycode -> (our name, the QKeyCode sent in its place). QEMU cannot send these keys (LANG5, LANG3, the
# comma of Japanese keypads).
SUBSTITUTES = {
    85: ("zenkakuhankaku", "grave_accent"),
    90: ("katakana", "katakanahiragana"),
    95: ("kp_jpcomma", "kp_comma"),
}
# QKeyCodes that name a key which another name names too, and Linux keycode 0.
SKIPPED = {"unmapped", "asterisk"}
# keycodemapdb has Print's code of Alt+Print (54); the key alone is e0 37.
SET1 = {"print": "0xe037"}
# XKB names of today, or of the old driver, that keycodemapdb does not have.
XKB_NAMES = {"delete": "DELE", "henkan": "XFER"}

Key = dict[str, list[str]]


def read_keys() -> dict[str, Key]:
    """Our name of a key -> column -> its values, in the order of Linux keycodes."""
    keys: dict[str, Key] = {}
    columns = {
        "set1": "AT set1 keycode",
        "evdev": "Linux Keycode",
        "xkb": "XKB key name",
        "browser": "HTML code",
        "usb": "USB Keycodes",
        "windows": "Win32 Keycode",
    }
    with (HERE / "keyboard" / "keymaps.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            sent = row["QEMU QKeyCode"]
            name = sent
            if not sent and int(row["Linux Keycode"] or "0", 0) in SUBSTITUTES:
                name, sent = SUBSTITUTES[int(row["Linux Keycode"], 0)]
            if not name or name in SKIPPED:
                continue
            key = keys.setdefault(name, {"sent": [sent]})
            for column, title in columns.items():
                value = SET1.get(name, row[title]) if column == "set1" else row[title]
                if value and value not in key.setdefault(column, []):
                    key[column].append(value)
    for name, word in XKB_NAMES.items():
        keys[name]["xkb"].append(word)
    # One QKeyCode for Print and another for SysRq, on one Linux key and one USB key: Print it is.
    for column in ("evdev", "usb", "browser"):
        keys["sysrq"][column] = []
    keys["zenkakuhankaku"]["xkb"] = []  # XKB has HZTG as another name of the key left of 1 (TLDE)
    return keys


def read_xkb() -> list[list[str]]:
    return [line.split("\t") for line in (HERE / "keyboard" / "xkb.tsv").read_text().splitlines()]


def head(title: str) -> list[str]:
    return [
        f'"""{title}',
        "",
        "Made by scripts/keyboard_tables.py from keycodemapdb (3-clause BSD) and xkb-data (MIT, X11).",
        '"""',
        "",
        "from __future__ import annotations",
        "",
    ]


def number(values: list[str]) -> str:
    return f"{int(values[0], 0):#x}" if values else "-"


def key_module(keys: dict[str, Key], xkb: list[list[str]]) -> str:
    evdev = {row[1]: int(row[2]) for row in xkb if row[0] == "evdev"}
    kbd = {row[1]: row[2] for row in xkb if row[0] == "xfree86"}
    lines = head("The physical keys and their names in each world.")
    lines += [
        "# One key a line: name, QKeyCode sent, PC set 1, Linux evdev, X evdev, X kbd, USB HID, Windows",
        '# virtual key, then XKB names and KeyboardEvent.code, each separated by commas. "-" is none.',
        'KEYS = """\\',
    ]
    for name, key in keys.items():
        codes = [int(value, 0) for value in key.get("evdev", [])]
        x_codes = {evdev[word] for word in key.get("xkb", []) if word in evdev}
        # The X driver of today is defined by this sum; the data must say so too.
        assert not codes or not x_codes or codes[0] + 8 in x_codes, (name, codes, x_codes)
        # Names like I147 mean different keys in the two X worlds.
        old = [kbd[word] for word in key.get("xkb", []) if word in kbd and not word[1:].isdigit()]
        fields = [
            name,
            key["sent"][0],
            number(key.get("set1", [])),
            str(codes[0]) if codes else "-",
            str(codes[0] + 8) if codes else "-",
            old[0] if old else "-",
            number(key.get("usb", [])),
            number(key.get("windows", [])),
            ",".join(key.get("xkb", [])) or "-",
            ",".join(key.get("browser", [])) or "-",
        ]
        lines.append(" ".join(fields))
    return "\n".join([*lines, '"""', ""])


def layout_module(keys: dict[str, Key], xkb: list[list[str]]) -> str:
    names = [row[1] for row in xkb if row[0] == "layout"]
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for row in xkb:
        if row[0] == "key":
            # What X takes for itself behind Ctrl+Alt (changing consoles, ending grabs) is nothing for a
            # guest.
            words = row[3:7] + [word for word in row[7:] if not word.startswith("XF86")]
            while words and words[-1] == "-":
                words.pop()
            found[row[1]][row[2]] = " ".join(words)
    rows: dict[str, dict[str, str]] = {name: {} for name in names}
    for layout in names:
        for name, key in keys.items():
            symbols = [found[layout][word] for word in key.get("xkb", []) if found[layout].get(word)]
            if symbols:
                rows[layout][name] = symbols[0]
    common = {
        name: text for name, text in rows["ja"].items() if all(rows[each].get(name) == text for each in names)
    }
    used = {word for layout in rows.values() for text in layout.values() for word in text.split()}
    lines = head("What each key gives in each layout, as X keysyms.")
    lines += [
        "# A key a line: name, then the keysyms alone, with Shift, with AltGr, with both, and any others",
        '# (behind Alt, Ctrl or Num Lock); "-" is none, missing ones at the end are left out.',
        'COMMON = """\\',
        *(f"{name} {text}" for name, text in common.items()),
        '"""',
        "",
        "LAYOUTS = {",
    ]
    for layout in names:
        lines.append(f'    "{layout}": """\\')
        lines += [f"{name} {text}" for name, text in rows[layout].items() if name not in common]
        lines.append('""",')
    lines += [
        "}",
        "",
        "# The keysyms above: name, number, character (numbers in hex); several to a line.",
        'KEYSYMS = """\\',
    ]
    line = ""
    for row in xkb:
        if row[0] == "keysym" and row[1] in used:
            # Return, Tab, Escape and their like are keys, not characters.
            printed = row[3] if row[3] != "-" and int(row[3], 16) >= 0x20 and row[3] != "7f" else "-"
            item = f"{row[1]} {row[2]} {printed}"
            if len(line) + len(item) > 105:
                lines.append(line)
                line = ""
            line += ("  " if line else "") + item
    return "\n".join([*lines, line, '"""', ""])


def page(keys: dict[str, Key], xkb: list[list[str]]) -> str:
    """docs/reference/keys.md."""
    table = key_module(keys, xkb).split('"""\\\n')[1].split('"""')[0].splitlines()
    lines = [
        "# Keys",
        "",
        "Every key that enban knows, by its name in each world. Written by `scripts/keyboard_tables.py` from",
        "keycodemapdb and xkb-data. What a layout has on a key is told by `enban keys show -k LAYOUT KEY`;",
        "how to use it all is in [Type on a guest's keyboard](../how-to/keyboards.md).",
        "",
        "| key | PC set 1 | Linux, Wayland | X (evdev) | X (kbd) | USB HID | XKB | KeyboardEvent.code |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in table:
        name, sent, set1, evdev, x, kbd, usb, _, names, browser = line.split()
        code = int(set1, 16)
        words = [
            f"`{name}`" if name == sent else f"`{name}` (sent as `{sent}`)",
            f"{code:02x}" if code < 0x100 else f"e0 {code & 0xFF:02x}",
            *(evdev, x, kbd),
            f"{int(usb, 16):02x}" if usb != "-" else "",
            *(text.replace(",", ", ") for text in (names, browser)),
        ]
        lines.append("| " + " | ".join("" if word == "-" else word for word in words) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    keys, xkb = read_keys(), read_xkb()
    code = 0
    for path, text in (
        (TARGET / "key_data.py", key_module(keys, xkb)),
        (TARGET / "layout_data.py", layout_module(keys, xkb)),
        (HERE.parent / "docs" / "reference" / "keys.md", page(keys, xkb)),
    ):
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif path.read_text() != text:
            print(f"{path.name} is not what the kept data gives", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
