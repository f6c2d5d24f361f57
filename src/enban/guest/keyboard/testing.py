"""Shows which keys are pressed, for `enban keys test`: from a Linux input device, or a terminal.

A device tells keys; a terminal tells characters and escape sequences only. The rule: a terminal is put back
as it was, however this ends.
"""

from __future__ import annotations

import codecs
import os
import re
import struct
import sys
from typing import TYPE_CHECKING, Any

from enban.errors import HostError, from_oserror
from enban.guest.keyboard.keys import all_keys, from_evdev
from enban.guest.keyboard.layouts import Layout
from enban.guest.keyboard.picture import key_line

if TYPE_CHECKING:
    from collections.abc import Generator

    # A line to print, and whether it is a key (else it is about the test).
    Lines = Generator[tuple[str, bool], None, None]

_EVENT = struct.Struct("@llHHi")  # struct input_event: time (two longs), type, code, value
_EV_KEY = 1
_VALUES = {0: "release", 1: "press", 2: "repeat"}
# A piece of what a terminal sends: a sequence, Alt with a character, or a character.
_PIECE = re.compile(r"\x1b\[\[?[0-9;]*[ -~]|\x1bO[ -~]|\x1b[^\x1b]|.", re.DOTALL)
_END = ("\x03", "\x04")  # Ctrl-C, Ctrl-D
# What terminals of the xterm family send, and the Linux console.
_SEQUENCES = {
    "[A": "up",
    "[B": "down",
    "[C": "right",
    "[D": "left",
    "[H": "home",
    "[F": "end",
    "[1~": "home",
    "[2~": "insert",
    "[3~": "delete",
    "[4~": "end",
    "[5~": "pgup",
    "[6~": "pgdn",
    "OP": "f1",
    "OQ": "f2",
    "OR": "f3",
    "OS": "f4",
    "[15~": "f5",
    "[17~": "f6",
    "[18~": "f7",
    "[19~": "f8",
    "[20~": "f9",
    "[21~": "f10",
    "[23~": "f11",
    "[24~": "f12",
    "[[A": "f1",
    "[[B": "f2",
    "[[C": "f3",
    "[[D": "f4",
    "[[E": "f5",
    "[Z": "tab",
}


def device_lines(path: str, chosen: Layout) -> Lines:
    """Keys of an input device. Raises HostError: no such device, no permission, it was unplugged."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        hint = "input devices are for root and the group input" if isinstance(error, PermissionError) else ""
        raise from_oserror(error, "open the input device", path, hint=hint) from error
    try:
        yield "Press keys; Ctrl-C ends", False
        while True:
            try:
                data = os.read(file, _EVENT.size)
            except OSError as error:
                raise from_oserror(error, "read the input device", path) from error
            if not data:
                return
            if len(data) != _EVENT.size:
                raise HostError("this is no input device: half an event", path=path)
            _, _, kind, code, value = _EVENT.unpack(data)
            if kind == _EV_KEY:
                key = from_evdev(code)
                line = key_line(key, chosen) if key is not None else f"evdev {code}: no key of the table"
                yield f"{_VALUES.get(value, str(value)):<9}{line}", value == 1
    finally:
        os.close(file)


def terminal_lines(chosen: Layout) -> Lines:
    """Characters from standard input, and the keys of the layout that type them."""
    file = sys.stdin.fileno()
    restore = _raw(file)
    try:
        yield "Type; Ctrl-C ends", False
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            data = os.read(file, 256)
            if not data:
                return
            # A terminal sends a sequence in one piece, and with it what was typed quickly before and after.
            for piece in _PIECE.findall(decoder.decode(data)):
                if piece in _END and restore is not None:
                    return
                line = _character_line if len(piece) == 1 else _sequence_line
                yield line(piece, chosen), True
    finally:
        if restore is not None:
            import termios

            termios.tcsetattr(file, termios.TCSADRAIN, restore)


def _raw(file: int) -> list[Any] | None:
    """Let a terminal pass every key on at once; returns how it was, None if this is no terminal."""
    if not os.isatty(file):
        return None
    import termios
    import tty

    before = termios.tcgetattr(file)
    tty.setcbreak(file)
    mode = termios.tcgetattr(file)
    mode[0] &= ~(termios.ICRNL | termios.IXON)
    mode[3] &= ~(termios.ISIG | termios.IEXTEN)
    termios.tcsetattr(file, termios.TCSADRAIN, mode)
    return before


def _sequence_line(text: str, chosen: Layout) -> str:
    name = _SEQUENCES.get(text[1:])
    shown = "Esc " + " ".join(character if character.isprintable() else "?" for character in text[1:])
    if len(text) == 2:
        return f"{shown + ' ':<12}Alt with: {_character_line(text[1], chosen)}"
    for key in all_keys():
        if key.name == name:
            return f"{shown + ' ':<12}{key_line(key, chosen)}"
    return f"{shown + ' ':<12}a sequence of the terminal's own"


def _character_line(character: str, chosen: Layout) -> str:
    if character == "\r":
        character = "\n"
    if character == "\x7f":
        character = "\b"
    shown = character if character.isprintable() and character != " " else f"U+{ord(character):04X}"
    way = chosen.ways.get(character)
    if way is not None:
        lead = "".join(f"{key.name} then " for key, _ in way.presses[:-1])
        key, level = way.presses[-1]
        held = ("", "Shift+", "AltGr+", "Shift+AltGr+")[level]
        return f"{shown:<12}{lead}{held}{key_line(key, chosen)}"
    if "\x01" <= character <= "\x1a":
        return f"{shown:<12}Ctrl+{chr(ord(character) + 64)}"
    return f"{shown:<12}not in layout {chosen.name}"
