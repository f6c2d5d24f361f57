"""What every server needs as a process: a disk that was asked for, signals that end it, a pid file.

What they undo at the end they undo in the reverse order, on one `ExitStack`, whatever fails in between.
"""

from __future__ import annotations

import os
import signal
import threading

from ..block.gate import SIBLINGS
from ..block.runtime import BLOCKING, drive
from ..catalog import open_door
from ..errors import from_oserror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack
    from typing import Any, Protocol

    from ..block.cipher import Passphrase
    from ..block.door import Door
    from ..block.gate import Gate

    class Stoppable(Protocol):
        """A server whose `stop` and `request_status` may be called from a signal handler."""

        def stop(self) -> None: ...

        def request_status(self) -> None: ...


class Wanted:
    """One disk to serve. reference: as for `enban.open`. name: the export's, "" for the default one.

    offset, size: the slice of the disk in bytes; size None is to its end. bitmaps: dirty bitmaps to show.
    """

    __slots__ = ("bitmaps", "description", "format", "name", "offset", "reference", "size")

    def __init__(
        self,
        reference: str | dict[str, Any],
        name: str = "",
        *,
        format: str = "",
        offset: int = 0,
        size: int | None = None,
        description: str = "",
        bitmaps: Sequence[str] = (),
    ) -> None:
        self.bitmaps = bitmaps
        self.reference = reference
        self.name = name
        self.format = format
        self.offset = offset
        self.size = size
        self.description = description


class Settings:
    """What any server can be told. cache: as qemu's names. passphrase: of encrypted images.

    snapshot: writes go to temporary overlays, in files without a name in snapshot_dir, and vanish.
    spin_us: how long a thread looks for the next request before it sleeps.
    """

    def __init__(self, spin_us: int) -> None:
        self.read_only = False
        self.pid_file = ""
        self.spin_us = spin_us
        self.cache = "writeback"
        self.snapshot = False
        self.snapshot_dir = ""
        self.passphrase: Passphrase = None
        self.gate: Gate = SIBLINGS


def open_wanted(one: Wanted, settings: Settings, stack: ExitStack) -> Door:
    """The open disk; leaving the stack closes it. Raises UsageError, HostError, ImageError."""
    door: Door = drive(
        open_door(
            one.reference,
            BLOCKING,
            format=one.format,
            writable=not (settings.read_only or settings.snapshot),
            cache=settings.cache,
            gate=settings.gate,
            snapshot=settings.snapshot,
            snapshot_dir=settings.snapshot_dir or None,
            passphrase=settings.passphrase,
            empty_drive=True,
        )
    )
    stack.callback(lambda: drive(door.close()))
    return door


def remove_file(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def write_pid(path: str, stack: ExitStack) -> None:
    """Only a server that can be reached has a pid file; it appears whole."""
    partial = f"{path}.{os.getpid()}"
    try:
        with open(partial, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        os.rename(partial, path)
    except OSError as error:
        remove_file(partial)
        raise from_oserror(error, "write the pid file", path) from error
    stack.callback(remove_file, path)


def keep_signal_handlers(stack: ExitStack) -> dict[int, Any]:
    """The signal handlers that are put back at the very end, after everything else on the stack."""
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    stack.callback(restore)
    return before


def catch_signals(server: Stoppable, before: dict[int, Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        before[number] = signal.signal(number, lambda *_: server.stop())
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda *_: server.request_status())
