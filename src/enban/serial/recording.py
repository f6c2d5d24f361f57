"""Recordings of a serial line: what each side sent, and when, so that it can be looked at later.

A recording is a folder:

    trace.jsonl     one event a line, in the order they were seen
    target.raw      every byte the guest sent
    debugger.raw    every byte the debugger sent

The first line of the trace names the kind and version; then each line has `t` (nanoseconds since the start),
`kind`, and what belongs to it: `bytes` (side, offset, length: the bytes themselves are in the raw file),
`opened`, `closed`, `injected` (side, data, why), `end`. Lines of kind `packet`, `break-in`, `noise` and
`broken` say what the bytes were, for people and for grep; reading passes over them, for they follow from the
bytes. Bytes are written before the line that speaks of them, so that a recording whose writer was killed is
whole as far as it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from ..errors import EnbanError, UsageError, from_oserror
from ..wire.kd.messages import decode
from ..wire.kd.parser import BreakIn, Broken, Event, Noise, Packet
from .doctor import Doctor
from .tracking import SECOND, SIDES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, Any

VERSION = 1
TRACE = "trace.jsonl"
LONGEST_LINE = 1 << 20
PIECE = 1 << 16
START, BYTES, OPENED, CLOSED, INJECTED, END = "recording", "bytes", "opened", "closed", "injected", "end"


class Recorder:
    """Writes a recording while it happens. An observer of the bridge, as the doctor is.

    folder: made; must not exist or be empty. now_ns: the clock's time at the start. Raises HostError, also
    for each call that could not write: once, for nothing is written after it, and again at `close`.
    """

    def __init__(self, folder: str | os.PathLike[str], now_ns: int) -> None:
        self.folder = Path(folder)
        self._start_ns = now_ns
        self._flushed_ns = now_ns
        self._offsets = [0, 0]
        self._failure: EnbanError | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise UsageError("the folder for a recording is not empty", path=str(folder))
            self._raw = [(self.folder / f"{side}.raw").open("wb") for side in SIDES]
            self._trace = (self.folder / TRACE).open("w", encoding="utf-8")
        except OSError as error:
            raise from_oserror(error, "make the recording", str(folder)) from error
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._write(now_ns, {"kind": START, "version": VERSION, "started": started})

    def opened(self, side: int, when_ns: int) -> None:
        self._write(when_ns, {"kind": OPENED, "side": SIDES[side]})

    def closed(self, side: int, when_ns: int) -> None:
        self._write(when_ns, {"kind": CLOSED, "side": SIDES[side]})

    def saw(self, side: int, data: bytes | bytearray | memoryview, when_ns: int) -> None:
        if not data or self._failure is not None:
            return
        offset = self._offsets[side]
        try:
            self._raw[side].write(data)
        except OSError as error:
            raise self._failed(error) from error
        self._offsets[side] = offset + len(data)
        self._write(when_ns, {"kind": BYTES, "side": SIDES[side], "offset": offset, "length": len(data)})

    def injected(self, side: int, data: bytes, why: str, when_ns: int) -> None:
        self._write(when_ns, {"kind": INJECTED, "side": SIDES[side], "data": data.hex(), "why": why})

    def event(self, side: int, event: Event, when_ns: int) -> None:
        """What the doctor made of the bytes: pass this as its `on_event`."""
        self._write(when_ns, {**described(event), "side": SIDES[side]})

    def tick(self, when_ns: int) -> None:
        """Time passes: what is buffered goes to the files."""
        self._flush(when_ns)

    def close(self, when_ns: int) -> None:
        """The end. May be called twice."""
        if self._trace.closed:
            return
        try:
            self._write(when_ns, {"kind": END})
            self._flush(when_ns)
        finally:
            for file in (*self._raw, self._trace):
                with contextlib.suppress(OSError):  # what it still holds was told of when it failed
                    file.close()
        if self._failure is not None:
            raise self._failure

    def _failed(self, error: OSError) -> EnbanError:
        """Nothing is written after this: a recording must not have gaps."""
        self._failure = from_oserror(error, "write the recording", str(self.folder))
        return self._failure

    def _write(self, when_ns: int, fields: dict[str, Any]) -> None:
        if self._failure is not None:
            return
        try:
            self._trace.write(json.dumps({"t": when_ns - self._start_ns, **fields}) + "\n")
        except OSError as error:
            raise self._failed(error) from error
        if when_ns - self._flushed_ns > SECOND // 5:
            self._flush(when_ns)

    def _flush(self, when_ns: int) -> None:
        self._flushed_ns = when_ns
        if self._failure is not None:
            return
        try:
            for file in (*self._raw, self._trace):  # the trace last: it speaks of the others
                file.flush()
        except OSError as error:
            raise self._failed(error) from error


class Moment:
    """A line of a trace that matters. data: the bytes of a `bytes` line, or those injected."""

    __slots__ = ("data", "kind", "side", "t_ns", "why")

    def __init__(self, t_ns: int, kind: str, side: int, data: bytes = b"", why: str = "") -> None:
        self.t_ns = t_ns
        self.kind = kind
        self.side = side
        self.data = data
        self.why = why


def read(folder: str | os.PathLike[str]) -> Iterator[Moment]:
    """A recording, moment by moment, in bounded memory. Long runs of bytes come in pieces of 64 KiB.

    Raises UsageError for what is no recording (the line is named), HostError.
    """
    path = Path(folder)
    trace = path / TRACE
    try:
        with (
            open(trace, "rb") as lines,
            open(path / f"{SIDES[0]}.raw", "rb") as first,
            open(path / f"{SIDES[1]}.raw", "rb") as second,
        ):
            yield from _moments(lines, (first, second), str(trace))
    except OSError as error:
        where = getattr(error, "filename", None) or folder
        hint = "a recording is a folder with trace.jsonl, target.raw and debugger.raw"
        raise from_oserror(error, "read the recording", os.fspath(where), hint=hint) from error


def _moments(lines: IO[bytes], raw: tuple[IO[bytes], IO[bytes]], name: str) -> Iterator[Moment]:
    number, last_ns = 0, 0
    while line := lines.readline(LONGEST_LINE):
        number += 1
        if not line.endswith(b"\n"):
            if len(line) == LONGEST_LINE:
                raise _broken(name, number, "is too long")
            if number > 1:
                return  # the writer was killed in the middle of it
        try:
            fields = json.loads(line)
            kind, t_ns = fields["kind"], fields["t"]
            if number == 1 and (kind, fields["version"]) != (START, VERSION):
                raise _broken(name, 1, f"does not begin a recording of version {VERSION}")
            if kind not in (START, BYTES, OPENED, CLOSED, INJECTED, END):
                continue
            side = SIDES.index(fields["side"]) if kind not in (START, END) else 0
            if not isinstance(t_ns, int) or t_ns < last_ns:
                raise _broken(name, number, "goes back in time")
            last_ns = t_ns
            if kind == INJECTED:
                yield Moment(t_ns, kind, side, bytes.fromhex(fields["data"]), str(fields["why"]))
            elif kind != BYTES:
                yield Moment(t_ns, kind, side)
            else:
                left = fields["length"]
                if not isinstance(left, int) or left < 0 or fields["offset"] != raw[side].tell():
                    raise _broken(name, number, "does not fit the bytes before it")
                while left:
                    data = raw[side].read(min(left, PIECE))
                    if not data:
                        return  # killed between the bytes and the line
                    left -= len(data)
                    yield Moment(t_ns, kind, side, data)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise _broken(name, number, "is no event of a recording") from error
    if not number:
        raise _broken(name, 1, "is missing: the file is empty")


def _broken(name: str, number: int, what: str) -> UsageError:
    return UsageError(f"line {number} {what}", path=name, hint="is this a recording of enban serial?")


def replay(
    folder: str | os.PathLike[str], doctor: Doctor | None = None, *, until_ns: int | None = None
) -> Doctor:
    """A doctor that has seen a whole recording, or the first so many nanoseconds of it. Raises as `read`."""
    doctor = doctor if doctor is not None else Doctor()
    for moment in read(folder):
        if until_ns is not None and moment.t_ns > until_ns:
            break
        if moment.kind == BYTES:
            doctor.saw(moment.side, moment.data, moment.t_ns)
        elif moment.kind == OPENED:
            doctor.opened(moment.side, moment.t_ns)
        elif moment.kind == CLOSED:
            doctor.closed(moment.side, moment.t_ns)
        elif moment.kind == INJECTED:
            doctor.injected(moment.side, moment.data, moment.why, moment.t_ns)
        else:
            doctor.tick(moment.t_ns)
    return doctor


def described(event: Event) -> dict[str, Any]:
    """An event as the fields of a line."""
    fields: dict[str, Any] = {"kind": "packet", "offset": event.offset, "length": event.length}
    if isinstance(event, Packet):
        fields |= {"type": event.name, "id": f"{event.id:#x}"}
        if not event.is_control:
            fields["says"] = decode(event).words()
    elif isinstance(event, BreakIn):
        fields["kind"] = "break-in"
    elif isinstance(event, Noise):
        fields |= {"kind": "noise", "sample": event.sample.hex()}
    elif isinstance(event, Broken):
        fields |= {"kind": "broken", "reason": event.reason}
    return fields
