"""`enban keys test`: shows which keys are pressed."""

from __future__ import annotations

import sys

from enban.cli import common
from enban.cli.keys_show import LAYOUT
from enban.cli.options import Flag, Verb
from enban.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    from enban.guest.keyboard.layouts import layout
    from enban.guest.keyboard.testing import device_lines, terminal_lines

    chosen = layout(arguments.text("-k", "en-us"))
    count = arguments.text("--count", "0")
    if not count.isascii() or not count.isdigit():
        raise UsageError(f"--count {count} is no number")
    left = int(count)
    device = arguments.text("--device")
    lines = device_lines(device, chosen) if device else terminal_lines(chosen)
    try:
        for line, is_key in lines:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            left -= is_key
            if is_key and left == 0:
                break
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        lines.close()  # puts the terminal back
    return 0


VERB = Verb(
    "keys test",
    "Show what each key that is pressed is called in each world, until Ctrl-C.",
    "keys test [--layout NAME] [--device FILE] [--count N]",
    (
        LAYOUT,
        Flag("--device", "A Linux input device (/dev/input/event3) instead of the terminal", value="FILE"),
        Flag("--count", "End after so many keys", value="N"),
        common.HELP,
    ),
    run,
    operands=(0, 0),
    examples=(
        ("in a terminal of a Japanese system", "keys test -k ja"),
        ("the keys themselves (as root)", "keys test --device /dev/input/event3"),
    ),
    notes="A terminal passes on characters, not keys: the key shown is the one that types them in the layout."
    " An input device tells the keys themselves, those without a character too.",
)
