"""`enban serial doctor`: what it prints, and its exit codes."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from enban.cli.options import WIDTH, parse
from enban.cli.serial_doctor import VERB
from enban.errors import EnbanError
from enban.serial.doctor import TARGET, Doctor
from enban.serial.recording import Recorder
from enban.wire.kd import constants as k
from tests.serial.kd_session import EXCEPTION, Session


def doctor(*words: str | Path) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out):
        code = VERB.run(parse(VERB, [str(word) for word in words]))
    return code, out.getvalue()


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A clean session of a little over a second, and then an exception that nobody acknowledges."""
    recorder = Recorder(tmp_path / "kd.rec", 1_000_000_000)
    session = Session(Doctor(on_event=recorder.event), [recorder])
    session.clean(3)
    session.wait(1000)
    for _ in range(4):
        session.data(TARGET, k.STATE_CHANGE64, EXCEPTION, acked=False)
        session.wait(1000)
    recorder.close(session.now_ns)
    return tmp_path / "kd.rec"


def test_the_verdict_and_its_evidence(recording: Path) -> None:
    code, out = doctor(recording)
    assert code == 2
    head, verdict, *more = out.splitlines()
    assert head.startswith(f"{recording}: 5.3 s; from the guest ")
    assert verdict.startswith("fault: ")
    assert more[0] == "[frozen-exception]"
    assert "sent 4 times" in " ".join(out.split())
    assert any(line.startswith("  at target 0x") for line in more)
    assert max(map(len, more)) <= WIDTH


def test_an_earlier_moment(recording: Path) -> None:
    code, out = doctor("--at", "0.5", recording)
    assert code == 0
    assert out.splitlines()[1] == "healthy: the session is in order [healthy]"


def test_the_packets(recording: Path) -> None:
    _, out = doctor("--packets", "-q", recording)
    lines = out.splitlines()
    assert "break-in" in lines[0]
    assert "StateChange64 0x80800800  exception 0x80000003" in lines[1]
    assert "ACK 0x80800000" in lines[2]
    assert len([line for line in lines if "StateChange64" in line]) == 5


def test_json(recording: Path) -> None:
    code, out = doctor("--output=json", recording)
    facts = json.loads(out)
    assert code == 2
    assert facts["verdicts"][0]["name"] == "frozen-exception"
    assert facts["guest"] == "stopped"
    assert facts["target"]["retransmissions"] == 3
    assert facts["debugger"]["break-ins"] == 1
    # The session acknowledges after 50 microseconds each time, and nobody acknowledges the last packet.
    assert facts["target"]["ack-ms"] == {"median": pytest.approx(0.05), "longest": pytest.approx(0.05)}
    last = facts["last-request"]
    assert last["says"] == "Continue2" and not last["waiting"]
    assert 4 < last["seconds-ago"] < facts["seconds"]


def test_the_kernels_timeout(recording: Path) -> None:
    code, out = doctor("--timeout", "30", recording)
    assert "sent 4 times" in " ".join(out.split())  # counted, not timed
    assert code == 2


@pytest.mark.parametrize(
    "words", [("--at", "soon"), ("--at", "-1"), ("--timeout", "0"), ("--timeout", "nan"), ("--at", "1e40")]
)
def test_what_is_no_time_is_refused(recording: Path, words: tuple[str, str]) -> None:
    with pytest.raises(EnbanError, match="no number of seconds"):
        doctor(*words, recording)


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnbanError, match="no such file"):
        doctor(tmp_path)


def test_packets_are_not_json(recording: Path) -> None:
    with pytest.raises(EnbanError, match=r"trace\.jsonl"):
        doctor("--packets", "--output=json", recording)
