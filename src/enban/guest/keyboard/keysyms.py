"""Live X keysyms to keys: what a plain VNC client sends, for a guest with a layout.

A keysym says what the host's keyboard gave, not which key was hit, and it comes beside the Shift and AltGr
events of that host. The guest's layout may have the character on another key with other modifiers. So the
rule: the character decides, and around a press whose modifiers do not fit, Shift or AltGr is pressed or let
go for the guest and put back. Keys without a character (F1, Return, arrows) pass as they are, with whatever
is held.

A release may come as another keysym than its press (Shift went first), and of another host layout nothing
says which press it belongs to. Therefore a press that needed its modifiers changed is a tap, press and
release at once; and a release that fits no held key lets go of every held character key, rather than leave
one stuck.

Yen and Ro of Japanese keyboards both give `backslash` on many hosts. It means Yen, unless the client has
shown that its Yen key says `yen`, or the caller says otherwise: then it means Ro.
"""

from __future__ import annotations

from enban.errors import UsageError
from enban.guest.keyboard.keys import Key, by_name
from enban.guest.keyboard.layouts import (
    ALTGR,
    DEAD,
    SHIFT,
    keysym_character,
    keysym_name,
    layout,
    symbol_character,
)

BACKSLASH, YEN, CAPS_LOCK, LEFT_TAB = 0x5C, 0xA5, 0xFFE5, 0xFE20
# Keysyms for keys that a layout may not have, or gives another name, or only behind a modifier.
KEY_OF = {
    0xFF15: "print",  # Sys_Req
    0xFF21: "grave_accent",  # Kanji
    0xFF22: "muhenkan",
    0xFF23: "henkan",
    0xFF24: "katakanahiragana",  # Romaji
    0xFF25: "hiragana",
    0xFF26: "katakanahiragana",  # Katakana
    0xFF27: "katakanahiragana",
    0xFF28: "grave_accent",  # Zenkaku
    0xFF29: "grave_accent",  # Hankaku
    0xFF2A: "grave_accent",  # Zenkaku_Hankaku
    0xFF2D: "katakanahiragana",  # Kana_Lock
    0xFF2E: "katakanahiragana",  # Kana_Shift
    0xFF2F: "caps_lock",  # Eisu_Shift
    0xFF30: "caps_lock",  # Eisu_toggle
    0xFF31: "lang1",  # Hangul
    0xFF34: "lang2",  # Hangul_Hanja
    0xFF6B: "pause",  # Break
    0xFF7E: "alt_r",  # Mode_switch
    0xFFE7: "alt",  # Meta_L
    0xFFE8: "alt_r",  # Meta_R
    0xFFEA: "alt_r",
    0xFFED: "meta_l",  # Hyper_L
    0xFFEE: "meta_r",  # Hyper_R
    0xFE03: "alt_r",  # ISO_Level3_Shift
}
# Of these, what would type a character, or lock capitals, on another keyboard than a Japanese one.
JAPANESE_ONLY = {0xFF21, 0xFF28, 0xFF29, 0xFF2A, 0xFF2F, 0xFF30}
# AltGr: nothing to a layout without it.
_ALTGR_ONLY = {0xFE03, 0xFF7E}

_SHORTCUT = ("ctrl", "ctrl_r", "alt", "meta_l", "meta_r")

Event = tuple[Key, bool]


class KeysymTranslator:
    """Translates one client's key events for a guest with `layout_name`.

    backslash_key: the Japanese key that the keysym `backslash` means, "yen" or "ro". Raises UsageError for
    an unknown layout or key.
    """

    def __init__(self, layout_name: str, *, backslash_key: str = "yen") -> None:
        if backslash_key not in ("yen", "ro"):
            raise UsageError(f"the backslash key is yen or ro, not '{backslash_key}'")
        self._layout = layout(layout_name)
        self._backslash = by_name(backslash_key)
        self._held: dict[int, Key] = {}  # keysym as pressed -> the key the guest has down for it
        self._characters: set[int] = set()  # those of them that stand for characters
        self._caps = False

    def event(self, down: bool, keysym: int) -> list[Event]:
        """The key events for the guest, in order; empty for what this keyboard does not have."""
        if 0x1000020 <= keysym <= 0x10000FF:  # Latin 1 by its Unicode number: has a plain keysym too
            keysym -= 0x1000000
        return self._press(keysym) if down else self._release(keysym)

    def release_all(self) -> list[Event]:
        """Let go of everything this client holds."""
        events = [(key, False) for key in reversed(self._held.values())]
        self._held.clear()
        self._characters.clear()
        return events

    # -- pressing -------------------------------------------------------------------------------

    def _press(self, keysym: int) -> list[Event]:
        if keysym == YEN and self._layout.name == "ja":
            self._backslash = by_name("ro")  # this client's Yen key says so itself
        character = keysym_character(keysym)
        if character or keysym_name(keysym) in DEAD:
            if not self._is_keypad(keysym):
                return self._press_character(keysym, character)
        elif keysym in (CAPS_LOCK, LEFT_TAB):
            events = self._press_character(keysym, "")
            if keysym == CAPS_LOCK and events:
                self._caps = not self._caps
            return events
        key = self._function_key(keysym)
        if key is None:
            return []
        self._held[keysym] = key
        return [(key, True)]

    def _press_character(self, keysym: int, character: str) -> list[Event]:
        presses = self._choose(keysym, character)
        events: list[Event] = []
        for key, level in presses[:-1]:  # a dead key first
            events += self._with_modifiers(key, level, [(key, True), (key, False)])
        for key, level in presses[-1:]:
            natural = len(presses) == 1 and not self._changes(key, level)
            if natural:
                self._held[keysym] = key
                self._characters.add(keysym)
                events.append((key, True))
            else:
                if self._held.pop(keysym, None) is not None:  # a repeat whose modifiers changed under it
                    events.append((key, False))
                self._characters.discard(keysym)
                events += self._with_modifiers(key, level, [(key, True), (key, False)])
        return events

    def _choose(self, keysym: int, character: str) -> list[tuple[Key, int]]:
        """The presses for a character: of the places that have it the one that fits what is held best."""
        places = [place for place in self._layout.places(keysym) if not place[0].name.startswith("kp_")]
        if keysym == YEN and self._layout.name == "ja":
            return [(by_name("yen"), 0)]  # the key, whatever the layout has on it
        if keysym == BACKSLASH and self._layout.name == "ja":
            places = [place for place in places if place[0] is self._backslash]
        if places:
            return [min(places, key=lambda place: len(self._changes(*place)))]
        way = self._layout.ways.get(character)
        return list(way.presses) if way else []

    def _changes(self, key: Key, level: int) -> list[Event]:
        """What must be pressed or let go so that the guest takes `key` at `level`."""
        held = list(dict.fromkeys(self._held.values()))
        shifts = [each for each in held if each.name in ("shift", "shift_r")]
        if level < ALTGR and self._is_letter(key):
            if self._caps:
                level ^= SHIFT
            if any(each.name in _SHORTCUT for each in held):
                # In Ctrl+A nobody means the case of the letter: the Shift that is held is the one that is
                # meant.
                level = level & ~SHIFT | (SHIFT if shifts else 0)
        altgr = [each for each in held if each.name == "alt_r"] if self._layout.has_altgr else []
        changes: list[Event] = []
        if not level & SHIFT:
            changes += [(each, False) for each in shifts]
        if not level & ALTGR:
            changes += [(each, False) for each in altgr]
        elif altgr:
            # Windows clients say AltGr with Control_L before it.
            changes += [(each, False) for each in held if each.name == "ctrl"]
        if level & SHIFT and not shifts:
            changes.append((by_name("shift"), True))
        if level & ALTGR and not altgr:
            changes.append((by_name("alt_r"), True))
        return changes

    def _with_modifiers(self, key: Key, level: int, events: list[Event]) -> list[Event]:
        changes = self._changes(key, level)
        return changes + events + [(each, not down) for each, down in reversed(changes)]

    def _is_letter(self, key: Key) -> bool:
        small, large = (symbol_character(word) for word in self._layout.levels[key][:2])
        return small != large and small.upper() == large

    def _function_key(self, keysym: int) -> Key | None:
        if keysym in KEY_OF:
            if keysym in JAPANESE_ONLY and self._layout.name != "ja":
                return None
            if keysym in _ALTGR_ONLY and not self._layout.has_altgr:
                return None
            return by_name(KEY_OF[keysym])
        for key, _ in self._layout.places(keysym):
            return key
        return None

    @staticmethod
    def _is_keypad(keysym: int) -> bool:
        return 0xFF80 <= keysym <= 0xFFBD

    # -- letting go -----------------------------------------------------------------------------

    def _release(self, keysym: int) -> list[Event]:
        if keysym in self._held:
            return self._let_go([keysym])
        keys = {key for key, _ in self._layout.places(keysym)}
        same = [each for each in self._characters if self._held[each] in keys]
        if same:
            return self._let_go(same)
        if keysym_character(keysym) and not self._is_keypad(keysym):
            return self._let_go(list(self._characters))
        return []

    def _let_go(self, keysyms: list[int]) -> list[Event]:
        events = []
        for keysym in keysyms:
            key = self._held.pop(keysym)
            self._characters.discard(keysym)
            if key not in self._held.values():
                events.append((key, False))
        return events
