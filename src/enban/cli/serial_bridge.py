"""`enban serial bridge`: a guest's serial line and those who debug it, joined until told to stop."""

from __future__ import annotations

import sys

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from enban.cli.options import Arguments
    from enban.serial.bridge import Bridge


def run(arguments: Arguments) -> int:
    from enban.serial.bridge import Bridge
    from enban.serial.live import Live
    from enban.serial.polling import SPIN_US
    from enban.serial.transports import parse_transport

    sides = [parse_transport(text) for text in arguments.operands]
    if sum(side.name == "stdio" for side in sides) > 1:
        raise UsageError("stdio can be one end only")
    if sides[0].watch:
        raise UsageError(
            f"'{sides[0].name}' may only look on: it is no guest", hint="name the guest's end first"
        )
    quiet = arguments.on("-q")
    log = _drop if quiet else common.complain
    with Live(
        record=arguments.text("--record"),
        doctor=arguments.on("--doctor"),
        inject_reset=arguments.on("--inject-reset"),
        inject_break_in=arguments.on("--inject-break-in"),
        log=common.complain,
    ) as live:
        rates = _Rates() if arguments.on("--rates") else None

        def tick() -> None:
            live.tick()
            if rates is not None:
                rates.show(bridge)

        bridge = Bridge(
            sides[0],
            sides[1:],
            observers=live.observers,
            injector=live.injector,
            log=log,
            on_tick=tick,
            spin_us=common.number(arguments, "--spin-us", SPIN_US, most=100_000),
        )
        bridge.open()
        for side in sides:
            log(f"ready: {side.address()}")
        _catch_signals(bridge)
        bridge.run()
        if not quiet:
            for line in bridge.status().splitlines():
                log(line)
    return 0


class _Rates:
    """The live counters: on a terminal one line that is written over, elsewhere a line a second."""

    def __init__(self) -> None:
        self._over = sys.stderr.isatty()

    def show(self, bridge: Bridge) -> None:
        text = bridge.counters.rates()
        print(f"\r{text}\x1b[K" if self._over else text, end="" if self._over else "\n", file=sys.stderr)
        sys.stderr.flush()


def _drop(text: str) -> None:
    pass


def _catch_signals(bridge: Bridge) -> None:
    import signal

    def stop(number: int, frame: object) -> None:
        bridge.stop()

    def status(number: int, frame: object) -> None:
        bridge.request_status()

    handlers: dict[str, Callable[[int, object], None]] = {"SIGUSR1": status}
    handlers |= dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP"), stop)
    for name, handler in handlers.items():
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


VERB = Verb(
    "serial bridge",
    "Join a guest's serial line with those who debug it, over any transport, byte for byte.",
    "serial bridge [flags] GUEST DEBUGGER [DEBUGGER...]",
    (
        Flag("--record", "Record both directions in this folder, for enban serial doctor", value="FOLDER"),
        Flag("--doctor", "Say what is wrong with the debugging session, as soon as something is"),
        Flag("--rates", "Show bytes and packets a second and the round trip, once a second"),
        Flag(
            "--inject-reset",
            "Send the guest a RESET packet when a stopped session has stood still; it is logged",
        ),
        Flag(
            "--inject-break-in",
            "Repeat a debugger's break-in that had no effect; it is logged",
        ),
        Flag(
            "--spin-us",
            "Before waiting, look again and again for so many microseconds while packets follow each other: "
            "a third off the round trip, costs processor time; 0 for never (100)",
            value="US",
        ),
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(2, -1),
    examples=(
        (
            "a guest's unix socket, for WinDbg on another machine",
            "serial bridge unix:vm.sock tcp:*:5000,listen",
        ),
        (
            "a cable, and what the guest says in a file",
            "serial bridge tty:/dev/ttyS0,baud=115200 unix:kd,listen file:log",
        ),
        (
            "where does the session hang?",
            "serial bridge --doctor --record kd.rec unix:vm.sock,listen unix:kd.sock,listen",
        ),
    ),
    notes="Ends are named unix:PATH, tcp:HOST:PORT, fifo:PATH, pty:LINK, tty:DEVICE,baud=N, stdio or "
    "file:PATH; unix and tcp connect, or with ,listen let others connect. ,pace=BAUD models a line of that "
    "speed, ,watch lets an end look on only. The first end is the guest's: it is connected first and stays, "
    "debuggers come and go, one at a time is heard. Everything is told on standard error; SIGUSR1 prints the "
    "counters.",
)
