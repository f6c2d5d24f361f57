"""The host's processors, kept from sleeping while somebody waits for quick answers.

A processor without work sleeps, and to wake it takes longer than many a request; in a virtual machine several
times as long. Linux keeps all of them awake for a process that holds its device open and has written the
longest time, in microseconds, that waking may take (Documentation/power/pm_qos_interface). That costs power,
so it is held only from the first use until nothing has used it for a while.
"""

from __future__ import annotations

import os
import struct
import threading

from ..errors import from_oserror

DEVICE = "/dev/cpu_dma_latency"
IDLE_S = 1.0
_NONE = struct.pack("=i", 0)  # waking may take no time
_ANY = struct.pack("=i", 2_000_000_000)  # or as long as it likes


class KeepAwake:
    """Thread-safe. idle_s: how long after the last `use` processors may sleep again, at most twice.

    Raises HostError if the host has no such device, or not for this user.
    """

    def __init__(self, device: str = DEVICE, idle_s: float = IDLE_S) -> None:
        try:
            self._fd = os.open(device, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise from_oserror(
                error, "keep processors awake", device, hint="only Linux can, for root; or leave that out"
            ) from error
        self._idle_s = idle_s
        self._guard = threading.Lock()
        self._end = threading.Event()
        self._used = False
        self._thread: threading.Thread | None = None
        self._tell(_ANY)

    @property
    def held(self) -> bool:
        return self._thread is not None

    def use(self) -> None:
        """Somebody is quick: stay awake. Costs next to nothing when they are already."""
        self._used = True
        if self._thread is None:
            self._hold()

    def close(self) -> None:
        with self._guard:  # from here on nobody holds them awake anew
            self._end.set()
            thread = self._thread
        if thread is not None:
            thread.join()
        os.close(self._fd)

    def _tell(self, latency: bytes) -> None:
        try:
            os.write(self._fd, latency)
        except OSError:
            pass  # slower, not wrong

    def _hold(self) -> None:
        with self._guard:
            if self._thread is not None or self._end.is_set():
                return
            self._tell(_NONE)
            self._thread = threading.Thread(target=self._let_go, name="awake", daemon=True)
            self._thread.start()

    def _let_go(self) -> None:
        while not self._end.wait(self._idle_s) and self._used:
            self._used = False
        with self._guard:
            self._tell(_ANY)
            self._thread = None
