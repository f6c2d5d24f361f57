"""Sends strokes to a guest through QMP, paced so that no key is lost.

QEMU's PS/2 keyboard holds 16 bytes that the guest has not read; whatever does not fit is dropped without a
word, releases too. The rule: a stroke is sent only when the guest has read the one before. On a PC that is
not guessed: bit 0 of the keyboard controller's status (port 0x64) says whether bytes wait, and reading the
status, unlike the data, has no effect. A busy guest is waited for, a fast one is typed to at its speed.
Where keys do not go through that controller (USB, virtio, other machines) nothing tells, and each stroke is
given time.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Protocol

from enban.errors import PeerError
from enban.guest.keyboard import keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from enban.guest.keyboard.strokes import Stroke

_STATUS_PORT = 0x64
_FULL, _UNLOCKED = 0x01, 0x10  # bits of the status: bytes wait for the guest; always set by QEMU's controller
_OTHER_KEYBOARDS = ("usb-kbd", "virtio-keyboard", "virtio-input-host", "usb-wacom-tablet")
_EVENT_MS = 12  # a USB keyboard reports one event in each of its polling intervals, 8 or 10 ms
_POLL_MS = 0.5, 20.0  # the first and the longest pause between two looks at the status


class Monitor(Protocol):
    """What of QMP is needed here: `qemu.qmp.QMPClient`, or anything with the same `execute`."""

    async def execute(self, cmd: str, /, arguments: Mapping[str, object] | None = None) -> object: ...


class Pacer:
    """Waits until a guest has room for the next stroke. One for each guest; see `Pacer.find`."""

    def __init__(self, monitor: Monitor, *, feedback: bool, timeout_s: float = 30.0) -> None:
        self._monitor = monitor
        self.feedback = feedback
        self.timeout_s = timeout_s

    @classmethod
    async def find(cls, monitor: Monitor, *, timeout_s: float = 30.0) -> Pacer:
        """A pacer for the guest behind a monitor; sees whether keys go through a PC's keyboard controller.

        timeout_s: how long a guest may leave its keys unread."""
        tree = await _human(monitor, "info qtree")
        devices = set(re.findall(r"^\s*dev: ([\w.-]+)", tree, re.MULTILINE))
        others = any(device.startswith(_OTHER_KEYBOARDS) for device in devices)
        feedback = "i8042" in devices and not others
        if feedback:
            status = await _status(monitor)
            feedback = status is not None and status != 0xFF and bool(status & _UNLOCKED)
        return cls(monitor, feedback=feedback, timeout_s=timeout_s)

    async def settle(self, events: int = 2) -> None:
        """Return when the guest has read what was sent, or without feedback has had time for `events`.

        Raises PeerError when it does not within `timeout_s`."""
        if not self.feedback:
            await asyncio.sleep(events * _EVENT_MS / 1000)
            return
        pause, longest = _POLL_MS
        end = time.monotonic() + self.timeout_s
        while (status := await _status(self._monitor)) is not None and status & _FULL:
            if time.monotonic() > end:
                raise PeerError(
                    f"the guest has not read its keyboard for {self.timeout_s:g} s",
                    hint="is it paused, or still starting?",
                )
            await asyncio.sleep(pause / 1000)
            pause = min(pause * 1.5, longest)


async def send_strokes(
    qmp: Monitor, strokes: Sequence[Stroke], *, pacer: Pacer | None = None, timeout_s: float = 30.0
) -> None:
    """Type strokes into a guest, in order, none lost; returns when the guest has read the last.

    qmp: a connected monitor. pacer: kept by the caller who types often (`await Pacer.find(qmp)`). A failure
    leaves no key pressed, and says how many characters arrived: PeerError when the guest does not read its
    keyboard, or the monitor's own error.
    """
    if pacer is None:
        pacer = await Pacer.find(qmp, timeout_s=timeout_s)
    done = 0
    try:
        await pacer.settle(0)
        for stroke in strokes:
            await _send(qmp, stroke, pacer)
            done += len(stroke.text)
    except Exception as caught:
        error = _refusal(caught)
        if error is None:
            raise
        total = sum(len(stroke.text) for stroke in strokes)
        if not total:
            raise error from caught
        raise PeerError(f"{error.what}; {done} of {total} characters were typed", hint=error.hint) from caught


def _refusal(error: Exception) -> PeerError | None:
    """An error answer of QEMU's monitor as ours, whether qemu.qmp raised it or a Machine; None for any
    other error."""
    if not isinstance(error, PeerError) and type(error).__name__ != "ExecuteError":
        return None
    if "not running" in str(error):
        return PeerError(
            "the guest takes no keys: it does not run",
            hint="is it paused? let it go on (`enban ctl NAME resume`, or `cont` to QEMU)",
        )
    return error if isinstance(error, PeerError) else PeerError(f"the guest takes no keys: {error}")


async def _send(qmp: Monitor, stroke: Stroke, pacer: Pacer) -> None:
    events = [_event(code, pressed) for code, pressed in stroke.events()]
    middle = len(events) // 2
    fits = 2 * sum(keys.by_name(name).bytes_at_most for name in stroke.names) <= 16
    if fits and not stroke.hold_ms:
        await qmp.execute("input-send-event", {"events": events})
        await pacer.settle(len(events))
        return
    await qmp.execute("input-send-event", {"events": events[:middle]})
    try:
        await pacer.settle(middle)
        await asyncio.sleep(stroke.hold_ms / 1000)
    finally:
        # Also when the wait was given up or cancelled: a key must not stay pressed.
        await qmp.execute("input-send-event", {"events": events[middle:]})
    await pacer.settle(middle)


def _event(code: str, pressed: bool) -> dict[str, object]:
    return {"type": "key", "data": {"down": pressed, "key": {"type": "qcode", "data": code}}}


async def _human(monitor: Monitor, line: str) -> str:
    answer = await monitor.execute("human-monitor-command", {"command-line": line})
    return answer if isinstance(answer, str) else ""


async def _status(monitor: Monitor) -> int | None:
    """The keyboard controller's status, None where there is none to read (other machines than PCs)."""
    found = re.search(r"=\s*0x([0-9a-fA-F]+)", await _human(monitor, f"i /b {_STATUS_PORT:#x}"))
    return int(found[1], 16) if found else None
