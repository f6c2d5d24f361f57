"""Text and chords as strokes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.errors import UsageError
from enban.guest.keyboard import Stroke, chord_strokes, layout, layout_names, text_strokes
from enban.guest.keyboard.layouts import DEAD, keysym_character, keysym_number


def typed(strokes: list[Stroke], name: str) -> str:
    """What a system with this layout makes of strokes: dead keys wait for the next character."""
    import unicodedata

    chosen = layout(name)
    out, mark = "", ""
    for stroke in strokes:
        *modifiers, last = stroke.names
        level = ("shift" in modifiers) + 2 * ("alt_r" in modifiers)
        if last in ("ret", "tab", "esc", "backspace"):
            out += {"ret": "\n", "tab": "\t", "esc": "\x1b", "backspace": "\b"}[last]
            continue
        (symbols,) = [symbols for key, symbols in chosen.levels.items() if key.name == last]
        symbol = symbols[level] or symbols[0]
        if symbol in DEAD:
            assert not mark
            mark = symbol
            continue
        character = keysym_character(keysym_number(symbol))
        if mark:
            combining, alone = DEAD[mark]
            character = alone if character == " " else unicodedata.normalize("NFC", character + combining)
            mark = ""
        out += character
    assert not mark
    return out


@pytest.mark.parametrize("name", layout_names())
def test_every_character_of_a_layout_comes_back(name: str) -> None:
    for character in layout(name).ways:
        assert typed(text_strokes(character, name), name) == character


@given(st.sampled_from(layout_names()), st.text(st.characters(max_codepoint=0x17F)))
def test_text_is_typed_whole_or_refused_by_name(name: str, text: str) -> None:
    ways = layout(name).ways
    text = text.replace("\r", "\n")
    missing = [character for character in text if character not in ways]
    if missing:
        with pytest.raises(UsageError) as caught:
            text_strokes(text, name)
        shown = missing[0]
        assert (f"'{shown}'" if shown.isprintable() else f"U+{ord(shown):04X}") in caught.value.what
        assert f"character {text.index(shown) + 1})" in caught.value.what
    else:
        assert typed(text_strokes(text, name), name) == text


def test_line_ends_are_return() -> None:
    assert text_strokes("\r\n\n\r") == [Stroke(("ret",))] * 3


def test_japanese_backslash_and_its_neighbours() -> None:
    found = text_strokes("\\_|@^~:", "ja")
    assert [stroke.names for stroke in found] == [
        ("ro",),
        ("shift", "ro"),
        ("shift", "yen"),
        ("bracket_left",),
        ("equal",),
        ("shift", "equal"),
        ("apostrophe",),
    ]


def test_other_names_of_layouts() -> None:
    assert layout("jp106") is layout("JA") is layout("ja")
    assert layout("pt_BR") is layout("abnt2")
    with pytest.raises(UsageError, match="no keyboard layout 'xx'; use one of ja, en-us"):
        layout("xx")


def test_many_missing_characters_are_counted() -> None:
    with pytest.raises(UsageError) as caught:
        text_strokes("abc" + "".join(chr(0x3042 + n) for n in range(20)), "ja")
    assert "and 8 more (first at character 4)" in caught.value.what


def test_chords() -> None:
    assert [stroke.names for stroke in chord_strokes("ctrl-alt-delete alt+F2 ctrl-- ctrl+- - Win")] == [
        ("ctrl", "alt", "delete"),
        ("alt", "f2"),
        ("ctrl", "minus"),
        ("ctrl", "minus"),
        ("minus",),
        ("meta_l",),
    ]
    (stroke,) = chord_strokes("ctrl-c", hold_ms=50)
    assert stroke.hold_ms == 50
    assert stroke.events() == [("ctrl", True), ("c", True), ("c", False), ("ctrl", False)]


@pytest.mark.parametrize("text", ["", "  ", "ctrl-", "-x", "ctrl-any", "a-a", "lang5", "kp_0-kp_0"])
def test_chords_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        chord_strokes(text)


def test_a_chord_that_no_keyboard_can_tell() -> None:
    with pytest.raises(UsageError, match="more keys than a PS/2 keyboard"):
        chord_strokes("a-b-c-d-e-f-g-h-i")
