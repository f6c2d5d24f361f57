"""A machine as `enban run` runs it: with a terminal, a control socket and signals, to its end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from ..errors import PeerError
from .control import ControlServer
from .machine import GRACE_S, Machine
from .process import describe_exit
from .settings import CONSOLE, Settings
from .terminal import Terminal

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(
    settings: Settings,
    *,
    terminal: bool,
    grace_s: float = GRACE_S,
    log: Callable[[str], None],
    ready: Callable[[str], None],
) -> None:
    """Run a machine until its guest ends.

    terminal: show the console. ready: called with the machine's name when it runs. The first signal (or
    Ctrl-] typed) asks the guest to shut down, which has `grace_s` seconds for it; the second ends QEMU, the
    third kills it. Raises what starting raises, PeerError if QEMU died, and what closing the disks raises.
    """
    asyncio.run(_run(settings, terminal, grace_s, log, ready))


async def _run(
    settings: Settings,
    wants_terminal: bool,
    grace_s: float,
    log: Callable[[str], None],
    ready: Callable[[str], None],
) -> None:
    loop = asyncio.get_running_loop()
    shown: Terminal | None = None

    def tell(text: str) -> None:
        log(text + "\r" if shown is not None and shown.raw else text)

    machine = Machine(settings, log=tell)
    asked = 0
    tasks: set[asyncio.Task[None]] = set()
    starting: asyncio.Task[None] | None = None

    def stop() -> None:
        nonlocal asked
        asked += 1
        if starting is not None and not starting.done():
            starting.cancel()
        elif asked == 1:
            tasks.add(loop.create_task(machine.shutdown(grace_s)))
        elif asked == 2:
            tasks.add(loop.create_task(machine.kill()))
        else:
            machine.kill_now()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    control = ControlServer(machine)
    try:
        starting = loop.create_task(machine.start())
        try:
            await starting
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        await control.start()
        if wants_terminal and CONSOLE in settings.serial:
            shown = Terminal(machine.console, stop)
            shown.start()
        ready(machine.name)
        code = await machine.wait()
        if code and not asked:
            raise PeerError(f"QEMU ended with {describe_exit(code)}; the disks are closed in order")
    finally:
        if shown is not None:
            shown.close()
        await control.close()
        await machine.close()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
