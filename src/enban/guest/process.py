"""The QEMU process: started so that it ends with us, watched, and stopped step by step."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence

from ..errors import from_oserror

_LINE = 1 << 16
# Linux can send a process a signal when its parent dies (prctl(2), PR_SET_PDEATHSIG). It must be asked for in
# the child; this small program does so and then becomes QEMU. A parent that is gone by then counts too.
_TIED = (
    "import ctypes,os,sys\n"
    "ctypes.CDLL(None).prctl(1, 15)\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Process:
    """A running program, and the first line it wrote to its standard error."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, log: Callable[[str], None]) -> None:
        self._process = process
        self._front = f"{name}: "
        self._log = log
        self._first = ""
        self._ending = False
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, words: Sequence[str], log: Callable[[str], None]) -> Process:
        """words: path of the program and its arguments. log: gets what it writes to its standard error."""
        tied = sys.platform == "linux" and bool(sys.executable)
        front = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid())] if tied else []
        try:
            process = await asyncio.create_subprocess_exec(
                *front,
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                limit=_LINE,
                # Ctrl-C in the terminal is for us: we tell the guest.
                start_new_session=True,
            )
        except OSError as error:
            raise from_oserror(error, "start", words[0]) from error
        return cls(process, os.path.basename(words[0]), log)

    def log_to(self, log: Callable[[str], None]) -> None:
        """From now on what it says goes there."""
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def complaint(self) -> str:
        """The first line it complained with, for a message: what follows is often only the consequence."""
        return self._first

    async def _read(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # a line without end: what there is of it was dropped
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip().removeprefix(self._front)
            if text and not self._ending:
                self._first = self._first or text
                self._log(text)

    async def wait(self) -> int:
        """The exit code, negative for a signal, once it has ended and all it said was read."""
        code = await self._process.wait()
        # A child of its own may hold the pipe open; QEMU's own words are there by now.
        await asyncio.wait([self._reader], timeout=1)
        return code

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, then after `grace_s` SIGKILL; the exit code."""
        self._ending = True  # that a signal ends it is no news
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(self._process.wait()), grace_s)
        except TimeoutError:
            self.signal(signal.SIGKILL)
        return await self.wait()

    def signal(self, number: int) -> None:
        if self.running:
            try:
                self._process.send_signal(number)
            except ProcessLookupError:
                pass  # it has just ended


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
