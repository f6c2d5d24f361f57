"""`enban serial doctor`: why does a kernel-debugging session stand still? From a recording.

Exit codes: 0 no fault, 2 a fault was found, 1 the recording cannot be read.
"""

from __future__ import annotations

import sys

from enban.cli import common
from enban.cli.options import Flag, Verb, wrapped
from enban.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments
    from enban.serial.doctor import Doctor, Verdict
    from enban.wire.kd.parser import Event

EXIT_FAULT = 2
SECOND = 1_000_000_000


def run(arguments: Arguments) -> int:
    from enban.serial.doctor import Doctor
    from enban.serial.recording import replay
    from enban.serial.verdicts import FAULT

    if arguments.on("--packets") and arguments.text("--output") == "json":
        raise UsageError("--packets is for people", hint="for programs: trace.jsonl in the recording")
    path = arguments.operands[0]
    timeout_ns = _seconds(arguments, "--timeout", "1", least_ns=SECOND // 1000)
    until_ns = _seconds(arguments, "--at", "0") if arguments.on("--at") else None
    doctor = Doctor(
        timeout_ns=timeout_ns or SECOND, on_event=_print_event if arguments.on("--packets") else None
    )
    replay(path, doctor, until_ns=until_ns)
    verdicts = doctor.verdicts(until_ns)
    if arguments.text("--output") == "json":
        common.print_json(_facts(path, doctor, verdicts))
    elif not arguments.on("-q"):
        print(common.shown(_head(path, doctor)))
        for verdict in verdicts:
            for line in verdict.words().splitlines():
                _print_wrapped(common.shown(line))
    return EXIT_FAULT if any(verdict.grade == FAULT for verdict in verdicts) else 0


def _print_wrapped(line: str) -> None:
    text = line.lstrip(" ")
    first = len(line) - len(text)
    further = first + 2 * text.startswith("- ")
    for number, part in enumerate(wrapped(text, further)):
        print(" " * (further if number else first) + part)


def _seconds(arguments: Arguments, flag: str, default: str, *, least_ns: int = 0) -> int:
    text = arguments.text(flag, default)
    try:
        value = float(text) * SECOND
    except ValueError:
        value = -1
    if not least_ns <= value <= 1e18:
        raise UsageError(f"'{text}' is no number of seconds for {flag}")
    return int(value)


def _print_event(side: int, event: Event, when_ns: int) -> None:
    """One line for what was on the line: time, who, offset, what."""
    from enban.serial.recording import described
    from enban.serial.tracking import SIDES

    fields = described(event)
    words = str(fields["kind"])
    if words == "packet":
        words = f"{fields['type']} {fields['id']}  {fields.get('says', '')}"
    elif words == "noise":
        words = f"noise, {event.length} bytes: {bytes.fromhex(str(fields['sample'])).hex(' ')}"
    elif words == "broken":
        words = f"broken packet ({fields['reason']}), {event.length} bytes"
    line = f"{when_ns / SECOND:11.6f}  {SIDES[side]:<8}  {event.offset:#010x}  {words}"
    print(common.shown(line.rstrip()), file=sys.stdout)


def _head(path: str, doctor: Doctor) -> str:
    target, debugger = doctor.target, doctor.debugger
    seconds = (doctor.now_ns - max(0, doctor.began_ns)) / SECOND
    return (
        f"{path}: {seconds:.1f} s; from the guest {target.bytes} bytes, {target.packets} packets; "
        f"from the debugger {debugger.bytes} bytes, {debugger.packets} packets"
    )


def _facts(path: str, doctor: Doctor, verdicts: list[Verdict]) -> dict[str, object]:
    from enban.serial.tracking import SIDES, middle

    return {
        "recording": path,
        "seconds": (doctor.now_ns - max(0, doctor.began_ns)) / SECOND,
        "guest": doctor.state,
        "requests": doctor.requests,
        "last-request": _last_request(doctor),
        **{
            name: {
                "bytes": sender.bytes,
                "packets": sender.packets,
                "acknowledged": sender.acked,
                "ack-ms": {
                    "median": middle(sender.ack_ns) / 1e6,
                    "longest": sender.ack_most_ns / 1e6,
                },
                "given-up": sender.given_up,
                "retransmissions": sender.retransmissions,
                "broken": sender.broken,
                "noise": sender.noise + sender.parser.noise,
                "resets": sender.resets,
                "break-ins": sender.break_ins,
            }
            for name, sender in zip(SIDES, doctor.sides, strict=True)
        },
        "verdicts": [verdict.as_dict() for verdict in verdicts],
    }


def _last_request(doctor: Doctor) -> dict[str, object] | None:
    """What the debugger asked last, how long ago, whether it waits for the answer still."""
    request = doctor.request
    if request is None:
        return None
    return {
        "says": request.words,
        "offset": request.packet.offset,
        "seconds-ago": (doctor.now_ns - request.sent_ns) / SECOND,
        "acknowledged": request.acked_ns > 0,
        "waiting": request.is_open,
    }


VERB = Verb(
    "serial doctor",
    "Say why a kernel-debugging session stands still, from a recording of enban serial bridge --record.",
    "serial doctor [flags] RECORDING",
    (
        Flag("--packets", "List every packet, break-in and piece of noise first, one a line"),
        Flag("--at", "Judge as it was so many seconds after the start, not at the end", value="SECONDS"),
        Flag("--timeout", "How long the guest waits for an ACK before it sends again (1)", value="SECONDS"),
        common.OUTPUT,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(1, 1),
    examples=(
        ("what went wrong?", "serial doctor kd.rec"),
        ("what did they say to each other?", "serial doctor --packets kd.rec"),
        ("in a script", "serial doctor --output=json kd.rec"),
    ),
    notes="Each verdict has its evidence and the offsets of it in target.raw and debugger.raw of the "
    "recording. "
    "Exit code: 0 no fault, 2 a fault was found, 1 the recording cannot be read.",
)
