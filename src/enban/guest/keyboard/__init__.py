"""Keyboards: every key of every host to a guest, and text typed into it.

key_data, layout_data  generated tables: keys in each world, what each key gives in each layout
keys                   the physical keys; from X, Wayland, browsers, USB, VNC to what the guest must receive
layouts                eleven layouts; how each character is typed
strokes                text and chords as key strokes
send                   strokes to QEMU through QMP, no key lost
keysyms                live X keysyms (plain VNC clients), Shift and AltGr put right
keymap_file            what QEMU's `-k` is given, and when nothing
picture                a layout drawn in a terminal, a key described
testing                which keys are pressed, seen on a device or in a terminal
"""

from __future__ import annotations

from enban.guest.keyboard.keymap_file import qemu_keymap
from enban.guest.keyboard.keys import Key, by_name, from_browser, from_evdev, from_vnc, from_x, x_driver
from enban.guest.keyboard.keysyms import KeysymTranslator
from enban.guest.keyboard.layouts import layout, layout_names
from enban.guest.keyboard.send import Pacer, send_strokes
from enban.guest.keyboard.strokes import Stroke, chord_strokes, text_strokes

__all__ = [
    "Key",
    "KeysymTranslator",
    "Pacer",
    "Stroke",
    "by_name",
    "chord_strokes",
    "from_browser",
    "from_evdev",
    "from_vnc",
    "from_x",
    "layout",
    "layout_names",
    "qemu_keymap",
    "send_strokes",
    "text_strokes",
    "x_driver",
]
