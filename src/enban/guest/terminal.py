"""The guest's console in the user's terminal: what the guest prints comes out, what is typed goes in.

On a terminal every key goes to the guest, Ctrl-C too; Ctrl-] ends the machine. Where standard input is a pipe
or a file it is typed to its end; a process in the background of a terminal leaves the keyboard alone.
"""

from __future__ import annotations

import asyncio
import os
import termios
import threading
import tty
from collections.abc import Callable
from typing import Any

from ..errors import ClosedError
from .console import Console

STDIN, STDOUT = 0, 1
ESCAPE = b"\x1d"  # Ctrl-]


class Terminal:
    """Joins a console to standard input and output until `close`.

    on_escape: called, in the event loop, when Ctrl-] is typed.
    """

    def __init__(self, console: Console, on_escape: Callable[[], None]) -> None:
        self._console = console
        self._on_escape = on_escape
        self._loop = asyncio.get_running_loop()
        self._saved: list[Any] | None = None
        self._broken = False
        self._closed = False

    @property
    def raw(self) -> bool:
        """Whether the terminal is in raw mode: then a line ends with CR and LF."""
        return self._saved is not None

    def start(self) -> None:
        self._console.on_output = self._show
        if os.isatty(STDIN):
            if not _in_foreground():
                return
            self._saved = termios.tcgetattr(STDIN)
            tty.setraw(STDIN)
        # A thread, because files and /dev/null cannot be waited for. It ends with the process.
        threading.Thread(target=self._type, name="guest-keyboard", daemon=True).start()

    async def _show(self, data: bytes) -> None:
        if not self._broken:
            await asyncio.to_thread(self._write, data)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(STDOUT, data) :]
        except OSError:
            self._broken = True  # nobody reads any more; the guest goes on

    def _type(self) -> None:
        while not self._closed:
            try:
                data = os.read(STDIN, 1024)
            except OSError:
                return
            if not data:
                return
            if self.raw and ESCAPE in data:
                self._call(self._on_escape)
                data = data.replace(ESCAPE, b"")
            try:
                asyncio.run_coroutine_threadsafe(self._console.write(data), self._loop).result()
            except ClosedError:
                continue  # QEMU is being replaced, or has ended
            except RuntimeError:
                return  # the loop has ended

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            pass  # the loop has ended

    def close(self) -> None:
        """Give the terminal back as it was."""
        self._closed = True
        self._console.on_output = None
        if self._saved is not None:
            termios.tcsetattr(STDIN, termios.TCSADRAIN, self._saved)
            self._saved = None


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(STDIN) == os.getpgrp()
    except OSError:
        return False
