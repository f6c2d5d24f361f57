"""A debug port for a guest that enban runs: what QEMU is told, and the bridge behind it.

    QEMU -- private unix socket --> bridge -- unix, tcp, pipe or tty --> debuggers

The bridge listens before QEMU is started, and QEMU connects before the guest runs (a `server=on,wait=off`
socket or a pty would lose what the guest sends until somebody is there). `reconnect=` is not used: with it
QEMU connects in its own time.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading

from ..errors import UsageError
from .bridge import Bridge
from .live import Live
from .transports import parse_transport
from .transports.sockets import UnixListener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from .looking import Observer

_KINDS = {"unix": "unix:{},listen", "tcp": "tcp:{},listen", "pipe": "fifo:{}", "tty": "tty:{}"}
_HINT = "write kd:unix=PATH, kd:tcp=PORT, kd:pipe=PATH or kd:tty=DEVICE,baud=N"


def read_spec(spec: str) -> tuple[str, str, bool]:
    """The transport (see `transports.spec`) that a text like `kd:tcp=5000` asks for, the folder to record
    in ("" for none), and whether the doctor shall speak. Raises UsageError."""
    head, *options = spec.removeprefix("kd:").replace(",,", "\0").split(",")
    kind, equals, where = head.partition("=")
    if kind not in _KINDS or not equals or not where:
        raise UsageError(f"'{spec}' names no debug port", hint=_HINT)
    kept, record, doctor = [_KINDS[kind].format(where)], "", False
    for option in options:
        name, _, value = option.partition("=")
        if name == "record" and value:
            record = value.replace("\0", ",")
        elif option == "doctor":
            doctor = True
        else:
            kept.append(option)
    return ",".join(kept).replace("\0", ",,"), record, doctor


def debug_port(
    spec: str,
    *,
    id: str = "kd0",
    observers: Sequence[Observer] = (),
    log: Callable[[str], None] = lambda text: None,
) -> tuple[list[str], Coroutine[Any, Any, None]]:
    """The arguments that give QEMU the port (a chardev and a serial port on it), and the coroutine that runs
    the bridge until it is cancelled (it cleans up, so let it begin before that). Debuggers and QEMU may
    connect when this returns.

    spec: `kd:unix=PATH`, `kd:tcp=PORT` or `kd:tcp=HOST:PORT`, `kd:pipe=PATH`, `kd:tty=DEVICE,baud=N`, and
    the options of that transport; `record=FOLDER` and `doctor` besides. id: the chardev's. Raises
    UsageError and HostError; nothing is left then.
    """
    text, record, doctor = read_spec(spec)
    outside = parse_transport(text)
    room = tempfile.mkdtemp(prefix="enban-kd-")
    path = os.path.join(room, "guest")
    live = None
    try:
        live = Live(record=record, doctor=doctor, log=log)
        bridge = Bridge(
            UnixListener("guest", path),
            [outside],
            observers=[*live.observers, *observers],
            log=log,
            on_tick=live.tick,
        )
        bridge.open()
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        if live is not None:
            live.close()
        raise
    quoted = path.replace(",", ",,")
    arguments = ["-chardev", f"socket,id={id},path={quoted}", "-serial", f"chardev:{id}"]
    return arguments, _carry(bridge, live, room)


async def _carry(bridge: Bridge, live: Live, room: str) -> None:
    try:
        await run_in_thread(bridge)
    finally:
        shutil.rmtree(room, ignore_errors=True)
        live.close()


async def run_in_thread(bridge: Bridge) -> None:
    """Run a bridge in a thread of its own until it ends or this is cancelled. Raises what `run` raises."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def tell(failure: BaseException | None) -> None:
        if not ended.done():
            if failure is None:
                ended.set_result(None)
            else:
                ended.set_exception(failure)

    def work() -> None:
        failure: BaseException | None = None
        try:
            bridge.run()
        except Exception as error:
            failure = error
        try:
            loop.call_soon_threadsafe(tell, failure)
        except RuntimeError:
            pass  # the loop ended before us: nobody waits

    thread = threading.Thread(target=work, name="serial bridge", daemon=True)
    thread.start()
    try:
        await ended
    finally:
        bridge.stop()
        thread.join()  # it looks at `stop` at once
