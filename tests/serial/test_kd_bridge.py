"""Kernel debugging through the bridge: a simulated kernel at one end, a debugger at the other."""

from __future__ import annotations

import subprocess
from pathlib import Path
from time import monotonic, sleep

import pytest

from enban.serial.doctor import Doctor
from enban.serial.injection import Injector
from enban.serial.live import Live
from enban.serial.recording import replay
from enban.wire.kd import constants as k
from tests.cli.command import command, environment
from tests.serial.kd_debugger import Debugger
from tests.serial.kd_lines import ClientStream
from tests.serial.kd_machine import KERNEL_BASE, Machine
from tests.serial.kd_target import Target
from tests.serial.lines import KINDS, Client, bridge, ends_of, until

SECOND_S = 0.1  # the kernel's second is a tenth here
SECOND_NS = 100_000_000


def kernel(client: Client, **options: float) -> Target:
    machine = Machine()
    machine.small_kernel()
    return Target(ClientStream(client), machine, **{"timeout_s": 1.0, **options})  # type: ignore[arg-type]


def session(debugger: Debugger, target: Target) -> None:
    debugger.break_in()
    assert debugger.state()["pc"] == target.machine.break_at
    for offset in range(0, 0x1000, 700):
        assert debugger.read(KERNEL_BASE + offset, 700) == target.machine.read(KERNEL_BASE + offset, 700)
    assert debugger.ask(k.GET_CONTEXT).data == bytes(target.machine.context)
    debugger.leave()
    target.wait("running")


@pytest.mark.parametrize("side", ["guest", "debugger"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_over_every_transport(kind: str, side: str, tmp_path: Path) -> None:
    """The kernel's memory and registers arrive as they are, nothing is sent twice, the doctor is content, and
    so is he with the recording."""
    kinds = {"guest": "unix-listen", "debugger": "unix-listen", side: kind}
    names = {who: ends_of(kinds[who], tmp_path, who) for who in kinds}
    told: list[str] = []
    first = Client(names[side].client) if kind == "tty" else None
    with (
        Live(record=str(tmp_path / "rec"), doctor=True, log=told.append) as live,
        bridge(
            names["guest"].bridge, names["debugger"].bridge, observers=live.observers, on_tick=live.tick
        ) as running,
    ):
        far = first if first and side == "guest" else Client(names["guest"].client)
        near = first if first and side == "debugger" else Client(names["debugger"].client)
        with kernel(far.connect()) as target, Debugger(ClientStream(near.connect())) as debugger:
            running.expect_guest()
            running.expect("is the active debugger")
            target.wait("running")
            session(debugger, target)
            session(debugger, target)  # a second one on the same line
        until(lambda: running.bridge.counters.round_trips >= 16, "round trips were counted")
    assert told[0].startswith("doctor: healthy"), told
    assert replay(tmp_path / "rec").verdicts()[0].grade == "healthy"


def attach(debugger: Debugger) -> None:
    """As one who knows nothing of what was before: a break-in, and RESET once the kernel listens."""
    debugger.break_in()
    debugger.listen(0.2)
    debugger.reset()


def test_debuggers_come_one_after_the_other(tmp_path: Path) -> None:
    """Also one who goes in the middle of a session: the kernel stays stopped for the next."""
    with (
        bridge(f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen") as running,
        kernel(Client(f"unix:{tmp_path / 'g'}").connect()) as target,
    ):
        target.wait("running")
        for turn in range(4):
            with Debugger(ClientStream(Client(f"unix:{tmp_path / 'd'}").connect())) as debugger:
                running.expect("is the active debugger", turn + 1)
                attach(debugger)
                session(debugger, target)
                if turn % 2:
                    debugger.break_in()
                    debugger.state()
            running.expect("is gone", turn + 1)


def test_a_late_debugger_is_shown_why_the_kernel_stands_still(tmp_path: Path) -> None:
    """The kernel stops while nobody is there and repeats itself every five seconds; the one who comes does
    not have to wait for it, and needs neither a break-in nor a RESET."""
    with bridge(f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen") as running:
        with kernel(Client(f"unix:{tmp_path / 'g'}").connect(), timeout_s=5.0) as target:
            target.wait("running")
            target.hit(target.machine.break_at)
            until(lambda: running.bridge.counters.packets[0] == 1, "the kernel has said so once")
            started = monotonic()
            with Debugger(ClientStream(Client(f"unix:{tmp_path / 'd'}").connect())) as debugger:
                assert debugger.state()["pc"] == target.machine.break_at
                assert monotonic() - started < 4
                debugger.leave()
                target.wait("running")
        running.expect("came late")


def frozen(doctor: Doctor) -> bool:
    return any(verdict.name == "frozen-exception" for verdict in doctor.verdicts())


def test_a_session_that_stands_still_is_healed_by_a_reset_if_allowed(tmp_path: Path) -> None:
    """The debugger took the exception and forgot it; the bridge's RESET has the kernel say it again."""
    doctor = Doctor(timeout_ns=SECOND_NS)
    with bridge(
        f"unix:{tmp_path / 'g'},listen",
        f"unix:{tmp_path / 'd'},listen",
        observers=[doctor],
        injector=Injector(doctor, reset=True),
    ) as running:
        with (
            kernel(Client(f"unix:{tmp_path / 'g'}").connect(), timeout_s=SECOND_S) as target,
            Debugger(ClientStream(Client(f"unix:{tmp_path / 'd'}").connect())) as debugger,
        ):
            running.expect("is the active debugger")
            target.wait("running")
            target.hit(target.machine.break_at)
            until(lambda: running.logged("injected towards the guest"), "the RESET", 20)
            debugger.id_in = k.INITIAL_ID
            assert debugger.state()["pc"] == target.machine.break_at
            debugger.leave()
            target.wait("running")
        assert any("RESET" in text for _, text in doctor.injections)


def test_nothing_is_injected_unasked(tmp_path: Path) -> None:
    doctor = Doctor(timeout_ns=SECOND_NS)
    with (
        bridge(
            f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen", observers=[doctor]
        ) as running,
        kernel(Client(f"unix:{tmp_path / 'g'}").connect(), timeout_s=SECOND_S) as target,
        Debugger(ClientStream(Client(f"unix:{tmp_path / 'd'}").connect())),
    ):
        running.expect("is the active debugger")
        target.wait("running")
        target.hit(target.machine.break_at)
        sleep(12 * SECOND_S)
        assert frozen(doctor)
        assert running.bridge.counters.bytes[1] == 0
        assert not running.logged("injected towards")


def test_a_slow_line_brings_no_storm(tmp_path: Path) -> None:
    """At 38400 baud all of this takes more than two seconds, three times what the kernel waits for an ACK.
    The bridge holds the kernel back instead of storing, so nothing is ever sent twice."""
    with bridge(f"fifo:{tmp_path / 'g'}", f"unix:{tmp_path / 'd'},listen,pace=38400") as running:
        with (
            kernel(Client(f"fifo:{tmp_path / 'g'},swap").connect(), timeout_s=0.6) as target,
            Debugger(ClientStream(Client(f"unix:{tmp_path / 'd'}").connect()), timeout_s=3.0) as debugger,
        ):
            running.expect("is the active debugger")
            running.expect_guest()
            target.wait("running")
            started = monotonic()
            session(debugger, target)
            assert monotonic() - started > 4000 * 10 / 38400
        # Each of its packets once: the state, and an answer for each request but the last, which is "go on".
        assert sum(target.sent.values()) == len(target.requests), target.sent


@pytest.mark.long
def test_the_command_heals_and_says_so(tmp_path: Path) -> None:
    """`--doctor --inject-reset`, in real seconds: the verdict, the RESET, and that it is over."""
    told = tmp_path / "told"
    ends = [f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen"]
    with told.open("wb") as file:
        words = command("serial", "bridge", "--doctor", "--inject-reset", "--record", tmp_path / "rec", *ends)
        process = subprocess.Popen(words, env=environment(), stderr=file)
    try:
        until((tmp_path / "d").exists, "the bridge")
        with (
            kernel(Client(f"unix:{tmp_path / 'g'}").connect()) as target,
            Debugger(ClientStream(Client(f"unix:{tmp_path / 'd'}").connect())) as debugger,
        ):
            target.wait("running")
            target.hit(target.machine.break_at)
            debugger.state()  # taken, acknowledged, and forgotten
            until(lambda: "injected towards the guest" in told.read_text(), "the RESET", 60)
            assert "[frozen-exception]" in told.read_text()
            debugger.id_in = k.INITIAL_ID
            assert debugger.state()["pc"] == target.machine.break_at
            debugger.leave()
            target.wait("running")
            until(lambda: "no longer so: frozen-exception" in told.read_text(), "it is over")
    finally:
        process.terminate()
        assert process.wait(20) == 0
    names = [verdict.name for verdict in replay(tmp_path / "rec").verdicts()]
    assert "frozen-exception" not in names
