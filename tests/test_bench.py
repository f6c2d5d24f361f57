"""The bench measures what it says: statistics, verdicts, the order of samples, the images it makes."""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import case, growth, inputs, memory, report, run, stats
from bench.__main__ import exit_code, main
from bench.harness import MIB, Bench, Row, Side, judge, room_bytes, written_bytes
from bench.metadata import CLUSTER, write_image

needs_qemu_img = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is missing (Debian package qemu-utils)"
)


@pytest.fixture
def make_bench(tmp_path: Path) -> Callable[..., Bench]:
    def make(ours: str = "sh -c", pairs: int = 3) -> Bench:
        return Bench(tmp_path, ours.split(), pairs, tell=lambda line: None)

    return make


def side(*seconds: float, out_bytes: int | None = None, peak_mib: int = 10) -> Side:
    return Side(list(seconds), list(seconds), peak_mib * MIB, out_bytes)


# ---- memory


def test_memory_is_held_where_much_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    assert memory.hold(memory.LITTLE - 1) == 0
    assert not waits
    assert memory.hold(memory.LITTLE) == memory.LITTLE
    assert waits == [memory.HOLD_S]
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 << 20)
    assert memory.hold(memory.LITTLE) == 4 << 20


# ---- statistics


def test_spread_is_the_middle_and_the_ends() -> None:
    assert stats.Spread.of([3, 1, 2]) == stats.Spread(1, 2, 3)
    assert stats.Spread.of([4, 1, 2, 3]).median == 2.5
    with pytest.raises(ValueError, match="no samples"):
        stats.Spread.of([])


def test_ratio_is_of_medians_with_the_ends_of_pairs() -> None:
    got = stats.ratio([10, 20, 30], [10, 5, 10])
    assert got == stats.Spread(1, 2, 4)


def test_ratio_of_medians_is_never_outside_its_ends() -> None:
    got = stats.ratio([1, 10, 10], [1, 1, 100])
    assert got.low <= got.median <= got.high
    assert got.median == 10


def test_ratio_against_a_peer_that_ran_once() -> None:
    assert stats.ratio([120.0], [2.0, 1.0, 3.0]).median == 60


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_growth_exponent_finds_the_power(power: float) -> None:
    sizes = [2.0**exponent for exponent in range(28, 33)]
    assert stats.growth_exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power)


def test_growth_exponent_needs_two_sizes() -> None:
    with pytest.raises(ValueError, match="two sizes"):
        stats.growth_exponent([1], [1])


# ---- cases


def test_placeholders_are_filled_and_never_split() -> None:
    words = case.expand("qemu-img convert -o 'a b' {raw-2G} x={out}", {"raw-2G": "/a b/c", "out": "/o ' u"})
    assert words == ["qemu-img", "convert", "-o", "a b", "/a b/c", "x=/o ' u"]


def test_every_case_is_well_formed() -> None:
    cases = case.all_cases()
    assert len(cases) >= 10
    for one in cases:
        for name in one.inputs:
            inputs.parse(name)
        writes = "{out}" in one.peer
        assert writes == ("{out}" in one.ours) == bool(one.out), one.name
        assert one.peer_program in ("qemu-img", "{python}"), one.name
        others = {"out": "o", "folder": "f", "python": "p"}
        assert case.expand(one.ours, {**dict.fromkeys(one.inputs, "image"), **others})
        assert one.self_timed == one.ours.startswith("{python}"), one.name
        if writes:
            # Without it a row would compare our flushed output with a peer's that is not.
            assert " -t " in f" {one.ours} ", one.name


def test_the_goals_of_the_project_are_the_goals_of_the_bench() -> None:
    goals = {one.name: one.goal for one in case.all_cases() if one.goal is not None}
    assert goals == {
        "raw -> qcow2": 1.5,
        "qcow2 -> raw": 1.5,
        "raw -> qcow2 -c (zlib)": 12,
        "raw -> qcow2 -c zstd": 3,
        "compressed qcow2 (zlib) -> raw": 2,
        "serial: round trips, unix, against direct": 0.5,
        "serial: round trips, unix, against a 115200 line": 100,
        "serial: bytes, unix, against a 115200 line": 100,
        "guest: 4k random read, depth 1, bus vhost": 0.8,
        "raw -> qcow": 1.3,
        "qcow -> raw": 1.3,
        "qcow -> qcow2": 1.3,
        "raw -> qcow -c": 1.3,
        "compressed qcow -> raw": 1.3,
        "compare raw and qcow2, 2 GiB": 1.3,
        "check 1 TiB, tables in order": 3,
        "check 1 TiB, shuffled": 50,
        "map 1 TiB, tables in order": 1,
        "map 64 GiB, shuffled": 1,
        "info, at most 3x an empty Python": pytest.approx(1 / 3),
        "nbd: 4k random read, depth 32": 2,
        "nbd: 4k random write, allocated, depth 32": 2,
        "nbd: 4k random write that allocates, depth 32": 1.5,
        "nbd: 4k random read, depth 1": 2,
        "nbd: 4k random write, depth 1": 2,
        "nbd: 4k random read, depth 1, --keep-awake (for root)": 2,
        "nbd: 4k random write, depth 1, --keep-awake (for root)": 2,
        "nbd: 4k random read, depth 32, --no-sr": 2,
        "nbd: 4k random read, depth 1, --no-sr": 2,
        "nbd: 4k random read, 4 connections, depth 32, --no-sr": 2.5,
        "nbd: 256k sequential read, depth 8": 4,
        "nbd: 256k sequential write, depth 8": 2,
        "nbd: 4k random read, 4 connections, depth 32": 2.5,
        "nbd: 4k random read, depth 32, not in page cache": 1,
        "nbd: nbdcopy of a compressed qcow2": 1.5,
        "snapshot -c, 64 GiB allocated in order": 2,
        "snapshot -d, 64 GiB allocated in order": 2,
        "snapshot -c, 64 GiB allocated, shuffled": 2,
        "snapshot -d, 64 GiB allocated, shuffled": 2,
        "commit, 512 MiB of data": 1.2,
        "rebase, 512 MiB of data": 1.2,
        "open meta-4G with snapshot=True, at most 5 ms": 1,
        "open meta-1T with snapshot=True, at most 5 ms": 1,
    }


def test_a_list_that_nobody_reads_on_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench", "--list"],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_growth_operations_are_well_formed() -> None:
    for operation in growth.OPERATIONS:
        for size in operation.sizes:
            one = operation.at(size)
            assert one.inputs and "SIZE" not in one.peer + one.ours
            for name in one.inputs:
                assert inputs.parse(name)[1] == inputs.parse(f"raw-{size}")[1]


# ---- verdicts


@pytest.mark.parametrize(
    ("peer", "ours", "verdict", "why"),
    [
        (side(2, 2, 2), side(1, 1, 1), "met", ""),
        (side(1.4, 1.4, 9), side(1, 1, 0.1), "missed", "ratio 1.40 is below 1.50"),
        (side(2, out_bytes=100), side(1, out_bytes=100), "met", ""),
        (side(2, out_bytes=100), side(1, out_bytes=101), "missed", "wrote 1 bytes more"),
        (side(2), side(1, peak_mib=96), "met", ""),
        (side(2), side(1, peak_mib=97), "missed", "peak memory 97 MiB is above 96"),
    ],
)
def test_verdicts(peer: Side, ours: Side, verdict: str, why: str) -> None:
    one = case.Case("x", peer="p", ours="o", goal=1.5, no_larger=True, peak_mib=96)
    got = judge(one, peer, ours)
    assert got[0] == verdict
    assert why in got[1]


def test_without_a_goal_a_row_is_shown_but_its_bounds_still_count() -> None:
    one = case.Case("x", peer="p", ours="o", peak_mib=96)
    assert judge(one, side(1), side(9))[0] == "shown"
    assert judge(one, side(1), side(9, peak_mib=200))[0] == "missed"


@pytest.mark.parametrize(
    ("verdict", "code", "strict_code"),
    [("met", 0, 0), ("shown", 0, 0), ("missed", 0, 1), ("not run", 0, 1), ("failed", 1, 1)],
)
def test_exit_codes(verdict: str, code: int, strict_code: int) -> None:
    rows = [Row(case.Case("x", "p", "o"), Side(), Side(), verdict)]
    assert exit_code(rows, strict=False) == code
    assert exit_code(rows, strict=True) == strict_code


# ---- running one command


def test_a_run_says_how_it_ended_and_what_it_complained_about(tmp_path: Path) -> None:
    got = run.run(["sh", "-c", "echo one >&2; echo 'two words' >&2; exit 3"], tmp_path)
    assert (got.code, got.timed_out, got.complaint) == (3, False, "two words")
    assert got.failed


def test_a_run_that_takes_too_long_ends_with_everything_it_started(tmp_path: Path) -> None:
    got = run.run(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; wait"], tmp_path, timeout_s=1.5)
    assert got.timed_out and got.failed
    assert 1.5 <= got.seconds < 30
    # The kill does not wait for the grandchild's end, so this does.
    try:
        ended = os.pidfd_open(int((tmp_path / "child").read_text()))
    except ProcessLookupError:
        return
    try:
        assert select.select([ended], [], [], 20)[0], "the grandchild lives on"
    finally:
        os.close(ended)


def test_a_run_measures_time_and_memory_of_its_process(tmp_path: Path) -> None:
    code = "import time; piece = b'x' * (200 << 20); time.sleep(0.2)"
    got = run.run([sys.executable, "-c", code], tmp_path)
    assert not got.failed
    assert got.seconds >= 0.2
    assert 200 * MIB <= got.peak_bytes < 2000 * MIB
    assert got.cpu_seconds > 0


def test_a_command_that_does_not_exist_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run.run(["no-such-program-here"], tmp_path)


def test_warm_ends_on_holes_and_empty_files(tmp_path: Path) -> None:
    for name, write in (("empty", b""), ("data", b"x" * 100_000)):
        path = tmp_path / name
        path.write_bytes(write)
        run.warm(path)
    with (tmp_path / "data").open("rb+") as file:
        file.truncate(1 << 40)
    run.warm(tmp_path / "data")
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 1 << 40)
    run.warm(tmp_path / "hole")


# ---- running a case


def test_peer_and_ours_alternate_and_take_turns_at_being_first(
    make_bench: Callable[..., Bench], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    one = case.Case("x", peer=f"sh -c 'echo p >> {log}'", ours=f"'echo o >> {log}'", goal=0.0001)
    row = make_bench().measure(one)
    assert row.verdict == "met"
    assert log.read_text().split() == ["p", "o", "p", "o", "o", "p", "p", "o"]
    assert len(row.peer.seconds) == len(row.ours.seconds) == 3, "the first round is not counted"


def test_a_bounded_peer_runs_once_and_gives_a_lower_bound(make_bench: Callable[..., Bench]) -> None:
    one = case.Case("x", peer="sleep 60", ours="true", goal=2, peer_bound_s=0.5)
    row = make_bench().measure(one)
    assert row.verdict == "met"
    assert row.peer.unfinished and len(row.peer.seconds) == 1 and len(row.ours.seconds) == 3
    assert report.ratio_cell(row).startswith("> ")
    assert report.time_cell(row.peer).startswith("> ")


def test_ours_has_no_more_time_than_a_bounded_peer(make_bench: Callable[..., Bench]) -> None:
    row = make_bench().measure(case.Case("x", peer="sleep 60", ours="'sleep 60'", peer_bound_s=0.3))
    assert (row.verdict, row.why) == ("failed", "ours was not done after 0.3 s")


def test_a_missing_peer_is_named_and_the_row_not_run(make_bench: Callable[..., Bench]) -> None:
    row = make_bench().measure(case.Case("x", peer="no-such-peer --fast", ours="true"))
    assert (row.verdict, row.why) == ("not run", "missing: no-such-peer")


def test_a_failing_command_fails_its_row_with_its_last_words(make_bench: Callable[..., Bench]) -> None:
    row = make_bench().measure(case.Case("x", peer="true", ours="'echo no such image >&2; exit 1'"))
    assert row.verdict == "failed"
    assert "code 1: no such image" in row.why


def test_a_peer_may_end_with_the_code_its_case_names(make_bench: Callable[..., Bench]) -> None:
    row = make_bench().measure(case.Case("x", peer="sh -c 'exit 3'", ours="'exit 0'", peer_code=3))
    assert row.verdict == "shown"
    other = make_bench().measure(case.Case("x", peer="true", ours="'exit 0'", peer_code=3))
    assert other.verdict == "failed" and "code 0" in other.why
    ours = make_bench().measure(case.Case("x", peer="sh -c 'exit 3'", ours="'exit 3'", peer_code=3))
    assert ours.verdict == "failed" and "code 3" in ours.why


def test_different_json_fails_the_row(make_bench: Callable[..., Bench]) -> None:
    peer = """sh -c 'echo "[[], 1]"'"""
    same = make_bench().measure(case.Case("x", peer=peer, ours="""'echo "[ [],1 ]"'""", same_json=True))
    assert same.verdict == "shown"
    other = make_bench().measure(case.Case("x", peer=peer, ours="""'echo "[[], 2]"'""", same_json=True))
    assert (other.verdict, other.why) == ("failed", "our JSON is not the peer's")
    broken = make_bench().measure(case.Case("x", peer=peer, ours="""'echo "["'""", same_json=True))
    assert broken.verdict == "failed" and "not JSON" in broken.why


@needs_qemu_img
@pytest.mark.interop
def test_outputs_are_compared_and_weighed(make_bench: Callable[..., Bench], tmp_path: Path) -> None:
    bench = make_bench("qemu-img", pairs=1)
    convert = "convert -f raw -O {} {{raw-4M}} {{out}}"
    peer = "qemu-img " + convert.format("qcow2")
    same = bench.measure(case.Case("x", peer, convert.format("qcow2"), out="qcow2", no_larger=True))
    assert same.verdict == "shown"
    assert same.ours.out_bytes == same.peer.out_bytes != 0
    # A version 2 image of the same content is as good; one with more preallocated is larger, and said to be.
    large = "convert -f raw -O qcow2 -o preallocation=full {raw-4M} {out}"
    larger = bench.measure(case.Case("x", peer, large, out="qcow2", no_larger=True))
    assert larger.verdict == "missed" and "more than the peer" in larger.why
    wrong = bench.measure(case.Case("x", peer, "create -f qcow2 {out} 4M", out="qcow2"))
    assert (wrong.verdict, wrong.why) == (
        "failed",
        "qemu-img compare finds our output different from the peer's",
    )
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"raw-4M.raw", "stderr"}, "outputs are removed"


def test_written_bytes_of_a_raw_file_are_its_data(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 30)
    assert written_bytes(path, "raw") < 1 << 20
    assert written_bytes(path, "qcow2") == 1 << 30


# ---- inputs


@pytest.mark.parametrize(
    "name", ["raw", "raw-", "raw-2", "raw-G", "raw-2X", "vhd-2G", "raw-2.5G", "", "raw--1G"]
)
def test_what_is_no_input_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no bench input"):
        inputs.parse(name)


def test_raw_input_is_half_data_and_always_the_same(tmp_path: Path) -> None:
    digests = []
    for where in ("a", "b"):
        (tmp_path / where).mkdir()
        path = inputs.make(tmp_path / where, "raw-64M")
        digests.append(hashlib.sha256(path.read_bytes()).digest())
    assert digests[0] == digests[1]
    assert path.stat().st_size == 64 * MIB
    assert 16 * MIB < path.stat().st_blocks * 512 < 48 * MIB
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["raw-64M.raw"]


def test_inputs_are_made_once(tmp_path: Path) -> None:
    path = inputs.make(tmp_path, "meta-1G")
    before = path.stat()
    assert inputs.make(tmp_path, "meta-1G").stat().st_mtime_ns == before.st_mtime_ns


def test_room_counts_origins_and_two_outputs() -> None:
    gib = 1 << 30
    assert room_bytes({"qcow2-2G"}) == gib + gib + 2 * gib
    assert room_bytes(set()) == 0


@needs_qemu_img
@pytest.mark.interop
@pytest.mark.parametrize("shuffled", [False, True], ids=["in-order", "shuffled"])
@pytest.mark.parametrize("guest_clusters", [1, 8192, 8193, 32766, 65536], ids=str)
def test_metadata_images_are_clean_and_fully_allocated(
    tmp_path: Path, guest_clusters: int, shuffled: bool
) -> None:
    path = tmp_path / "image.qcow2"
    write_image(path, guest_clusters * CLUSTER, shuffled=shuffled)
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", "-f", "qcow2", path],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["check-errors"] == 0
    assert not found.get("leaks") and not found.get("corruptions")
    assert found["allocated-clusters"] == found["total-clusters"] == guest_clusters
    fragmented = found.get("fragmented-clusters", 0)
    if guest_clusters > 1:
        assert fragmented > guest_clusters * 0.9 if shuffled else fragmented <= guest_clusters // 8192
    assert path.stat().st_blocks * 512 < 2 * MIB


# ---- what it prints


def test_the_table_is_aligned_and_says_what_went_wrong() -> None:
    goal = case.Case("long name of a case", "p", "o", goal=1.5)
    rows = [
        Row(goal, side(2, 3, 4, out_bytes=100), side(0.05, 0.06, 0.07, out_bytes=50), "met"),
        Row(case.Case("short", "p", "o"), Side(), Side(), "not run", "missing: qemu-img"),
    ]
    lines = report.table(rows).splitlines()
    assert lines[1].index("met") == lines[0].index("verdict") == lines[2].index("not run")
    assert "3.000 s (2.000..4.000)" in lines[1]
    assert "60.0 ms (50.0..70.0)" in lines[1]
    assert ">= 1.5" in lines[1] and "0.5000" in lines[1]
    assert lines[3] == "not run: short: missing: qemu-img"


def test_results_are_kept_whole(tmp_path: Path) -> None:
    row = Row(case.Case("x", "p", "o", goal=1), side(2), side(1), "met")
    path = tmp_path / "deep" / "results.json"
    report.save(path, {"rows": [report.as_json(row)]})
    kept = json.loads(path.read_text())["rows"][0]
    assert kept["ratio"]["median"] == 2
    assert kept["peer"]["seconds"] == [2]
    assert kept["case"]["goal"] == 1


def test_growth_table_names_the_powers() -> None:
    operation = growth.Operation("check", "p {meta-SIZE}", "o {meta-SIZE}", ("1G", "2G", "4G"))
    curve = growth.Curve(operation)
    for factor, size in enumerate(operation.sizes):
        curve.rows[size] = Row(operation.at(size), side(9), side(2.0**factor, peak_mib=20), "shown")
    last = growth.curve_table(curve).splitlines()[-1].split()
    assert last[-2:] == ["1.00", "0.00"]


@needs_qemu_img
@pytest.mark.interop
def test_the_command_line_runs_cases_and_keeps_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "results.json"
    where = ["--dir", str(tmp_path / "work"), "--json", str(kept)]
    code = main([*where, "--only", "info, against", "--pairs", "1", "--ours", "qemu-img"])
    assert code == 0
    assert "info, against qemu-img" in capsys.readouterr().out
    rows = json.loads(kept.read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["shown"]
    assert len(rows[0]["ours"]["seconds"]) == 3


def test_the_command_line_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "map 1 TiB"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "map 1 TiB, tables in order (goal 1)"
    assert listed[2].strip() == "enban map --output=json -f qcow2 {meta-1T}"
    with pytest.raises(SystemExit, match="nothing has 'zzz' in its name"):
        main(["--only", "zzz", "--ours", "true", "--dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["--pairs", "0"])


# ---- self-timed cases


def test_a_self_timed_command_says_its_figure(tmp_path: Path) -> None:
    """The figure on its last line counts, not how long it ran; our command is appended."""
    one = case.Case(
        name="x",
        peer="{python} -c \"print('words'); print(0.5)\"",
        ours='{python} -c "import sys; print(len(sys.argv) / 16)"',
        self_timed=True,
        goal=2,
    )
    row = Bench(tmp_path, ["enban"], 2, lambda text: None).measure(one)
    assert (row.verdict, row.peer.seconds, row.ours.seconds) == ("met", [0.5, 0.5], [0.125, 0.125]), row.why
    silent = case.Case(name="y", peer="{python} -c pass", ours="{python} -c pass", self_timed=True)
    assert "no figure" in Bench(tmp_path, ["enban"], 1, lambda text: None).measure(silent).why
    needy = case.Case(name="z", peer="{python} -c pass", ours="x", needs=("no-such-program",))
    assert Bench(tmp_path, ["enban"], 1, lambda text: None).measure(needy).verdict == "not run"
