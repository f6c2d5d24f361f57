"""Keysyms of any host, typed on a guest of any layout: the character decides, nothing stays pressed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.errors import UsageError
from enban.guest.keyboard import KeysymTranslator, by_name, layout, layout_names
from enban.guest.keyboard.keys import Key
from enban.guest.keyboard.layouts import ALTGR, DEAD, SHIFT, keysym_character, keysym_number, symbol_character

SHIFT_L, CAPS_LOCK, ALTGR_SYM, CONTROL_L = 0xFFE1, 0xFFE5, 0xFE03, 0xFFE3


class Typist:
    """A guest: keeps which keys are down and writes down what their presses type in its layout."""

    def __init__(self, name: str) -> None:
        self.layout = layout(name)
        self.down: set[Key] = set()
        self.caps = False
        self.text = ""
        self._mark = ""

    def take(self, events: list[tuple[Key, bool]]) -> None:
        for key, down in events:
            if down:
                self._press(key)
                self.down.add(key)
            else:
                assert key in self.down, f"{key} was not down"
                self.down.remove(key)

    def _press(self, key: Key) -> None:
        import unicodedata

        held = {each.name for each in self.down}
        level = SHIFT * bool(held & {"shift", "shift_r"})
        level += ALTGR * ("alt_r" in held and self.layout.has_altgr)
        if key.name == "caps_lock" and self.layout.levels[key][level] == "Caps_Lock":
            self.caps = not self.caps
        words = self.layout.levels.get(key, ("",) * 4)
        if self.caps and level < 2 and words[0] != words[1] and symbol_character(words[0]).isalpha():
            level ^= SHIFT
        word = words[level] or (words[0] if not symbol_character(words[0]) else "")
        if word in DEAD:
            self._mark = word
            return
        character = symbol_character(word)
        if self._mark and character:
            combining, alone = DEAD[self._mark]
            character = alone if character == " " else unicodedata.normalize("NFC", character + combining)
            self._mark = ""
        self.text += character


@pytest.mark.parametrize("name", layout_names())
@pytest.mark.parametrize("held", [(), (SHIFT_L,), (ALTGR_SYM,), (SHIFT_L, ALTGR_SYM)])
def test_every_character_whatever_is_held(name: str, held: tuple[int, ...]) -> None:
    """Every ASCII character and every one of the layout's own, beside any modifiers of a host's."""
    translator, guest = KeysymTranslator(name), Typist(name)
    for keysym in held:
        guest.take(translator.event(True, keysym))
    own = [character for character in layout(name).ways if "\xa0" < character <= "\xff"]
    characters = [chr(code) for code in range(0x20, 0x7F)] + own
    before = set(guest.down)
    for character in characters:
        guest.text = ""
        guest.take(translator.event(True, ord(character)))
        assert guest.text == character
        guest.take(translator.event(False, ord(character)))
        assert guest.down == before, "the modifiers are back, the key is not down"
    for keysym in held:
        guest.take(translator.event(False, keysym))
    assert not guest.down


KEYSYMS = st.one_of(
    st.integers(0x20, 0xFF),
    st.sampled_from(
        [SHIFT_L, 0xFFE2, CAPS_LOCK, ALTGR_SYM, CONTROL_L, 0xFFE9, 0xFF0D, 0xFFB7, 0xFF30, 0x10000E4]
    ),
    st.integers(0, 0xFFFFFFFF),
)


@given(st.sampled_from(layout_names()), st.lists(st.tuples(st.booleans(), KEYSYMS), max_size=40))
def test_any_events_leave_nothing_pressed(name: str, events: list[tuple[bool, int]]) -> None:
    """Releases come for pressed keys only (the guest asserts it), and in the end all keys are up."""
    translator, guest = KeysymTranslator(name), Typist(name)
    for down, keysym in events:
        guest.take(translator.event(down, keysym))
    guest.take(translator.release_all())
    assert not guest.down
    assert translator.release_all() == []


def test_a_matching_host_holds_keys() -> None:
    """Games: where host and guest agree a key stays down until it is let go, also if Shift went first."""
    translator, guest = KeysymTranslator("ja"), Typist("ja")
    guest.take(translator.event(True, ord("w")))
    assert guest.down == {by_name("w")}
    guest.take(translator.event(True, ord("w")))  # the host repeats
    guest.take(translator.event(False, ord("w")))
    assert not guest.down
    guest.take(translator.event(True, SHIFT_L))
    guest.take(translator.event(True, ord("W")))
    guest.take(translator.event(False, SHIFT_L))
    assert guest.down == {by_name("w")}
    guest.take(translator.event(False, ord("w")))
    assert not guest.down


def test_a_release_of_another_layout_leaves_nothing_stuck() -> None:
    """US: `;` held, Shift pressed, the key let go as `:`, which is another key in Japan."""
    translator, guest = KeysymTranslator("ja"), Typist("ja")
    guest.take(translator.event(True, ord(";")))
    guest.take(translator.event(True, SHIFT_L))
    guest.take(translator.event(False, ord(":")))
    assert guest.down == {by_name("shift")}


def test_shortcuts_keep_their_modifiers() -> None:
    translator = KeysymTranslator("de")
    assert translator.event(True, CONTROL_L) == [(by_name("ctrl"), True)]
    assert translator.event(True, ord("c")) == [(by_name("c"), True)]
    assert translator.event(False, ord("c")) == [(by_name("c"), False)]
    assert translator.event(True, SHIFT_L) == [(by_name("shift"), True)]
    for keysym, name in ((0xFFBE, "f1"), (0xFF0D, "ret"), (0xFF51, "left"), (0xFFE9, "alt")):
        assert translator.event(True, keysym) == [(by_name(name), True)]
        assert translator.event(False, keysym) == [(by_name(name), False)]


@pytest.mark.parametrize("letter", ["a", "A"])
def test_shortcuts_mind_no_case(letter: str) -> None:
    """Caps Lock of the host, or a script: Ctrl+A is Ctrl+A, and Ctrl+Shift+A is with Shift, whatever is
    written."""
    translator, guest = KeysymTranslator("en-us"), Typist("en-us")
    guest.take(translator.event(True, CONTROL_L))
    assert translator.event(True, ord(letter)) == [(by_name("a"), True)]
    assert translator.event(False, ord(letter)) == [(by_name("a"), False)]
    guest.take(translator.event(True, SHIFT_L))
    assert translator.event(True, ord(letter)) == [(by_name("a"), True)]


def test_altgr_of_windows_clients() -> None:
    """They say Control_L and Alt_R for AltGr; the guest must not see Control beside the character."""
    translator, guest = KeysymTranslator("de"), Typist("de")
    guest.take(translator.event(True, CONTROL_L))
    guest.take(translator.event(True, 0xFFEA))
    events = translator.event(True, ord("@"))
    assert events[0] == (by_name("ctrl"), False) and events[-1] == (by_name("ctrl"), True)
    guest.take(events)
    assert guest.text == "@"


def test_caps_lock_is_the_hosts_and_the_guests() -> None:
    translator, guest = KeysymTranslator("en-us"), Typist("en-us")
    for down in (True, False):
        guest.take(translator.event(down, CAPS_LOCK))
    assert guest.caps
    for character in "ABC, abc":  # the host's lock already shows in what it sends
        guest.take(translator.event(True, ord(character)))
        guest.take(translator.event(False, ord(character)))
    assert guest.text == "ABC, abc"


def test_caps_lock_of_another_host_on_a_japanese_guest() -> None:
    """There the key alone is Eisu, Caps Lock is with Shift."""
    assert KeysymTranslator("ja").event(True, CAPS_LOCK) == [
        (by_name("shift"), True),
        (by_name("caps_lock"), True),
        (by_name("caps_lock"), False),
        (by_name("shift"), False),
    ]
    assert KeysymTranslator("ja").event(True, 0xFF30) == [(by_name("caps_lock"), True)]


def test_japanese_keys() -> None:
    wanted = {
        0xFF2A: "grave_accent",
        0xFF21: "grave_accent",
        0xFF22: "muhenkan",
        0xFF23: "henkan",
        0xFF25: "hiragana",
    }
    wanted |= {0xFF26: "katakanahiragana", 0xFF27: "katakanahiragana", 0xFF24: "katakanahiragana"}
    for keysym, name in wanted.items():
        assert KeysymTranslator("ja").event(True, keysym) == [(by_name(name), True)]
    # Elsewhere the key left of 1 would type a character.
    assert KeysymTranslator("en-us").event(True, 0xFF2A) == []
    assert KeysymTranslator("en-us").event(True, 0xFF23) == [(by_name("henkan"), True)]


def test_what_no_key_types_is_dropped() -> None:
    translator = KeysymTranslator("ja")
    for keysym in (0, 0x1003042, 0xE9, 0x1008FF81, 0xFFFFFFFF, 0x100D800):
        assert translator.event(True, keysym) == []
        assert translator.event(False, keysym) == []
        assert len(keysym_character(keysym)) <= 1


def test_dead_keys() -> None:
    translator, guest = KeysymTranslator("fr"), Typist("fr")
    for character in "ê^ü":
        guest.take(translator.event(True, ord(character)))
        guest.take(translator.event(False, ord(character)))
    assert guest.text == "ê^ü"
    assert translator.event(True, keysym_number("dead_circumflex")) == [(by_name("bracket_left"), True)]


def test_wrong_words_are_refused() -> None:
    with pytest.raises(UsageError, match="yen or ro, not 'any'"):
        KeysymTranslator("ja", backslash_key="any")
    with pytest.raises(UsageError, match="no keyboard layout"):
        KeysymTranslator("xx")
