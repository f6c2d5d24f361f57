"""A real debugger on the line: ntoseye attaches to the simulated kernel, and the doctor watches.

ntoseye wants symbols of the kernel it finds, so the simulator runs one that clang and lld-link have made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from enban.serial.doctor import RUNNING, STOPPED, Doctor
from enban.serial.injection import Injector
from enban.serial.live import Live
from enban.serial.recording import Recorder, replay
from tests.serial import kd_kernel
from tests.serial.kd_kernel import NUMBERS, Kernel
from tests.serial.kd_lines import ClientStream
from tests.serial.kd_machine import KERNEL_BASE, REGISTERS
from tests.serial.kd_streams import listen_unix
from tests.serial.kd_tap import Tap
from tests.serial.kd_target import Faults, Target
from tests.serial.lines import KINDS, Client, bridge, ends_of

MISSING = kd_kernel.missing()
if importlib.util.find_spec("ntoseye") is None:
    MISSING.append("ntoseye (PyPI package ntoseye, for x86-64 and arm64 Linux)")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}"),
]

ATTACH = """
import json, sys, ntoseye
path, numbers, code = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with ntoseye.attach(backend="kd", connect=path, memory_source="kd") as debugger:
    before = debugger.cpus[0].registers.to_dict()
    memory = debugger.memory.read(numbers, 512)
    name = debugger.memory.read(code, 2)
    print(json.dumps({"registers": before, "memory": memory.hex(), "code": name.hex()}))
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    folder = tmp_path_factory.mktemp("kernel")
    built = kd_kernel.build(folder)
    kd_kernel.install_symbols(built, folder / "home")
    return built


def attach(kernel: Kernel, path: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    numbers = KERNEL_BASE + kernel.symbols["Numbers"]
    code = KERNEL_BASE + kernel.symbols["NtCreateFile"]
    return subprocess.run(
        [sys.executable, "-c", ATTACH, path, str(numbers), str(code)],
        env={**os.environ, "HOME": str(kernel.pdb.parent / "home"), "NTOSEYE_KD_TRACE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def assert_seen(done: subprocess.CompletedProcess[str], kernel: Kernel, target: Target, rip: int) -> None:
    """What the debugger saw is what the machine has."""
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    for name in REGISTERS:
        expected = rip if name == "rip" else target.machine.get(name)
        assert seen["registers"][name] == expected, name
    assert bytes.fromhex(seen["memory"]) == NUMBERS
    offset = kernel.symbols["NtCreateFile"]
    assert bytes.fromhex(seen["code"]) == kernel.image[offset : offset + 2]


def test_ntoseye_on_the_simulator_alone(kernel: Kernel, tmp_path: Path) -> None:
    """The simulator is a kernel as far as a real debugger can tell."""
    path = str(tmp_path / "kd.sock")
    machine = kd_kernel.machine(kernel)
    with Target(listen_unix(path), machine) as target:
        done = attach(kernel, path)
        assert_seen(done, kernel, target, machine.break_at)
        target.wait("running")
        assert (target.stops, target.continues) == (1, 1)
        assert machine.get("rip") == machine.break_at + 1  # stepped over the int3
        assert machine.breakpoints == {}
        # Again: what the first one left behind does not hurt the next.
        assert_seen(attach(kernel, path), kernel, target, machine.break_at)
        target.wait("running")


# What ntoseye and the protocol repair together. A fault of the kernel's own line; a second is a second here.
HEALING = {
    "nothing": Faults(),
    "an ACK lost": Faults(drop_acks=1),
    "a byte lost": Faults(skip=20, lose_byte=1),
    "a byte changed": Faults(skip=20, corrupt=1),
    "a packet cut short": Faults(skip=20, truncate=1),
    "packets twice": Faults(skip=20, duplicate=5),
    "a break-in lost": Faults(drop_break_ins=1),
}


QUICK = ("nothing", "an ACK lost", "a byte changed")  # ntoseye waits for seconds in the others


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in HEALING]
)
def test_ntoseye_gets_through(kernel: Kernel, tmp_path: Path, name: str) -> None:
    faults = replace(HEALING[name], done=[])
    recorder = Recorder(tmp_path / "rec", time.monotonic_ns())
    doctor = Doctor(on_event=recorder.event)
    path = str(tmp_path / "kd.sock")
    machine = kd_kernel.machine(kernel)
    tap = Tap(path, doctor, recorder=recorder)
    with tap, Target(tap.target_end, machine, faults=faults, timeout_s=1.0) as target:
        done = attach(kernel, path)
        assert_seen(done, kernel, target, machine.break_at)
        target.wait("running")
        assert bool(faults.done) == (name != "nothing")
        live = tap.verdicts()
        assert [verdict.words() for verdict in live if verdict.grade in ("fault", "slow")] == []
        assert live[0].name == "healthy"
        assert doctor.state == RUNNING
    assert doctor.requests > 40
    again = replay(tmp_path / "rec").verdicts()
    assert [verdict.name for verdict in again] == [verdict.name for verdict in live]


NAMED: dict[str, tuple[Faults, str]] = {
    "break-ins lost": (Faults(drop_break_ins=1_000_000), "break-in-ignored"),
    "ACKs lost": (Faults(drop_acks=1_000_000), "acks-lost"),
    "everything changed": (Faults(corrupt=1_000_000), "damaged"),
    "closed in a packet": (Faults(close_in=20), "peer-gone"),
    "not answered": (Faults(ignore_requests=1_000_000), "no-answer"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMED)
def test_what_stops_ntoseye_is_named(kernel: Kernel, tmp_path: Path, name: str) -> None:
    faults, verdict = replace(NAMED[name][0], done=[]), NAMED[name][1]
    path = str(tmp_path / "kd.sock")
    seen: list[str] = []
    tap = Tap(path, Doctor())
    with tap, Target(tap.target_end, kd_kernel.machine(kernel), faults=faults) as target:
        target.print("alive\n")
        client = subprocess.Popen(
            [sys.executable, "-c", ATTACH, path, "0", "0"],
            env={**os.environ, "HOME": str(kernel.pdb.parent / "home")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            end = time.monotonic() + 20
            while not (verdict in seen and faults.done) and time.monotonic() < end:
                time.sleep(0.05)
                seen += [name for name in tap.faults() if name not in seen]
        finally:
            client.kill()
            client.wait()
    assert verdict in seen
    assert faults.done


def frozen(kernel: Kernel, tap: Tap, target: Target) -> None:
    target.hit(KERNEL_BASE + kernel.symbols["NtCreateFile"])
    target.wait("stopped")
    tap.wait_for("frozen-exception")
    assert tap.doctor.state == STOPPED


def no_more(kernel: Kernel, tap: Tap, target: Target) -> None:
    pass


@pytest.mark.long
@pytest.mark.parametrize("prepare", [frozen, no_more])
def test_ntoseye_comes_late(
    kernel: Kernel, tmp_path: Path, prepare: Callable[[Kernel, Tap, Target], None]
) -> None:
    """The guest stands at an exception that nobody took; or it has started without a debugger and gave up on
    it."""
    path = str(tmp_path / "kd.sock")
    machine = kd_kernel.machine(kernel)
    doctor = Doctor()
    tap = Tap(path, doctor, injector=Injector(doctor))
    images = ("ntoskrnl.exe",) if prepare is no_more else ()
    with tap, Target(tap.target_end, machine, images=images, retries=2) as target:
        target.wait("running")
        prepare(kernel, tap, target)
        rip = machine.break_at if prepare is no_more else KERNEL_BASE + kernel.symbols["NtCreateFile"]
        assert_seen(attach(kernel, path), kernel, target, rip)
        target.wait("running")
        assert tap.faults() == []


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("unix-listen", "tcp-connect", "pty") else pytest.param(kind, marks=pytest.mark.long)
        for kind in KINDS
    ],
)
def test_ntoseye_through_the_bridge(kernel: Kernel, tmp_path: Path, kind: str) -> None:
    """The guest's line over every transport; ntoseye itself speaks unix sockets only."""
    machine = kd_kernel.machine(kernel)
    ends = ends_of(kind, tmp_path, "guest")
    path = tmp_path / "kd.sock"
    told: list[str] = []
    first = Client(ends.client) if kind == "tty" else None
    with (
        Live(record=str(tmp_path / "rec"), doctor=True, log=told.append) as live,
        bridge(ends.bridge, f"unix:{path},listen", observers=live.observers, on_tick=live.tick) as running,
    ):
        client = (first or Client(ends.client)).connect()
        with Target(ClientStream(client), machine) as target:
            running.expect_guest()
            target.wait("running")
            assert_seen(attach(kernel, str(path)), kernel, target, machine.break_at)
            target.wait("running")
            assert_seen(attach(kernel, str(path)), kernel, target, machine.break_at)
            target.wait("running")
            assert machine.breakpoints == {}
    assert told[0].startswith("doctor: healthy"), told
    again = replay(tmp_path / "rec")
    assert again.verdicts()[0].name == "healthy"
    assert again.requests > 80
