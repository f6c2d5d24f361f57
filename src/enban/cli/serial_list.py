"""`enban serial list`: the serial ports of this machine."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    from enban.serial.ports import serial_ports

    found = serial_ports()
    if arguments.text("--output") == "json":
        common.print_json([port.as_json() for port in found])
        return 0
    if not found and not arguments.on("-q"):
        common.complain("no serial port was found here")
    for port in found:
        line = f"{port.device}  {port.driver}"
        print(common.shown(line + (f"  {port.link}" if port.link else "")))
    return 0


VERB = Verb(
    "serial list",
    "List the serial ports of this machine, without touching them.",
    "serial list [flags]",
    (common.OUTPUT, common.QUIET, common.HELP),
    run,
    operands=(0, 0),
    examples=(
        ("ports, their drivers, and names that stay the same", "serial list"),
        ("for programs", "serial list --output=json"),
    ),
)
