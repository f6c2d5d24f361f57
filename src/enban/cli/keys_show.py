"""`enban keys show`: keyboard layouts, and what keys are called in each world."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments

LAYOUT = Flag("-k --layout", "Keyboard layout: ja, en-us (the default), en-gb, de, fr, ...", value="NAME")


def run(arguments: Arguments) -> int:
    from enban.guest.keyboard.keymap_file import qemu_keymap
    from enban.guest.keyboard.keys import all_keys
    from enban.guest.keyboard.layouts import layout
    from enban.guest.keyboard.picture import describe, find_keys, key_line, layout_lines, typing

    chosen = layout(arguments.text("-k", "en-us"))
    if arguments.on("--all") or arguments.on("--qemu-keymap"):
        if arguments.operands or (arguments.on("--all") and arguments.on("--qemu-keymap")):
            raise UsageError("--all and --qemu-keymap each stand alone", hint="see: enban keys show --help")
        if arguments.on("--all"):
            print("\n".join(key_line(key, chosen) for key in all_keys()))
        else:
            print(qemu_keymap(chosen.name, keysym_only=True), end="")
        return 0
    if not arguments.operands:
        print("\n".join(layout_lines(chosen)))
        return 0
    word = arguments.operands[0]
    found = find_keys(word, chosen)
    if not found:
        raise UsageError(
            f"'{word}' is no key, no number of one, and nothing that layout {chosen.name} types",
            hint="`enban keys show` draws the layout",
        )
    blocks = []
    for world, key in found:
        lines = describe(key, chosen)
        blocks.append("\n".join([f"{word} as {world}: {lines[0]}" if world else lines[0], *lines[1:]]))
    if len(word) == 1 and word in chosen.ways:
        blocks.insert(0, typing(word, chosen))
    print("\n\n".join(blocks))
    return 0


VERB = Verb(
    "keys show",
    "Draw a keyboard layout, or tell how a character is typed and what a key is called in each world.",
    "keys show [--layout NAME] [CHARACTER|KEY|NUMBER]",
    (
        LAYOUT,
        Flag("--all", "Every key in one line: its name, what each world calls it, what the layout has on it"),
        Flag(
            "--qemu-keymap", "Print the file for -k of a QEMU of your own whose VNC clients send keysyms only"
        ),
        common.HELP,
    ),
    run,
    operands=(0, 1),
    examples=(
        ("the Japanese keyboard", "keys show -k ja"),
        ("how a backslash is typed on a German one", "keys show -k de '\\'"),
        ("the key that some world calls 124", "keys show -k ja 124"),
        ("for qemu-system-x86_64 -k $PWD/ja.map -vnc ...", "keys show -k ja --qemu-keymap > ja.map"),
    ),
    notes="A key may be named as QEMU (yen), XKB (AE13), browsers (IntlYen) and X keysyms (Henkan_Mode) call"
    " it, or by its number in any world: Linux, X, PC scancodes (0x7d), USB, X keysyms (0xff2a).",
)
