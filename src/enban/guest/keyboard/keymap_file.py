"""What QEMU's `-k` is given.

QEMU with `-k` looks every VNC key up by its keysym and ignores the physical key that better clients send
with it (extended key events). So the rule: no `-k` at all, except where QEMU's own VNC server is reached by
clients that know keysyms only; then a map of ours, since QEMU's `ja` has `backslash` on Ro only, `bar` on
the wrong key, and does not know `yen`, Hiragana and Katakana. Behind our own front (`guest.vnc`) it is
none: the front tells QEMU physical keys.
"""

from __future__ import annotations

from enban.guest.keyboard.keys import Key, by_name
from enban.guest.keyboard.keysyms import JAPANESE_ONLY, KEY_OF
from enban.guest.keyboard.layouts import Layout, keysym_name, keysym_number, layout


def qemu_keymap(layout_name: str, *, keysym_only: bool = False) -> str | None:
    """The text of the file for QEMU's `-k` (which needs its absolute path), or None: give QEMU no `-k`.

    keysym_only: clients reach QEMU's own VNC server and send keysyms only. They must run on hosts with this
    layout: QEMU does not put Shift right. Raises UsageError for an unknown layout.
    """
    chosen = layout(layout_name)
    return _text(chosen) if keysym_only else None


def _text(chosen: Layout) -> str:
    lines = [
        f"# enban: keyboard layout {chosen.name} for QEMU, from xkb-data",
        "# A keysym (by number), the PC scancode of set 1 (80 is the prefix e0), modifiers.",
    ]
    seen: set[tuple[int, int]] = set()

    def add(number: int, key: Key, level: int, more: str = "") -> None:
        # QEMU looks at the low 16 bits only: what the XF86 keysyms have there belongs to other keys.
        if (number >> 16 and not 0x1000100 <= number <= 0x100FFFF) or (number, key.vnc) in seen:
            return
        seen.add((number, key.vnc))
        words = [f"U{number & 0xFFFF:04x}", f"{key.sent.vnc:#04x}"]
        words += [word for bit, word in ((1, "shift"), (2, "altgr")) if level & bit]
        lines.append(" ".join([*words, *([more] if more else [])]) + f"  # {keysym_name(number)}")

    # Where two keys have a keysym, QEMU takes the first that fits: Yen before Ro.
    ordered = sorted(chosen.levels.items(), key=lambda item: item[0].name != "yen")
    for key, words in ordered:
        keypad = key.name.startswith("kp_")
        for level, word in enumerate(words):
            if word and (level == 0 or word != words[0]):
                add(keysym_number(word), key, level if not keypad else 0)
        for word in chosen.others[key]:
            add(keysym_number(word), key, 0, "numlock" if keypad else "")
    if chosen.name == "ja":
        add(0xA5, by_name("yen"), 0)
    for number, name in KEY_OF.items():
        if number not in JAPANESE_ONLY or chosen.name == "ja":
            add(number, by_name(name), 0)
    return "\n".join(lines) + "\n"
