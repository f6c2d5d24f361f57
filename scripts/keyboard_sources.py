"""Takes what enban's keyboard tables are made of out of xkb-data, into scripts/keyboard/xkb.tsv.

    .venv/bin/python scripts/keyboard_sources.py            # rewrites the file
    .venv/bin/python scripts/keyboard_sources.py --check    # exit code 1 if that would change it,
                                                            # 3 if another xkb-data is installed

Needed only to take up newer data: it asks libxkbcommon (Debian package libxkbcommon0) what each key of each
layout gives, from the rules and symbols of xkb-data. The file is kept, so that the tables can be made
anywhere. Its rows, separated by tabs:

    version  that of xkb-data
    evdev    XKB name   X keycode                     keycodes/evdev
    xfree86  XKB name   X keycode                     keycodes/xfree86, the old `kbd` driver
    layout   name  XKB model  XKB layout (and variant)
    key      layout  XKB name  plain  shift  altgr  shift+altgr  others
                                                      keysym names, "-" for none; others: behind Alt, Ctrl,
                                                      NumLock
    keysym   name   number in hex   character code in hex or "-"
"""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import sys
from pathlib import Path

KEPT = Path(__file__).parent / "keyboard" / "xkb.tsv"
XKB = Path("/usr/share/X11/xkb")
PACKAGE = Path("/usr/share/pkgconfig/xkeyboard-config.pc")

# Our name, XKB model, XKB layout and variant.
LAYOUTS = (
    ("ja", "jp106", "jp"),
    ("en-us", "pc105", "us"),
    ("en-gb", "pc105", "gb"),
    ("de", "pc105", "de"),
    ("de-nodeadkeys", "pc105", "de nodeadkeys"),
    ("fr", "pc105", "fr"),
    ("es", "pc105", "es"),
    ("it", "pc105", "it"),
    ("sv", "pc105", "se"),
    ("pt-br", "abnt2", "br"),
    ("ko", "pc105", "kr"),
)


class _Names(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_char_p) for name in ("rules", "model", "layout", "variant", "options"))


def _library() -> ctypes.CDLL:
    name = ctypes.util.find_library("xkbcommon")
    if name is None:
        sys.exit("libxkbcommon is missing (Debian package libxkbcommon0)")
    xkb = ctypes.CDLL(name)
    xkb.xkb_context_new.restype = ctypes.c_void_p
    xkb.xkb_keymap_new_from_names.restype = ctypes.c_void_p
    xkb.xkb_keymap_key_get_name.restype = ctypes.c_char_p
    return xkb


def keycodes(path: Path, *sections: str) -> dict[str, int]:
    """The codes of an XKB keycodes file, aliases resolved; later sections win."""
    found: dict[str, int] = {}
    aliases: dict[str, str] = {}
    for section in sections:
        body = re.search(rf'xkb_keycodes "{section}" \{{(.*?)\n\}};', path.read_text(), re.DOTALL)
        assert body is not None, f"{path} has no section {section}"
        text = re.sub(r"//.*|^\s*#.*", "", body[1], flags=re.MULTILINE)
        for alias, name, code in re.findall(r"(alias\s+)?<([\w+-]+)>\s*=\s*<?([\w+-]+)>?;", text):
            if alias:
                aliases[name] = code
            else:
                found[name] = int(code)
    for name, target in aliases.items():
        if target in found:
            found.setdefault(name, found[target])
    return found


def version() -> str:
    """The installed version of xkb-data."""
    found = re.search(r"^Version: *(\S+)", PACKAGE.read_text(), re.MULTILINE) if PACKAGE.exists() else None
    return found[1] if found else "unknown"


def rows() -> list[tuple[str, ...]]:
    out: list[tuple[str, ...]] = [("version", version())]
    evdev = keycodes(XKB / "keycodes" / "evdev", "evdev")
    kbd = keycodes(XKB / "keycodes" / "xfree86", "basic", "xfree86")
    for world, table in (("evdev", evdev), ("xfree86", kbd)):
        out += [(world, name, str(code)) for name, code in sorted(table.items())]
    xkb = _library()
    context = ctypes.c_void_p(xkb.xkb_context_new(0))
    keysyms: dict[str, int] = {}

    def named(number: int) -> str:
        buffer = ctypes.create_string_buffer(64)
        xkb.xkb_keysym_get_name(number, buffer, 64)
        keysyms[buffer.value.decode()] = number
        return buffer.value.decode()

    for layout, model, symbols in LAYOUTS:
        out.append(("layout", layout, model, symbols))
        words = [word.encode() for word in symbols.split()]
        names = _Names(b"evdev", model.encode(), words[0], b"".join(words[1:]), b"")
        keymap = ctypes.c_void_p(xkb.xkb_keymap_new_from_names(context, ctypes.byref(names), 0))
        assert keymap.value, f"libxkbcommon cannot make layout {symbols} for {model}"
        bits = {
            word: 1 << xkb.xkb_keymap_mod_get_index(keymap, modifier)
            for word, modifier in (("shift", b"Shift"), ("altgr", b"Mod5"))
        }
        places = (0, bits["shift"], bits["altgr"], bits["shift"] | bits["altgr"])
        for code in range(9, 256):
            name = xkb.xkb_keymap_key_get_name(keymap, code)
            if not name:
                continue
            found: dict[int, str] = {}
            others: list[str] = []
            for level in range(xkb.xkb_keymap_num_levels_for_key(keymap, code, 0)):
                symbols_pointer = ctypes.POINTER(ctypes.c_uint32)()
                arguments = (keymap, code, 0, level, ctypes.byref(symbols_pointer))
                if xkb.xkb_keymap_key_get_syms_by_level(*arguments) != 1:
                    continue
                masks = (ctypes.c_uint32 * 32)()
                count = xkb.xkb_keymap_key_get_mods_for_level(keymap, code, 0, level, masks, 32)
                ours = [mask for mask in masks[:count] if mask in places]
                word = named(symbols_pointer[0])
                for mask in ours:
                    found.setdefault(mask, word)
                if not ours:
                    others.append(word)
            if not found and not others:
                continue
            # A type without a second level gives the plain keysym with Shift too; nothing to write down.
            four = [found.get(mask, "-") for mask in places]
            out.append(("key", layout, name.decode(), *four, *sorted(set(others) - set(four))))
        xkb.xkb_keymap_unref(keymap)
    for word, number in sorted(keysyms.items(), key=lambda item: item[1]):
        character = xkb.xkb_keysym_to_utf32(number)
        out.append(("keysym", word, f"{number:x}", f"{character:x}" if character else "-"))
    return out


def main() -> int:
    kept = KEPT.read_text() if KEPT.exists() else ""
    if "--check" in sys.argv[1:] and f"version\t{version()}\n" not in kept:
        print(f"xkb-data {version()} is installed, {KEPT.name} is of another version", file=sys.stderr)
        return 3
    text = "".join("\t".join(row) + "\n" for row in rows())
    if "--check" in sys.argv[1:]:
        if kept != text:
            print(f"{KEPT.name} is not what the installed xkb-data gives", file=sys.stderr)
            return 1
        return 0
    KEPT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
