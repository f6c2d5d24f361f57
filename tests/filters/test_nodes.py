"""Filters as nodes of a chain, by options: throttle, trace, delay, faults, writelog."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

import enban
import enban.aio
from enban.block.gate import TRUSTED
from enban.errors import GateError, HostError, NoSpaceError, UsageError
from enban.filters.throttle import Limit
from enban.lab.crash_states import Replay
from enban.lab.peer import Log
from enban.lab.qcow2_reader import Qcow2Reader
from tests.cli.command import enban as cli
from tests.support import KIB, MIB, make_qcow2, pattern


def chain(path: Path, driver: str, **options: object) -> dict[str, Any]:
    filter_: dict[str, object] = {"driver": driver, "file": {"filename": str(path)}}
    filter_.update({key.replace("_", "-"): value for key, value in options.items()})
    return {"driver": "qcow2", "file": filter_}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_qcow2(tmp_path / "a.qcow2", MIB, cluster_size=4096)


def test_a_limit_lets_a_burst_pass_and_then_so_much_a_second() -> None:
    limit = Limit(1000, burst_s=0.5)
    assert limit.take(400, 10.0) == 0.0
    assert limit.take(100, 10.0) == 0.0
    assert limit.take(250, 10.0) == 0.0  # the burst is used up from here on
    assert limit.take(1, 10.0) == pytest.approx(0.25)
    assert limit.take(1, 10.251) == 0.0
    assert limit.take(5000, 100.0) == 0.0 and limit.take(1, 101.0) == pytest.approx(3.5)
    assert Limit(0).take(1 << 40, 0.0) == 0.0


def test_throttle_on_both_faces(path: Path) -> None:
    options = chain(path, "throttle", bps_write="1M", burst_ms=0)
    with enban.open(options, writable=True) as disk:
        began = monotonic()
        for number in range(3):
            disk.pwrite(pattern(100 * KIB, number + 1), number * 100 * KIB)
        assert monotonic() - began > 0.15  # the first passes at once, the third after 200 KiB

    async def both() -> float:
        disk = await enban.aio.open(options, writable=True)
        began = monotonic()
        await asyncio.gather(*(disk.pwrite(bytes(100 * KIB), n * 100 * KIB) for n in range(3)))
        took = monotonic() - began
        await disk.close()
        return took

    assert asyncio.run(both()) > 0.15


def test_trace_tells_every_call(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "trace.jsonl"
    with enban.open(chain(path, "trace", log=str(log)), writable=True) as disk:
        disk.pwrite(b"x" * 4096, 8192)
        disk.flush()
        disk.write_zeroes(0, 4096)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"read", "write", "flush"} <= {line["op"] for line in lines}
    assert any(line["length"] == 4096 and line["op"] == "write" for line in lines)
    assert all(line["took"] >= 0 and line["us"] >= 0 for line in lines)


def test_faults_fail_the_call_they_name(path: Path) -> None:
    options = chain(path, "faults", operation="write", at="1", errno="ENOSPC")
    disk = enban.open(options, writable=True)
    with pytest.raises(NoSpaceError):
        disk.pwrite(b"x" * 4096, 0)
    disk.pwrite(b"y" * 4096, 0)
    disk.close()
    sticky = chain(path, "faults", operation="flush", sticky="on")
    disk = enban.open(sticky, writable=True)
    disk.pwrite(b"z", 0)
    for _ in range(2):
        with pytest.raises(HostError):
            disk.flush()
    with pytest.raises(HostError):
        disk.close()


def test_delay_takes_its_time(path: Path) -> None:
    with enban.open(chain(path, "delay", most_us=20_000, seed=3), writable=True) as disk:
        began = monotonic()
        for number in range(4):
            disk.pwrite(b"x" * 4096, number * 4096)
        assert monotonic() - began > 0.02


def test_writelog_can_be_replayed(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    start = path.read_bytes()
    with enban.open(chain(path, "writelog", log=str(log)), writable=True) as disk:
        disk.pwrite(pattern(10_000), 777)
        disk.flush()
        disk.write_zeroes(0, 4096)
        disk.discard(8192, 4096)
        shown = disk.pread(disk.size, 0)
    read = Log(log)
    read.read()
    assert int.from_bytes(log.read_bytes()[16:24], "little") == len(read.entries) > 5
    replay = Replay(start, read.entries)
    for _ in replay.steps():
        pass
    reader = Qcow2Reader(replay.everything())
    assert reader.check().clean and reader.read() == shown


def test_filters_stack_and_work_from_the_command_line(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "t"
    text = (
        f"driver=qcow2,file.driver=trace,file.log={log},file.file.driver=throttle,"
        f"file.file.bps-total=1G,file.file.file.filename={path}"
    )
    assert cli("map", "--image-opts", text).code == 0
    assert log.read_text().startswith('{"us": ')


@pytest.mark.parametrize(
    ("driver", "options", "words"),
    [
        ("throttle", {"bps": 5}, "no option 'bps'"),
        ("throttle", {"bps_read": "fast"}, "not a size"),
        ("trace", {}, "needs the option log"),
        ("faults", {"operation": "think"}, "operation 'think'"),
        ("faults", {"errno": "EWHAT"}, "no error number"),
        ("faults", {"sticky": "perhaps"}, "on or off"),
    ],
)
def test_options_that_make_no_sense(path: Path, driver: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        enban.open(chain(path, driver, **options))


def test_a_filter_needs_a_file() -> None:
    with pytest.raises(UsageError, match="needs a file"):
        enban.open({"driver": "throttle"})


def test_a_log_that_cannot_be_made(path: Path, tmp_path: Path) -> None:
    for driver in ("trace", "writelog"):
        with pytest.raises(HostError, match="no such"):
            enban.open(chain(path, driver, log=str(tmp_path / "none" / "log")))


def test_an_image_may_not_ask_for_filters(tmp_path: Path) -> None:
    """A backing reference that would have us write a file."""
    make_qcow2(tmp_path / "base.qcow2", MIB)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    inner = {"driver": "trace", "log": str(victim), "file": {"filename": str(tmp_path / "base.qcow2")}}
    for number, reference in enumerate((inner, {"driver": "qcow2", "file": inner})):
        name = "json:" + json.dumps(reference)
        top = make_qcow2(tmp_path / f"top{number}.qcow2", MIB, backing_file=name)
        with pytest.raises(GateError, match="filter 'trace'"):
            enban.open(top, gate=TRUSTED)
    assert victim.read_text() == "precious"
