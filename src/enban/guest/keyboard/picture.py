"""A layout drawn in a terminal, and what a key is called in each world.

The rule: what is drawn comes from the tables alone, so a picture can be trusted to be what is typed.
"""

from __future__ import annotations

import unicodedata

from enban.guest.keyboard import keys
from enban.guest.keyboard.keys import Key, all_keys, by_name
from enban.guest.keyboard.keysyms import JAPANESE_ONLY, KEY_OF
from enban.guest.keyboard.layouts import DEAD, Layout, find_keysym, keysym_number, symbol_character

# The keys that every keyboard has; what differs is in `rows`.
_TOP = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "0", "minus", "equal"]
_UPPER = ["q", "w", "e", "r", "t", "y", "u", "i", "o", "p", "bracket_left", "bracket_right"]
_HOME = ["a", "s", "d", "f", "g", "h", "j", "k", "l", "semicolon", "apostrophe"]
_LOWER = ["z", "x", "c", "v", "b", "n", "m", "comma", "dot", "slash"]
_NAMES = {
    "Zenkaku_Hankaku": "Z/H",
    "Eisu_toggle": "Eisu",
    "Caps_Lock": "Caps",
    "Hiragana_Katakana": "Kan",
    "Henkan_Mode": "Hen",
    "Henkan": "Hen",
    "Muhenkan": "Muh",
    "Control_L": "Ctrl",
    "Control_R": "Ctrl",
    "Shift_L": "Shift",
    "Shift_R": "Shift",
    "Alt_L": "Alt",
    "Alt_R": "Alt",
    "ISO_Level3_Shift": "AltGr",
    "BackSpace": "BS",
    "Return": "Enter",
    "Super_L": "Win",
    "Super_R": "Win",
    "space": "Space",
    "Hangul": "Han",
    "Hangul_Hanja": "Hja",
    "Menu": "Mnu",
}
_CELL = 5  # columns inside a key
_WIDTH = 15 * (_CELL + 1)  # of a row, with the edge on its left


def rows(chosen: Layout) -> list[list[tuple[str, int]]]:
    """The rows of the main block: keys and the columns inside each."""
    japanese, brazilian = chosen.name == "ja", chosen.name == "pt-br"
    wide_enter = chosen.name not in ("en-us", "ko")
    left = ["shift:6", "less"] if wide_enter and not japanese else ["shift:12"]
    here = ["muhenkan"] if japanese else ["lang2"] if chosen.name == "ko" else []
    there = ["henkan", "katakanahiragana"] if japanese else ["lang1"] if chosen.name == "ko" else []
    words = [
        ["grave_accent", *_TOP, *(["yen"] if japanese else []), "backspace:0"],
        ["tab:8", *_UPPER, "ret:0" if wide_enter else "backslash:0"],
        ["caps_lock:9", *_HOME, *(["backslash"] if wide_enter else []), "ret:0"],
        [*left, *_LOWER, *(["ro"] if japanese or brazilian else []), "shift_r:0"],
        ["ctrl:6", "meta_l", "alt:6", *here, "spc:0", *there, "alt_r:6", "meta_r", "compose", "ctrl_r:6"],
    ]
    out = []
    for row in words:
        sized = [(name, int(width or _CELL)) for name, _, width in (word.partition(":") for word in row)]
        rest = _WIDTH - sum(width + 1 for _, width in sized if width) - 1  # for the one key without a width
        out.append([(name, width or rest) for name, width in sized])
    return out


def draw(chosen: Layout) -> list[str]:
    """The layout as lines of text: on each key what it types alone below, with Shift above, and to the
    right of each what AltGr adds. A letter is written once, as a capital."""
    lines: list[str] = []
    for row in rows(chosen):
        border = shifted = alone = ""
        for name, width in row:
            texts = [_short(chosen, by_name(name), level) for level in range(4)]
            if texts[0] != texts[1] == texts[0].upper():
                texts[0] = ""
            border += "+" + "-" * width
            shifted += "|" + _cell(texts[1], texts[3], width)
            alone += "|" + _cell(texts[0], texts[2], width)
        lines += [border + "+", shifted + "|", alone + "|"]
    return [*lines, "+" + "-" * (_WIDTH - 1) + "+"]


def _short(chosen: Layout, key: Key, level: int) -> str:
    """What is written on a key; nothing where a level only repeats a key that types no character."""
    words = chosen.levels.get(key, ("",) * 4)
    if level and (words[level] == words[0] or (not symbol_character(words[0]) and words[0] not in DEAD)):
        return ""
    text = chosen.legend(key, level)
    return _NAMES.get(text, text)


def _cell(left: str, right: str, width: int) -> str:
    """A text at the left and one at the right of a key; the left one is shortened, the right one left out."""
    left = left[: width - 2]
    used = 1 + _columns(left)
    right = right if used + 2 + _columns(right) <= width else ""
    return f" {left}{' ' * (width - used - _columns(right) - 1)}{right} "


def _columns(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def describe(key: Key, chosen: Layout) -> list[str]:
    """What a key is called in each world, and what it types."""
    words = [chosen.legend(key, level) or "-" for level in range(4)]
    given = f"{words[0]}  Shift {words[1]}"
    if chosen.has_altgr:
        given += f"  AltGr {words[2]}  Shift+AltGr {words[3]}"
    lines = [f"{key.name}", f"  in layout {chosen.name:<12}{given}"]
    code = f"{key.set1:#06x}" if key.set1 > 0xFF else f"{key.set1:#04x}"
    facts = [
        ("PC set 1", code),
        (
            "QEMU (QKeyCode)",
            key.qcode + ("" if key.qcode == key.name else "  (QEMU has no name for this key)"),
        ),
        ("Linux evdev, Wayland", key.evdev),
        ("X, evdev driver", key.x),
        ("X, old kbd driver", key.x_kbd),
        ("XKB", ", ".join(f"<{name}>" for name in key.xkb)),
        ("X keysyms", _keysyms(key, chosen)),
        ("KeyboardEvent.code", ", ".join(key.browser)),
        ("USB HID", f"{key.usb:#04x}" if key.usb is not None else None),
        ("Windows (US)", f"{key.windows:#04x}" if key.windows is not None else None),
        ("VNC extended", f"{key.vnc:#04x}"),
    ]
    lines += [f"  {title:<22}{value}" for title, value in facts if value not in (None, "")]
    return lines


def _keysyms(key: Key, chosen: Layout) -> str:
    """What X calls the meanings that a layout gives a key, plain first, each once."""
    names = dict.fromkeys(name for name in chosen.levels.get(key, ()) if name)
    return ", ".join(f"{name} {keysym_number(name):#x}" for name in names)


def key_line(key: Key, chosen: Layout) -> str:
    """One key in one line: our name, those of other worlds, what the layout has on it."""
    names = [f"evdev {key.evdev}", f"X {key.x}"] if key.evdev is not None else []
    if key.x_kbd is not None:
        names.append(f"kbd {key.x_kbd}")
    names.append(f"set 1 {key.set1:02x}" if key.set1 < 0x100 else f"set 1 e0 {key.set1 & 0xFF:02x}")
    names += [f"code {word}" for word in key.browser[:1]]
    names.append(f"QEMU {key.qcode}")
    if key.usb is not None:
        names.append(f"USB {key.usb:02x}")
    legends = " ".join(text for text in (chosen.legend(key, level) for level in range(4)) if text)
    return f"{key.name:<18}{'  '.join(names):<76}  {legends}".rstrip()


# The worlds whose numbers `find_keys` looks through.
_WORLDS = (
    ("evdev", "Linux evdev"),
    ("x", "X keycode (evdev)"),
    ("x_kbd", "X keycode (kbd)"),
    ("set1", "PC scancode"),
    ("vnc", "VNC extended key"),
    ("usb", "USB HID usage"),
)


def find_keys(text: str, chosen: Layout) -> list[tuple[str, Key]]:
    """The keys that a word of a user may mean: what types a character, a name (a keysym's too), or a number
    in some world (which is named then, else "")."""
    if len(text) == 1 and text in chosen.ways:
        return [("", key) for key, _ in chosen.ways[text].presses]
    named = keys.find(text) or keys.from_browser(text) or keys.from_xkb(text.strip("<>"))
    if named is not None:
        return [("", named)]
    keysym = find_keysym(text)
    if keysym:
        return [("X keysym", key) for key in _with_keysym(keysym, chosen)]
    try:
        number = int(text, 0)
    except ValueError:
        return []
    found: dict[Key, str] = {}
    for world, title in _WORLDS:
        for key in all_keys():
            if getattr(key, world) == number:
                found.setdefault(key, title)
    if chosen.name == "ja" and (old := keys.from_x(number, "kbd", japanese=True)) is not None:
        found.setdefault(old, "X keycode (kbd, before 2004)")
    if number > 0xFF:  # below they are characters, and everything else's numbers
        for key in _with_keysym(number, chosen):
            found.setdefault(key, "X keysym")
    return [(title, key) for key, title in found.items()]


def _with_keysym(keysym: int, chosen: Layout) -> list[Key]:
    """The keys that give a keysym in a layout, else the one that a client means by it."""
    found = list(dict.fromkeys(key for key, _ in chosen.places(keysym)))
    if not found and keysym in KEY_OF and (chosen.name == "ja" or keysym not in JAPANESE_ONLY):
        found.append(by_name(KEY_OF[keysym]))
    return found


def typing(character: str, chosen: Layout) -> str:
    """How a character is typed, in one line."""
    words = []
    for key, level in chosen.ways[character].presses:
        words.append(("", "Shift+", "AltGr+", "Shift+AltGr+")[level] + key.name)
    shown = f"'{character}'" if character.isprintable() else f"U+{ord(character):04X}"
    return f"{shown} is typed with {', then '.join(words)}"


def layout_lines(chosen: Layout) -> list[str]:
    """The picture of a layout with a line on top."""
    return [f"Layout {chosen.name}: alone below, with Shift above, AltGr to the right", *draw(chosen)]
