"""The physical keys: what each world calls them, and what a guest must receive for them.

A `Key` is one place on a keyboard, whatever is printed on it. Every world that a live key comes from has
its own number or name for it; the functions `from_*` find the key, and `Key.qcode` is what QEMU is told.
The rule: a key is translated by its place, never by its meaning, so that the guest's layout decides what it
types. (Where only a meaning arrives, a VNC client's keysym, see `keysyms`.)
"""

from __future__ import annotations

from functools import cache

from enban.errors import UsageError
from enban.guest.keyboard.key_data import KEYS

# Under the old X driver two Japanese keys had other numbers before 2004; the numbers are the same keys'
# today's scancodes, so they mean nothing else on a Japanese keyboard.
_X_KBD_OLD_JAPANESE = {120: "katakanahiragana", 123: "ro"}
_EXTENDED = 0x80  # in VNC's extended key events stands for the prefix e0

# What people write in `ctrl-alt-delete`, besides the names of the table.
ALIASES = {
    "control": "ctrl",
    "altgr": "alt_r",
    "option": "alt",
    "shift_l": "shift",
    "ctrl_l": "ctrl",
    "alt_l": "alt",
    "win": "meta_l",
    "super": "meta_l",
    "meta": "meta_l",
    "cmd": "meta_l",
    "del": "delete",
    "ins": "insert",
    "escape": "esc",
    "return": "ret",
    "enter": "ret",
    "space": "spc",
    "bs": "backspace",
    "pageup": "pgup",
    "page_up": "pgup",
    "pagedown": "pgdn",
    "page_down": "pgdn",
    "capslock": "caps_lock",
    "caps": "caps_lock",
    "numlock": "num_lock",
    "scrolllock": "scroll_lock",
    "prtsc": "print",
    "printscreen": "print",
    "break": "pause",
    "period": "dot",
    "hyphen": "minus",
    "zenkaku": "grave_accent",
    "hankaku": "grave_accent",
    "zenkaku_hankaku": "grave_accent",
    "kana": "katakanahiragana",
    "eisu": "caps_lock",
    "hangul": "lang1",
    "hanja": "lang2",
}


class Key:
    """One physical key. Numbers are None where a world has none for it.

    name: ours, unique. qcode: the QKeyCode QEMU is told. set1: PC scancode of set 1, with the prefix e0 in
    the second byte. evdev: Linux input code, also Wayland's. x: X keycode under the evdev driver. x_kbd: X
    keycode under the old `kbd` driver. usb: HID usage of page 7. windows: virtual key of a US layout. xkb:
    XKB key names. browser: KeyboardEvent.code.
    """

    __slots__ = ("browser", "evdev", "name", "qcode", "set1", "usb", "windows", "x", "x_kbd", "xkb")

    def __init__(self, line: str) -> None:
        fields = line.split()
        self.name, self.qcode = fields[:2]
        numbers = [None if field == "-" else int(field, 0) for field in fields[2:8]]
        assert numbers[0] is not None
        self.set1: int = numbers[0]
        self.evdev, self.x, self.x_kbd, self.usb, self.windows = numbers[1:]
        self.xkb, self.browser = (() if field == "-" else tuple(field.split(",")) for field in fields[8:10])

    def __repr__(self) -> str:
        return f"Key({self.name})"

    @property
    def vnc(self) -> int:
        """The number in VNC's extended key events: set 1, the prefix e0 as the high bit."""
        return self.set1 & 0x7F | (_EXTENDED if self.set1 >> 8 else 0)

    @property
    def sent(self) -> Key:
        """The key QEMU is told of: this one, or its substitute where QEMU has no name for it."""
        return self if self.qcode == self.name else by_name(self.qcode)

    @property
    def bytes_at_most(self) -> int:
        """Bytes that a press or release takes in the guest's PS/2 queue, in the longest code set."""
        return 8 if self.name in ("pause", "print", "sysrq") else 2 if self.set1 < 0x100 else 3


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key, in the order of Linux input codes."""
    return tuple(Key(line) for line in KEYS.splitlines())


@cache
def _index(world: str) -> dict[object, Key]:
    found: dict[object, Key] = {}
    for key in all_keys():
        value = getattr(key, world)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None:
                found.setdefault(item, key)
    return found


def by_name(name: str) -> Key:
    """A key by our name, a QKeyCode, or what people call it ("enter", "altgr"). Raises UsageError."""
    key = find(name)
    if key is None:
        raise UsageError(f"there is no key '{name}'", hint="`enban keys show --all` lists them")
    return key


def find(name: str) -> Key | None:
    """As by_name, None if there is no such key; case does not matter."""
    word = name.strip().lower()
    return _index("name").get(ALIASES.get(word, word))


# -- live keys from each world ------------------------------------------------------------------
# Each returns None for a number that is no key of the table: such a key is dropped, never guessed.


def from_evdev(code: int) -> Key | None:
    """A Linux input event code (linux/input-event-codes.h); Wayland's wl_keyboard sends the same."""
    return _index("evdev").get(code)


def from_x(keycode: int, driver: str = "evdev", *, japanese: bool = False) -> Key | None:
    """An X keycode. driver: "evdev" or "kbd", as `x_driver` tells.

    japanese: the keyboard is a Japanese one, so under "kbd" the numbers 120 and 123 that Katakana/Hiragana
    and Ro had in XFree86's days are taken too. Raises UsageError for another driver.
    """
    if driver == "evdev":
        return _index("x").get(keycode)
    if driver != "kbd":
        raise UsageError(f"there is no X keyboard driver '{driver}'", hint="use evdev or kbd")
    if japanese and keycode in _X_KBD_OLD_JAPANESE:
        return by_name(_X_KBD_OLD_JAPANESE[keycode])
    return _index("x_kbd").get(keycode)


def from_browser(code: str) -> Key | None:
    """A KeyboardEvent.code ("IntlYen")."""
    return _index("browser").get(code)


def from_usb(usage: int) -> Key | None:
    """A USB HID usage of the keyboard page (7)."""
    return _index("usb").get(usage)


def from_set1(scancode: int) -> Key | None:
    """A PC scancode of set 1 (the press), e0 in the second byte: 0x7d, 0xe01c."""
    return _index("set1").get(scancode)


def from_vnc(number: int) -> Key | None:
    """The keycode of a VNC extended key event. Clients write e0 as the high bit, or as a second byte."""
    if number >> 8 == 0xE0:
        return from_set1(number)
    if number in (_EXTENDED | 0x37, 0x54):
        return by_name("print" if number & _EXTENDED else "sysrq")
    return _index("vnc").get(number)


def from_xkb(name: str) -> Key | None:
    """An XKB key name, without its angle brackets ("AE13")."""
    return _index("xkb").get(name)


def x_driver(keycodes_name: str = "", *, page_up_keycode: int = 0) -> str:
    """Which X keyboard driver a display has: "evdev" or "kbd".

    keycodes_name: the name of the XKB keycodes component ("evdev+aliases(qwerty)", "xfree86(basic)"), as in
    the property _XKB_RULES_NAMES' rules, `setxkbmap -print` or `xkbcomp :0`. page_up_keycode: where no name
    is to be had, the keycode that gives Page_Up (112 under evdev, 99 under kbd). Displays of neither kind
    (macOS, XWin) raise UsageError.
    """
    name = keycodes_name.strip().lower()
    if name:
        if name.startswith("evdev"):
            return "evdev"
        if name.startswith("xfree86"):
            return "kbd"
    if page_up_keycode:
        for driver in ("evdev", "kbd"):
            key = from_x(page_up_keycode, driver)
            if key is not None and key.name == "pgup":
                return driver
    told = [f"'{keycodes_name}'"] if name else []
    told += [f"Page_Up at {page_up_keycode}"] if page_up_keycode else []
    what = " and ".join(told) or "nothing"
    raise UsageError(f"cannot tell the X keyboard driver from {what}", hint="name it: evdev or kbd")
