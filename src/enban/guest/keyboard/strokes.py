"""Text and chords as key strokes: what to press for "Hello\\n", for `ctrl-alt-delete`.

A stroke is a set of keys pressed in order and released in the opposite order. The rule: all of a text is
turned into strokes before the first is sent, so what a layout cannot type is named and nothing is
half-typed.
"""

from __future__ import annotations

from enban.errors import UsageError
from enban.guest.keyboard import keys
from enban.guest.keyboard.layouts import ALTGR, SHIFT, layout

_NAMED = 12  # characters named in an error message


class Stroke:
    """Keys pressed together.

    names: the keys (names of the table) in the order of pressing. hold_ms: how long they stay down. text: the
    character this stroke completes, for reports.
    """

    __slots__ = ("hold_ms", "names", "text")

    def __init__(self, names: tuple[str, ...], *, hold_ms: int = 0, text: str = "") -> None:
        self.names = names
        self.hold_ms = hold_ms
        self.text = text

    def __repr__(self) -> str:
        return f"Stroke({'-'.join(self.names)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stroke) and (self.names, self.hold_ms) == (other.names, other.hold_ms)

    def __hash__(self) -> int:
        return hash((self.names, self.hold_ms))

    def events(self) -> list[tuple[str, bool]]:
        """(QKeyCode, pressed) in the order of sending."""
        codes = [keys.by_name(name).qcode for name in self.names]
        return [(code, True) for code in codes] + [(code, False) for code in reversed(codes)]


def text_strokes(text: str, layout_name: str = "en-us") -> list[Stroke]:
    """The strokes that type a text on a guest whose keyboard layout is `layout_name`.

    Line ends (also CR LF) are the Return key, tabs the Tab key. Caps Lock is taken to be off. Raises
    UsageError that names the characters (and the place of the first) that this layout cannot type.
    """
    ways = layout(layout_name).ways
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    missing = {
        character: place for place, character in reversed(list(enumerate(text))) if character not in ways
    }
    if missing:
        places = sorted(missing, key=lambda character: missing[character])
        named = ", ".join(_visible(character) for character in places[:_NAMED])
        if len(places) > _NAMED:
            named += f" and {len(places) - _NAMED} more"
        raise UsageError(
            f"layout {layout_name} cannot type {named} (first at character {missing[places[0]] + 1})",
            hint="nothing was typed; use another layout or leave them out",
        )
    strokes: list[Stroke] = []
    for character in text:
        presses = ways[character].presses
        for number, (key, level) in enumerate(presses, 1):
            names = ["shift"] if level & SHIFT else []
            if level & ALTGR:
                names.append("alt_r")
            strokes.append(Stroke((*names, key.name), text=character if number == len(presses) else ""))
    return strokes


def chord_strokes(text: str, *, hold_ms: int = 0) -> list[Stroke]:
    """The strokes of chords, keys joined by "-" or "+", chords separated by blanks: "ctrl-alt-delete f2".

    Keys are named as in `enban keys show`, or as people call them (enter, altgr, win). "--" is the key minus.
    Raises UsageError for an unknown key, a key named twice in a chord, or nothing at all.
    """
    strokes = []
    for word in text.split():
        plain = word.replace("+", "-")
        if plain in ("-", "--"):
            parts = ["minus"]
        elif plain.endswith("--"):
            parts = [*plain[:-2].split("-"), "minus"]
        else:
            parts = plain.split("-")
        found = [keys.by_name(part) for part in parts]
        qcodes = [key.qcode for key in found]
        if len(set(qcodes)) < len(qcodes):
            raise UsageError(f"'{word}' has a key twice")
        if sum(key.bytes_at_most for key in found) > 16:
            raise UsageError(
                f"'{word}' is more keys than a PS/2 keyboard can tell of at once", hint="use fewer"
            )
        strokes.append(Stroke(tuple(key.name for key in found), hold_ms=hold_ms))
    if not strokes:
        raise UsageError("no key is named", hint="for example: ctrl-alt-delete")
    return strokes


def _visible(character: str) -> str:
    return f"'{character}'" if character.isprintable() else f"U+{ord(character):04X}"
