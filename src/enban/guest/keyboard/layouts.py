"""The layouts: what each key gives, and which keys give a character.

A layout is that of xkb-data of the same name, turned round: for a character the key and the modifiers, or a
dead key and a second stroke. The rule: a character has one way, the one that works on most systems (see
`_COST` and `_LAST`), so typing is always the same.
"""

from __future__ import annotations

import unicodedata
from functools import cache

from enban.errors import UsageError
from enban.guest.keyboard.keys import Key, all_keys, by_name
from enban.guest.keyboard.layout_data import COMMON, KEYSYMS, LAYOUTS

SHIFT, ALTGR = 1, 2  # a level is a sum of these: 0 to 3

# Other names for the layouts: countries, XKB and console names.
ALIASES = {
    "jp": "ja",
    "jp106": "ja",
    "us": "en-us",
    "en": "en-us",
    "gb": "en-gb",
    "uk": "en-gb",
    "se": "sv",
    "br": "pt-br",
    "abnt2": "pt-br",
    "kr": "ko",
}
# Dead keysym -> the combining character it puts on the next one, and what it gives with the space bar.
DEAD = {
    "dead_grave": ("\u0300", "`"),
    "dead_acute": ("\u0301", "\u00b4"),
    "dead_circumflex": ("\u0302", "^"),
    "dead_tilde": ("\u0303", "~"),
    "dead_macron": ("\u0304", "\u00af"),
    "dead_breve": ("\u0306", "\u02d8"),
    "dead_abovedot": ("\u0307", "\u02d9"),
    "dead_diaeresis": ("\u0308", "\u00a8"),
    "dead_abovering": ("\u030a", "\u00b0"),
    "dead_doubleacute": ("\u030b", "\u02dd"),
    "dead_caron": ("\u030c", "\u02c7"),
    "dead_cedilla": ("\u0327", "\u00b8"),
    "dead_ogonek": ("\u0328", "\u02db"),
    "dead_belowdot": ("\u0323", ""),
}
# The keys that give these whatever the layout.
_CONTROL = {"\n": "ret", "\t": "tab", "\b": "backspace", "\x1b": "esc"}
# What a level costs. What stands behind AltGr is xkb-data's own more often than what is printed on keys, so
# a dead key without AltGr and the space bar (one more stroke) are preferred: that works on every system.
_COST = (0, 1, 2, 3)
# Places of xkb-data that are not printed on keyboards, so that other systems have nothing there: they cost
# more.
_UNPRINTED = {("ja", "0", SHIFT), ("fr", "grave_accent", SHIFT), ("fr", "a", ALTGR)}
# Keyboards without the key beside the left Shift, which xkb-data gives characters in every layout.
_NO_102ND = ("ja", "en-us", "ko")
# Of two keys with one character these come last: Yen types a yen sign where the guest's layout is a newer
# one, and the key beside the left Shift is not on every keyboard.
_LAST = ("less", "yen")


@cache
def _keysym_table() -> dict[str, tuple[int, str]]:
    found = {}
    for item in KEYSYMS.replace("\n", "  ").split("  "):
        if item:
            name, number, character = item.split()
            found[name] = (int(number, 16), "" if character == "-" else chr(int(character, 16)))
    return found


@cache
def _names() -> dict[int, str]:
    return {number: name for name, (number, _) in _keysym_table().items()}


@cache
def _characters() -> dict[int, str]:
    return dict(_keysym_table().values())


def keysym_number(name: str) -> int:
    return _keysym_table()[name][0]


def find_keysym(name: str) -> int:
    """The number of a keysym of any layout by its name ("Zenkaku_Hankaku"), 0 if there is none."""
    return _keysym_table().get(name, (0, ""))[0]


def keysym_name(number: int) -> str:
    """The name of a keysym of any layout, or its number in hex."""
    return _names().get(number, f"{number:#x}")


def symbol_character(name: str) -> str:
    """The character of a keysym of a layout by its name, "" if none (and for "")."""
    return _keysym_table()[name][1] if name else ""


def keysym_character(number: int) -> str:
    """The character a keysym stands for, "" if none: Latin 1, Unicode keysyms, and those of the layouts.

    X protocol, appendix A: 0x20-0xff are Latin 1; 0x01000000 + n is the character n."""
    if 0x20 <= number <= 0x7E or 0xA0 <= number <= 0xFF:
        return chr(number)
    if 0x1000100 <= number <= 0x110FFFF and not 0x100D800 <= number <= 0x100DFFF:
        return chr(number - 0x1000000)
    return _characters().get(number, "")


class Way:
    """How a character is typed: presses of keys, each with a level; more than one if a dead key is first."""

    __slots__ = ("presses",)

    def __init__(self, *presses: tuple[Key, int]) -> None:
        self.presses = presses

    def __repr__(self) -> str:
        return "+".join(f"{key.name}/{level}" for key, level in self.presses)


class Layout:
    """One layout.

    levels: key -> keysym names for plain, Shift, AltGr, both ("" for none). others: keysym names behind Alt,
    Ctrl or Num Lock. has_altgr: whether the right Alt key is AltGr. ways: character -> how to type it.
    """

    __slots__ = ("_by_keysym", "has_altgr", "levels", "name", "others", "ways")

    def __init__(self, name: str) -> None:
        self.name = name
        self.levels: dict[Key, tuple[str, ...]] = {}
        self.others: dict[Key, tuple[str, ...]] = {}
        for line in (COMMON + LAYOUTS[name]).splitlines():
            word, *symbols = line.split()
            if word == "less" and name in _NO_102ND:
                continue
            key = by_name(word)
            four = ["" if symbol == "-" else symbol for symbol in symbols[:4]]
            self.levels[key] = tuple(four + [""] * (4 - len(four)))
            self.others[key] = tuple(symbols[4:])
        self.has_altgr = self.levels[by_name("alt_r")][0] == "ISO_Level3_Shift"
        if not self.has_altgr:  # then nothing reaches these levels, although xkb-data has some
            self.levels = {key: (*words[:2], "", "") for key, words in self.levels.items()}
        order = {key: place for place, key in enumerate(all_keys())}
        entries = [
            (level.bit_count(), key.name in _LAST, level, order[key], key, symbol)
            for key, symbols in self.levels.items()
            for level, symbol in enumerate(symbols)
            if symbol
        ]
        entries.sort(key=lambda entry: entry[:4])
        self._by_keysym: dict[int, list[tuple[Key, int]]] = {}
        for _, _, level, _, key, symbol in entries:
            self._by_keysym.setdefault(keysym_number(symbol), []).append((key, level))
        for key, words in self.others.items():
            for symbol in words:
                self._by_keysym.setdefault(keysym_number(symbol), []).append((key, 0))
        self.ways = self._find_ways([(key, level, symbol) for _, _, level, _, key, symbol in entries])

    def _find_ways(self, entries: list[tuple[Key, int, str]]) -> dict[str, Way]:
        found: list[tuple[int, str, Way]] = []  # cost, character, way
        dead: list[tuple[Key, int, str]] = []
        for key, level, symbol in entries:
            character = symbol_character(symbol)
            if symbol in DEAD:
                dead.append((key, level, symbol))
            elif character and not key.name.startswith("kp_"):
                cost = _COST[level] + 2 * ((self.name, key.name, level) in _UNPRINTED)
                found.append((cost, character, Way((key, level))))
        direct: dict[str, Way] = {}
        for _, character, way in sorted(found, key=lambda item: item[0]):
            direct.setdefault(character, way)
        space = direct[" "].presses[0]
        for key, level, symbol in dead:
            mark, alone = DEAD[symbol]
            if alone:
                found.append((_COST[level] + 1, alone, Way((key, level), space)))
            for character, way in direct.items():
                made = unicodedata.normalize("NFC", character + mark)
                if len(made) == 1:
                    cost = _COST[level] + 1 + _COST[way.presses[0][1]]
                    found.append((cost, made, Way((key, level), way.presses[0])))
        ways = {character: Way((by_name(name), 0)) for character, name in _CONTROL.items()}
        for _, character, way in sorted(found, key=lambda item: item[0]):
            ways.setdefault(character, way)
        return ways

    def places(self, keysym: int) -> list[tuple[Key, int]]:
        """The keys and levels that give a keysym, the plainest first."""
        return self._by_keysym.get(keysym, [])

    def legend(self, key: Key, level: int) -> str:
        """What is printed on a key for a level: a character, or the keysym's name."""
        symbol = self.levels.get(key, ("",) * 4)[level]
        if symbol in DEAD:
            return DEAD[symbol][1] or symbol
        character = symbol_character(symbol)
        return character if character.isprintable() and character.strip() else symbol


def layout_names() -> list[str]:
    return list(LAYOUTS)


def layout(name: str) -> Layout:
    """A layout by its name ("ja") or a common other name ("jp106"). Raises UsageError."""
    word = name.strip().lower().replace("_", "-")
    word = ALIASES.get(word, word)
    if word not in LAYOUTS:
        raise UsageError(f"there is no keyboard layout '{name}'", hint=f"use one of {', '.join(LAYOUTS)}")
    return _layout(word)


@cache
def _layout(name: str) -> Layout:
    return Layout(name)
