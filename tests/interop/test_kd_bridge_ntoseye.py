"""A real debugger through the bridge: ntoseye at a unix socket, the simulated kernel over every transport."""

from __future__ import annotations

from pathlib import Path

import pytest

from enban.serial.live import Live
from enban.serial.recording import replay
from tests.interop.test_kd_ntoseye import MISSING, assert_seen, attach
from tests.serial import kd_kernel
from tests.serial.kd_kernel import Kernel
from tests.serial.kd_lines import ClientStream
from tests.serial.kd_target import Target
from tests.serial.lines import KINDS, Client, bridge, ends_of

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}"),
]

QUICK = ("unix-listen", "tcp-listen", "fifo")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    folder = tmp_path_factory.mktemp("kernel")
    built = kd_kernel.build(folder)
    kd_kernel.install_symbols(built, folder / "home")
    return built


LINES = [(kind, "") for kind in KINDS] + [("unix-listen", ",pace=115200")]


@pytest.mark.parametrize(
    ("kind", "pace"),
    [line if line[0] in QUICK else pytest.param(*line, marks=pytest.mark.long) for line in LINES],
)
def test_ntoseye_attaches_and_leaves(kernel: Kernel, tmp_path: Path, kind: str, pace: str) -> None:
    """Registers and memory are the kernel's, a second debugger finds it as well, the doctor sees no fault."""
    names = ends_of(kind, tmp_path, "guest")
    socket = tmp_path / "kd.sock"
    told: list[str] = []
    machine = kd_kernel.machine(kernel)
    first = Client(names.client) if kind == "tty" else None
    with (
        Live(record=str(tmp_path / "rec"), doctor=True, log=told.append) as live,
        bridge(
            names.bridge, f"unix:{socket},listen{pace}", observers=live.observers, on_tick=live.tick
        ) as running,
        Target(ClientStream((first or Client(names.client)).connect()), machine) as target,
    ):
        running.expect_guest()
        for turn in range(1 if pace else 2):
            done = attach(kernel, str(socket), 120)
            assert_seen(done, kernel, target, machine.break_at)
            target.wait("running")
            running.expect("is gone", turn + 1)
    grades = {line.split(":")[1].strip() for line in told if line.startswith("doctor: ")}
    assert "fault" not in grades, told
    assert not [verdict for verdict in replay(tmp_path / "rec").verdicts() if verdict.grade == "fault"]
