"""A line with the doctor on it: a simulated target at one end, whoever connects to a unix socket at the
other.

The smallest thing that joins two ends and lets the doctor see both directions, with nothing else in the way;
the tests of verdicts use it, so that a fault is the target's or the debugger's and not a bridge's.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from types import TracebackType
from typing import Self

from enban.serial.doctor import DEBUGGER, TARGET, Doctor, Verdict
from enban.serial.injection import Injector
from enban.serial.recording import Recorder
from tests.serial.kd_streams import SocketStream


class Tap:
    """path: the socket for debuggers. target: our end of the target's line; without it a socket pair is made,
    whose other end is `target_end`. hold_s: what the target sends is held back so long (a bad relay)."""

    def __init__(
        self,
        path: str,
        doctor: Doctor,
        *,
        recorder: Recorder | None = None,
        injector: Injector | None = None,
        hold_s: float = 0,
        target: socket.socket | None = None,
    ) -> None:
        self.doctor = doctor
        self.recorder = recorder
        self.injector = injector
        self.hold_s = hold_s
        self.lock = threading.Lock()
        self.target = target
        if target is None:
            self.target, theirs = socket.socketpair()
            self.target_end = SocketStream(theirs)
        self.debugger: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._held: list[tuple[float, bytes]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._main, name="kd-tap", daemon=True)

    def __enter__(self) -> Self:
        with self.lock:
            self._tell("opened", TARGET)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        for sock in (self.target, self.debugger, self._listener):
            if sock is not None:
                sock.close()
        if self.recorder is not None:
            self.recorder.close(time.monotonic_ns())

    def verdicts(self) -> list[Verdict]:
        with self.lock:
            return self.doctor.verdicts(time.monotonic_ns())

    def faults(self) -> list[str]:
        return [verdict.name for verdict in self.verdicts() if verdict.grade in ("fault", "slow")]

    def wait_for(self, fault: str, timeout_s: float = 10) -> Verdict:
        """Until a verdict is there. Raises TimeoutError."""
        end = time.monotonic() + timeout_s
        while True:
            found = self.verdicts()
            for verdict in found:
                if verdict.name == fault:
                    return verdict
            if time.monotonic() > end:
                raise TimeoutError(f"no verdict {fault}, but: " + "\n".join(v.words() for v in found))
            time.sleep(0.01)

    # -- inside --------------------------------------------------------------------------------

    def _main(self) -> None:
        while not self._ending.is_set():
            ends = [sock for sock in (self.target, self.debugger, self._listener) if sock is not None]
            ready = select.select(ends, [], [], 0.005)[0]
            with self.lock:
                self._remedies()
                if self.target in ready:
                    self._take(TARGET)
                if self.debugger in ready:
                    self._take(DEBUGGER)
                if self._listener in ready:
                    if self.debugger is not None:
                        self.debugger.close()
                    self.debugger = self._listener.accept()[0]
                    self._tell("opened", DEBUGGER)
                self._release()

    def _take(self, side: int) -> None:
        sock = self.target if side == TARGET else self.debugger
        assert sock is not None
        try:
            data = sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            sock.close()
            if side == TARGET:
                self.target = None
            else:
                self.debugger = None
            self._tell("closed", side)
            return
        now_ns = time.monotonic_ns()
        self.doctor.saw(side, data, now_ns)
        if self.recorder is not None:
            self.recorder.saw(side, data, now_ns)
        if side == DEBUGGER:
            if self.injector is not None:
                data = self.injector.passed(side, data, now_ns)
            self._send(self.target, data)
        elif self.hold_s:
            self._held.append((time.monotonic() + self.hold_s, data))
        else:
            self._send(self.debugger, data)

    def _release(self) -> None:
        while self._held and self._held[0][0] <= time.monotonic():
            self._send(self.debugger, self._held.pop(0)[1])

    def _send(self, sock: socket.socket | None, data: bytes) -> None:
        if sock is not None and data:
            try:
                sock.sendall(data)
            except OSError:
                pass  # told when it is read from

    def _remedies(self) -> None:
        now_ns = time.monotonic_ns()
        self.doctor.tick(now_ns)
        if self.injector is None:
            return
        for injection in self.injector.due(now_ns):
            self._send(self.target if injection.side == TARGET else self.debugger, injection.data)
            self.doctor.injected(injection.side, injection.data, injection.why, now_ns)
            if self.recorder is not None:
                self.recorder.injected(injection.side, injection.data, injection.why, now_ns)
        self._send(self.target, self.injector.released(now_ns))

    def _tell(self, what: str, side: int) -> None:
        now_ns = time.monotonic_ns()
        for observer in (self.doctor, self.recorder):
            if observer is not None:
                getattr(observer, what)(side, now_ns)
