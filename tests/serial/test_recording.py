"""Recordings: what is written is read back, and gives the same verdicts as the session did live."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from enban.errors import EnbanError, HostError, NoSpaceError, UsageError
from enban.serial.doctor import DEBUGGER, TARGET, Doctor
from enban.serial.live import Live
from enban.serial.looking import Looking
from enban.serial.recording import BYTES, PIECE, Recorder, read, replay
from enban.serial.tracking import MS
from enban.wire.kd import constants as k
from enban.wire.kd.parser import control_packet, data_packet
from tests.serial.kd_session import EXCEPTION, Session
from tests.wire.kd_helpers import packets


def frozen(session: Session) -> None:
    session.clean()
    for _ in range(4):
        session.data(TARGET, k.STATE_CHANGE64, EXCEPTION, acked=False)
        session.wait(1000)


def peer_gone(session: Session) -> None:
    session.stop()
    session.close(TARGET)
    session.wait(5000)


def cut_off(session: Session) -> None:
    session.clean()
    session.raw(TARGET, b"0000\x07\0")
    session.wait(9000)


def clean(session: Session) -> None:
    session.clean()


def silent(session: Session) -> None:
    session.wait(10_000)


def injected(session: Session) -> None:
    session.clean()
    session.stop()
    session.wait(20_000)
    data = control_packet(k.RESET)
    session.doctor.injected(TARGET, data, "a reason", session.now_ns)
    for other in session.others:
        assert isinstance(other, Recorder)
        other.injected(TARGET, data, "a reason", session.now_ns)


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (frozen, "frozen-exception"),
        (peer_gone, "peer-gone"),
        (cut_off, "damaged"),
        (clean, "healthy"),
        (silent, "no-bytes"),
        (injected, "frozen-exception"),
    ],
)
def test_a_recording_gives_the_verdicts_of_the_session(
    tmp_path: Path, act: Callable[[Session], None], fault: str
) -> None:
    recorder = Recorder(tmp_path / "rec", 1_000_000_000)
    session = Session(Doctor(on_event=recorder.event), [recorder])
    act(session)
    live = session.doctor.verdicts(session.now_ns)
    recorder.close(session.now_ns)
    recorder.close(session.now_ns)
    again = replay(tmp_path / "rec").verdicts()
    assert [verdict.as_dict() for verdict in again] == [verdict.as_dict() for verdict in live]
    assert fault in [verdict.name for verdict in again]


STEPS = st.lists(
    st.tuples(
        st.sampled_from([TARGET, DEBUGGER]),
        st.sampled_from(["saw", "saw", "saw", "saw", "tick", "opened", "closed"]),
        packets() | st.binary(max_size=30) | st.just(b"b") | st.just(b"0000\x07\0"),
        st.integers(0, 3000),
    ),
    max_size=25,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([(TARGET, "saw", b"0000\x07\0", 0), (TARGET, "tick", b"", 2500), (DEBUGGER, "saw", b"b", 2500)])
@given(STEPS)
def test_any_recording_gives_the_verdicts_of_the_session(
    tmp_path: Path, steps: list[tuple[int, str, bytes, int]]
) -> None:
    """Whenever somebody asked during the session: a replay knows nothing of that."""
    folder = tmp_path / "rec"
    shutil.rmtree(folder, ignore_errors=True)
    recorder = Recorder(folder, 0)
    doctor = Doctor(on_event=recorder.event)
    doctor.tick(0)
    now_ns = 0
    for side, what, data, ms in steps:
        now_ns += ms * MS
        for observer in (recorder, doctor):
            if what == "saw":
                observer.saw(side, data, now_ns)
            elif what == "tick":
                observer.tick(now_ns)
            else:
                getattr(observer, what)(side, now_ns)
        if what == "tick":
            doctor.verdicts(now_ns)
    now_ns += 1500 * MS
    live = doctor.verdicts(now_ns)
    recorder.close(now_ns)
    again = replay(folder).verdicts()
    assert [verdict.as_dict() for verdict in again] == [verdict.as_dict() for verdict in live]


def test_the_bytes_and_the_lines_are_there(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "rec", 1_000_000_000)
    session = Session(Doctor(on_event=recorder.event), [recorder])
    session.clean(2)
    session.raw(TARGET, b"junk")
    recorder.close(session.now_ns)
    assert (tmp_path / "rec" / "target.raw").stat().st_size == session.doctor.target.bytes
    assert (tmp_path / "rec" / "debugger.raw").read_bytes()[:1] == b"b"
    lines = [json.loads(line) for line in (tmp_path / "rec" / "trace.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "recording"
    packets = [line for line in lines if line["kind"] == "packet"]
    assert packets[0]["says"].startswith("exception 0x80000003")
    assert {line["side"] for line in packets} == {"target", "debugger"}
    assert [line["kind"] for line in lines].count("break-in") == 1
    assert lines[-1] == {"t": session.now_ns - 1_000_000_000, "kind": "end"}


def test_a_recording_is_on_disk_while_it_happens(tmp_path: Path) -> None:
    """A reader of an unfinished recording sees it up to a fifth of a second ago."""
    recorder = Recorder(tmp_path / "rec", 0)
    recorder.saw(TARGET, b"x" * 100, 1)
    recorder.saw(TARGET, b"y", 300_000_000)
    assert sum(len(moment.data) for moment in read(tmp_path / "rec")) == 101
    recorder.saw(DEBUGGER, b"z", 300_000_001)
    recorder.tick(400_000_000)
    assert sum(len(moment.data) for moment in read(tmp_path / "rec")) == 102
    recorder.close(400_000_000)


def test_a_long_run_of_bytes_is_read_in_pieces(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "rec", 0)
    recorder.saw(TARGET, bytes(3 * PIECE + 1), 1)
    recorder.close(2)
    assert [len(m.data) for m in read(tmp_path / "rec") if m.kind == BYTES] == [PIECE] * 3 + [1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5000), st.integers(0, 3000), st.integers(0, 3000))
def test_what_a_killed_writer_left_is_read(tmp_path: Path, trace: int, target: int, debugger: int) -> None:
    folder = tmp_path / "rec"
    if not folder.exists():
        recorder = Recorder(folder, 0)
        session = Session(Doctor(on_event=recorder.event), [recorder])
        session.clean(3)
        recorder.close(session.now_ns)
    cut = tmp_path / "cut"
    cut.mkdir(exist_ok=True)
    for name, size in (("trace.jsonl", trace), ("target.raw", target), ("debugger.raw", debugger)):
        (cut / name).write_bytes((folder / name).read_bytes()[:size])
    if b"\n" in (cut / "trace.jsonl").read_bytes():
        assert replay(cut).verdicts()
    else:
        with pytest.raises(UsageError, match="line 1"):
            replay(cut)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"t": 0, "kind": "bytes", "side": "target", "offset": 0, "length": -1}', "line 2 does not fit"),
        ('{"t": 0, "kind": "bytes", "side": "target", "offset": 9, "length": 1}', "line 2 does not fit"),
        ('{"t": -1, "kind": "opened", "side": "target"}', "line 2 goes back"),
        ('{"t": 0, "kind": "opened", "side": "nobody"}', "line 2 is no event"),
        ('{"t": "soon", "kind": "end"}', "line 2 goes back"),
        ("[]", "line 2 is no event"),
        ("[" * 100_000, "line 2 is no event"),
        ("x" * 2_000_000, "line 2 is too long"),
        ('{"t": 0, "kind": "injected", "side": "target", "data": "zz", "why": ""}', "line 2 is no event"),
    ],
)
def test_a_broken_recording_is_refused_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    Recorder(tmp_path / "rec", 0).close(0)
    (tmp_path / "rec" / "trace.jsonl").write_text(
        '{"t": 0, "kind": "recording", "version": 1}\n' + line + "\n"
    )
    with pytest.raises(UsageError, match=words):
        replay(tmp_path / "rec")


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no such file"):
        replay(tmp_path / "none")
    (tmp_path / "trace.jsonl").write_text('{"t": 0, "kind": "recording", "version": 2}\n')
    for name in ("target.raw", "debugger.raw"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="version 1"):
        replay(tmp_path)
    with pytest.raises(EnbanError, match="not empty"):
        Recorder(tmp_path, 0)


class Full(io.StringIO):
    """A trace that has no room for lines of one kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.lines: list[str] = []

    def write(self, text: str) -> int:
        if f'"kind": "{self.kind}"' in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.lines.append(text)
        return len(text)


@pytest.mark.parametrize("kind", ["bytes", "packet"])
def test_a_recording_without_room_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is told when it happens and at the end; the doctor on the same line goes on to the end."""
    said: list[str] = []
    live = Live(record=str(tmp_path / "rec"), doctor=True, log=said.append)
    recorder, doctor = live.observers
    assert isinstance(recorder, Recorder) and isinstance(doctor, Doctor)
    trace = Full(kind)
    recorder._trace.close()
    monkeypatch.setattr(recorder, "_trace", trace)
    looking = Looking(live.observers, said.append)
    looking.opened(TARGET)
    for _ in range(5):
        looking.saw(TARGET, data_packet(k.STATE_CHANGE64, k.INITIAL_ID, EXCEPTION))
        looking.tick()
    assert doctor.target.packets == 5
    assert len([line for line in said if "cannot write the recording: no space left" in line]) == 1
    assert [json.loads(line)["kind"] for line in trace.lines] == ["opened", "bytes"][: 1 + (kind == "packet")]
    with pytest.raises(NoSpaceError, match="cannot write the recording"):
        live.close()
    live.close()
