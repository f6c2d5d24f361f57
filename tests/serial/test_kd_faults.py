"""The doctor at a real line: a simulated kernel that misbehaves, a debugger, and both directions watched.

Each fault either heals by the protocol, and then no fault is left, or it is named by the right verdict; and
the recording of it replays to the same verdicts. The kernel's second is a tenth here (`SECOND_S`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from enban.serial.doctor import RUNNING, Doctor
from enban.serial.injection import Injector
from enban.serial.recording import Recorder, replay
from enban.wire.kd import constants as k
from tests.serial.kd_debugger import Debugger, GaveUp, connect
from tests.serial.kd_machine import KERNEL_BASE, Machine
from tests.serial.kd_streams import listen_tcp
from tests.serial.kd_tap import Tap
from tests.serial.kd_target import Faults, Target

SECOND_S = 0.1
SECOND_NS = 100_000_000


@dataclass
class Line:
    target: Target
    tap: Tap
    path: str

    def connect(self, *, acks: str = "right", answers_reset: bool = False) -> Debugger:
        return connect(self.path, timeout_s=SECOND_S, acks=acks, answers_reset=answers_reset)

    def settle(self, seconds: float = 1) -> list[str]:
        """What is wrong after so many of the kernel's seconds."""
        time.sleep(seconds * SECOND_S)
        return self.tap.faults()


Make = Callable[..., AbstractContextManager[Line]]


@pytest.fixture
def line(tmp_path: Path) -> Make:
    """Makes lines; at the end the recording of each must say what its doctor said last."""
    folder = tmp_path / "rec"

    @contextmanager
    def make(
        faults: Faults | None = None, *, images: tuple[str, ...] = (), reset: bool = False, break_in: bool =
        False, hold_s: float = 0, retries: int = 20
    ) -> Iterator[Line]:  # fmt: skip
        recorder = Recorder(folder, time.monotonic_ns())
        doctor = Doctor(timeout_ns=SECOND_NS, on_event=recorder.event)
        injector = Injector(doctor, break_in=break_in, reset=reset) if break_in or reset else None
        machine = Machine()
        machine.small_kernel()
        path = str(tmp_path / "kd.sock")
        tap = Tap(path, doctor, recorder=recorder, injector=injector, hold_s=hold_s)
        target = Target(
            tap.target_end, machine, faults=faults, timeout_s=SECOND_S, images=images, retries=retries
        )
        with tap, target:
            yield Line(target, tap, path)
            with tap.lock:
                now_ns = time.monotonic_ns()
                live = doctor.verdicts(now_ns)
                recorder.close(now_ns)
                tap.recorder = None
                doctor.on_event = None
        again = replay(folder, Doctor(timeout_ns=SECOND_NS)).verdicts()
        assert [verdict.name for verdict in again] == [verdict.name for verdict in live]
        assert [v.evidence for v in again if v.grade == "fault"] == [
            v.evidence for v in live if v.grade == "fault"
        ]

    return make


def look_around(debugger: Debugger, machine: Machine, rounds: int = 12) -> None:
    """Requests whose answers are known."""
    assert debugger.ask(k.GET_VERSION)["kernel_base"] == KERNEL_BASE
    for number in range(rounds):
        offset = number * 256
        assert debugger.read(KERNEL_BASE + offset, 700) == machine.read(KERNEL_BASE + offset, 700)
    assert debugger.ask(k.GET_CONTEXT).data == bytes(machine.context)
    debugger.ask(k.WRITE_VIRTUAL, b"written", address=KERNEL_BASE + 0x2000, length=7)
    assert machine.read(KERNEL_BASE + 0x2000, 7) == b"written"


def session(line: Line) -> None:
    """Attach, look around, leave: must work whatever heals by itself."""
    with line.connect() as debugger:
        debugger.break_in()
        state = debugger.state()
        assert state["code"] == k.STATUS_BREAKPOINT
        assert state["pc"] == line.target.machine.break_at
        look_around(debugger, line.target.machine)
        debugger.leave()
        line.target.wait("running")


def test_a_clean_session(line: Make) -> None:
    with line(images=("nt.exe", "hal.dll")) as made:
        with made.connect() as debugger:
            while made.target.state == "booting":
                with pytest.raises(GaveUp):
                    debugger.state(timeout_s=2 * SECOND_S)
            assert debugger.loaded == ["nt.exe", "hal.dll"]
            made.target.print("hello\n")
            debugger.break_in()
            debugger.state()
            assert debugger.printed in ([], ["hello\n"])
            look_around(debugger, made.target.machine)
            handle = debugger.ask(k.WRITE_BREAKPOINT, address=KERNEL_BASE + 0x1100)["handle"]
            assert made.target.machine.read(KERNEL_BASE + 0x1100, 1) == b"\xcc"
            debugger.leave()
            made.target.wait("running")
            made.target.hit(KERNEL_BASE + 0x1100)
            assert debugger.state()["pc"] == KERNEL_BASE + 0x1100
            assert debugger.ask(k.RESTORE_BREAKPOINT, handle=handle)["status"] == k.STATUS_SUCCESS
            assert debugger.ask(k.RESTORE_BREAKPOINT, handle=handle)["status"] == k.STATUS_UNSUCCESSFUL
            debugger.go()
            made.target.wait("running")
            made.target.prompt("Ignore? ")
            debugger.answer(debugger.state(), b"i")
            made.target.wait("running")
            assert made.target.answers == [b"i"]
            assert made.settle() == []
            assert made.tap.verdicts()[0].name == "healthy"
            assert made.tap.doctor.state == RUNNING
        assert made.settle(5) == []


# What the protocol repairs by itself: the session works, and nothing is left to complain about.
HEALING = {
    "an ACK lost": Faults(drop_acks=1),
    "two ACKs lost": Faults(drop_acks=2),
    "a byte lost": Faults(skip=3, lose_byte=1),
    "a byte changed": Faults(skip=3, corrupt=1),
    "a packet lost": Faults(skip=3, drop=1),
    "a packet cut short": Faults(skip=3, truncate=1),
    "a packet twice": Faults(skip=3, duplicate=2),
    "a request lost": Faults(drop_requests=1),
    "the first packet cut short": Faults(truncate=1),
}


@pytest.mark.parametrize("name", sorted(HEALING))
def test_a_fault_that_heals(line: Make, name: str) -> None:
    faults = replace(HEALING[name], done=[])
    with line(faults) as made:
        session(made)
        assert faults.done
        assert made.settle() == []
        if name != "a packet lost":  # before it came here: nothing of it is to be seen
            assert "healed" in [verdict.name for verdict in made.tap.verdicts()]


def test_a_lost_break_in_is_named_and_heals_when_repeated(line: Make) -> None:
    with line(Faults(drop_break_ins=1)) as made:
        made.target.print("alive\n")
        with made.connect() as debugger:
            debugger.break_in()
            with pytest.raises(GaveUp):
                debugger.state(timeout_s=2 * SECOND_S)
            made.tap.wait_for("break-in-ignored")
            debugger.break_in()
            debugger.state()
            debugger.leave()
            made.target.wait("running")
            assert made.settle() == []


def test_a_lost_break_in_is_repeated_for_the_debugger(line: Make) -> None:
    with line(Faults(drop_break_ins=1), break_in=True) as made, made.connect() as debugger:
        debugger.break_in()
        debugger.state()
        debugger.leave()
        made.target.wait("running")
        assert made.settle() == []
        assert "break-in to the target" in made.tap.verdicts()[-1].words()


def test_a_guest_that_hears_no_break_in(line: Make) -> None:
    with line(Faults(drop_break_ins=1000)) as made:
        made.target.print("alive\n")
        with made.connect() as debugger:
            for _ in range(3):
                debugger.break_in()
                with pytest.raises(GaveUp):
                    debugger.state(timeout_s=2 * SECOND_S)
            assert made.settle() == ["break-in-ignored"]


def test_no_debugger_while_the_guest_starts(line: Make) -> None:
    """Twenty tries for each image, then it goes on without; a late debugger finds it running."""
    with line(images=("nt.exe",), retries=8) as made:
        made.tap.wait_for("unacknowledged")
        made.target.wait("running")
        assert made.target.given_up == 1
        session(made)
        assert made.settle() == []


def test_the_frozen_exception(line: Make) -> None:
    """Nobody acknowledges: the guest stands still for ever, until a late debugger comes."""
    with line() as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        verdict = made.tap.wait_for("frozen-exception")
        assert "frozen, by design" in verdict.summary
        assert "never sent a byte" in verdict.words()
        made.target.print("not while frozen\n")
        time.sleep(25 * SECOND_S)  # more than twenty tries: this one never gives up
        assert made.target.state == "stopped"
        assert made.target.sent["StateChange64"] > 20
        assert "DebugIO" not in made.target.sent
        with made.connect() as debugger:
            debugger.state()
            look_around(debugger, made.target.machine)
            debugger.leave()
            made.target.wait("running")
        assert made.settle() == []


def test_the_frozen_exception_is_healed_by_a_reset(line: Make) -> None:
    """The debugger that took the exception dies. The next one only waits, and the guest says nothing: both
    would wait for ever. One RESET, and the guest reports its exception again."""
    with line(reset=True) as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect() as first:
            first.state()
            first.ask(k.GET_VERSION)
        made.tap.wait_for("peer-gone")
        made.tap.wait_for("frozen-exception")
        before = made.target.sent["StateChange64"]
        time.sleep(10 * SECOND_S)
        assert made.target.sent["StateChange64"] == before  # no remedy while nobody is there
        with made.connect(answers_reset=True) as second:
            assert second.state()["code"] == k.STATUS_BREAKPOINT
            look_around(second, made.target.machine)
            second.leave()
            made.target.wait("running")
            assert made.settle() == []
            assert "injected: RESET to the target" in made.tap.verdicts()[-1].words()
            # The debugger answers each RESET; without the one that was left out they would still be at it.
            assert made.tap.doctor.target.resets == 1


def test_the_frozen_exception_is_not_healed_without_being_asked_to(line: Make) -> None:
    with line() as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect() as first:
            first.state()
            first.ask(k.GET_VERSION)
        with made.connect() as second:
            with pytest.raises(GaveUp):
                second.state(timeout_s=15 * SECOND_S)
            assert made.tap.faults() == ["frozen-exception"]


def test_reset_ping_pong(line: Make) -> None:
    with line() as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect(answers_reset=True) as debugger:
            debugger.state()
            debugger.reset()
            debugger.listen(3 * SECOND_S)
            assert made.tap.faults() == ["reset-ping-pong"]


def test_sync_kept_in_the_ack(line: Make) -> None:
    with line() as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect(acks="sync") as debugger:
            debugger.listen(5 * SECOND_S)
            assert made.tap.faults() == ["wrong-id"]


def test_a_debugger_that_never_acknowledges(line: Make) -> None:
    with line() as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect(acks="none") as debugger:
            debugger.listen(5 * SECOND_S)
            assert made.tap.faults() == ["frozen-exception"]


def test_acks_that_do_not_arrive(line: Make) -> None:
    with line(Faults(drop_acks=1_000_000)) as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect() as debugger:
            debugger.listen(6 * SECOND_S)
            assert made.tap.faults() == ["acks-lost"]


def test_requests_that_are_not_answered(line: Make) -> None:
    with line(Faults(ignore_requests=1)) as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect() as debugger:
            debugger.state()
            with pytest.raises(GaveUp):
                debugger.ask(k.GET_VERSION, timeout_s=7 * SECOND_S)
            assert made.tap.faults() == ["no-answer"]


def test_the_guest_closes_in_the_middle(line: Make) -> None:
    with line(Faults(close_in=3)) as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect() as debugger:
            debugger.state()
            debugger.ask(k.GET_VERSION)
            with pytest.raises(GaveUp):
                debugger.ask(k.GET_CONTEXT, timeout_s=3 * SECOND_S)
            assert made.tap.faults() == ["peer-gone"]
            assert "in the middle of a packet" in made.tap.verdicts()[0].words()


def test_a_line_that_damages_everything(line: Make) -> None:
    with line(Faults(corrupt=1_000_000)) as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect() as debugger:
            with pytest.raises(GaveUp):
                debugger.state(timeout_s=10 * SECOND_S)
            # Not one packet came through whole.
            assert set(made.tap.faults()) & {"damaged", "no-packets"}


def test_a_relay_that_holds_back(line: Make) -> None:
    """What the guest sends arrives later than it waits: everything is sent again, and again."""
    with line(hold_s=1.5 * SECOND_S) as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect() as debugger:
            debugger.timeout_s = 10 * SECOND_S
            debugger.state(10)
            for _ in range(5):
                debugger.ask(k.GET_VERSION, timeout_s=10)
            assert made.tap.faults() == ["retransmission-storm"]


def test_a_slow_line(line: Make) -> None:
    with line(Faults(bytes_per_s=5760)) as made:
        made.target.hit(KERNEL_BASE + 0x1000)
        with made.connect() as debugger:
            debugger.state()
            names: list[str] = []
            for number in range(64):  # on a busy machine it takes more of them to stand out
                debugger.read(KERNEL_BASE, 50 + 20 * (number % 8))
                if number % 8 == 7:
                    names = [v.name for v in made.tap.verdicts() if v.grade != "note"]
                    assert len(names) == 1 and names[0] in ("line-rate", "healthy")
                    if names == ["line-rate"]:
                        break
            assert names == ["line-rate"]
            debugger.leave()


@pytest.mark.parametrize("nodelay", [False, True])
def test_tcp_that_collects_small_writes(tmp_path: Path, nodelay: bool) -> None:
    """The target writes as QEMU's serial port does, in pieces: with Nagle's algorithm each answer waits for a
    delayed ACK of TCP."""
    machine = Machine()
    machine.small_kernel()
    stream, port = listen_tcp(nodelay=nodelay)
    path = str(tmp_path / "kd.sock")
    with Target(stream, machine, faults=Faults(pieces=True)) as target:
        sock = socket.create_connection(("127.0.0.1", port))
        with Tap(path, Doctor(), target=sock) as tap, connect(path) as debugger:
            target.hit(KERNEL_BASE + 0x1000)
            debugger.state()
            for number in range(40):
                debugger.read(KERNEL_BASE, 10 + 50 * number)
            assert tap.faults() == ([] if nodelay else ["nagle"])
            debugger.leave()
