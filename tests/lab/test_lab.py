"""The parts of the lab: what they count, what they keep, that a seed repeats."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest

from enban.block.runtime import BLOCKING
from enban.formats.qcow2.node import Qcow2Node
from enban.lab import campaign, fulldisk, live, parts
from enban.lab.campaign import PARTS, Campaign, Screen, Soak, make_parts
from enban.lab.crash import Explorer, record
from enban.lab.fuzz import load, one
from enban.lab.images import ALL, Image, Medium, by_name
from enban.lab.kill import KillPart
from enban.lab.oracle import FOREIGN, LOST, Oracle, Violation
from enban.lab.parts import Part
from enban.lab.qcow2_reader import Memo
from enban.lab.shrink import shrink
from enban.lab.storm import KINDS, ambush
from enban.lab.workload import Operation, operations, parse_script
from tests.cli.command import command, environment, refused
from tests.cli.command import enban as cli
from tests.lab.mutants import flush_does_not_write_the_tables

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"


@pytest.mark.parametrize("image", ALL, ids=repr)
def test_a_script_says_all_of_a_workload(image: Image) -> None:
    script = operations(image, 3, 60, reopens=True)
    again = parse_script("\n".join(map(str, script)), image)
    assert [str(operation) for operation in again] == [str(operation) for operation in script]
    assert [(o.content, o.unmap) for o in again] == [(o.content, o.unmap) for o in script]


def test_a_seed_gives_the_same_states() -> None:
    image = by_name("512-chain")
    tallies = [Explorer(record(image, operations(image, 5, 30)), 5).explore().as_dict() for _ in range(2)]
    assert tallies[0] == tallies[1] and tallies[0]["states"] > 200


def test_tables_from_memory_mean_what_they_mean_anew() -> None:
    """States read with one memo for all of them, and each with none."""
    image, memo = by_name("512-snap"), Memo()
    recording = record(image, operations(image, 9, 30))
    explorer = Explorer(recording, 9)
    seen = 0

    def both(oracle: Oracle, state: bytearray, what: str) -> None:
        nonlocal seen
        seen += 1
        quick, slow = image.view(state, memo=memo), image.view(state)
        assert quick.check() == slow.check()
        assert quick.read() == slow.read() and quick.snapshots() == slow.snapshots()

    explorer._judge = both  # type: ignore[method-assign]
    explorer.explore()
    assert seen > 200


@pytest.mark.parametrize("job", [live.commit_in_a_storm, live.pull_in_a_storm])
@pytest.mark.parametrize("image", live.KINDS, ids=repr)
def test_jobs_in_a_storm(image: Image, job: Callable[[Image, int], int]) -> None:
    assert job(image, 1) == 720


def test_shrink_finds_the_two_that_matter() -> None:
    assert shrink(list(range(40)), lambda some: {7, 31} <= set(some)) == [7, 31]


def test_the_oracle_knows_old_new_and_foreign() -> None:
    oracle = Oracle(bytes(2048), keep_past=True)
    for content in (b"a", b"b"):
        write = Operation("write", 512, 512, content * 512)
        oracle.begin(write)
        oracle.done(write)
        if content == b"a":
            oracle.done(Operation("flush"))
    for good in (b"a", b"b"):
        oracle.check_crash(bytes(512) + good * 512 + bytes(1024))
    with pytest.raises(Violation) as caught:
        oracle.check_crash(bytes(2048))
    assert caught.value.kind == LOST
    with pytest.raises(Violation) as caught:
        oracle.check_crash(bytes(512) + b"c" * 512 + bytes(1024))
    assert caught.value.kind == FOREIGN
    with pytest.raises(Violation, match="size 512"):
        oracle.check_crash(bytes(512))


def test_a_discarded_range_of_a_medium_reads_as_zeros() -> None:
    from enban.block.runtime import drive

    medium = Medium(BLOCKING, b"x" * 1024)
    drive(medium.discard(512, 4096))
    assert medium.content == b"x" * 512 + bytes(512)


@pytest.mark.parametrize("image", [image for image in KINDS if not image.external], ids=repr)
def test_ambush(image: Image) -> None:
    for seed in range(3):
        assert ambush(image, seed) >= 200


@pytest.mark.parametrize("name", PARTS)
def test_a_piece_of_each_part(name: str) -> None:
    (part,) = make_parts([name], 2)
    finding = part.step()
    part.close()
    assert finding is None
    assert next(iter(part.counts.values())) > 0 and part.seconds > 0


def test_a_finding_is_kept_and_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SHRINK_S", 3.0)
    monkeypatch.chdir(tmp_path)
    flush_does_not_write_the_tables(monkeypatch)
    told = cli("torture", "crash", "--only", "512", "--count", "1", "--seed", "4", code=1)
    directory = next((tmp_path / "torture-findings").iterdir())
    assert {path.name for path in directory.iterdir()} == {
        "report.txt",
        "script.txt",
        "before.img",
        "after.img",
    }
    assert str(directory.name) in told.out and "LOST in crash" in told.out
    script = (directory / "script.txt").read_text().splitlines()
    assert 2 <= len(script) <= 5, script  # a remark, and little more than a write and a flush
    again = "enban torture crash --seed 4 --only 512 --count 1"
    assert again in told.out and again in (directory / "report.txt").read_text()
    assert (directory / "after.img").read_bytes()[:4] == b"QFI\xfb"
    words = ("torture", "crash", "--only", "512", "--script", directory / "script.txt", "--count", "1")
    answer = json.loads(cli(*words, "--output", "json", code=1).out)
    assert answer["findings"][0]["kind"] == "lost"
    monkeypatch.undo()
    assert Qcow2Node.flush is not None
    monkeypatch.chdir(tmp_path)
    assert "no promise was broken" in cli(*words).out


def test_a_campaign_ends_in_time_and_counts(tmp_path: Path) -> None:
    work = Campaign(
        make_parts(["crash", "faults"], 1),
        seed=1,
        seconds=2.0,
        directory=tmp_path,
        screen=Screen(silent=True),
    )
    assert not work.run()
    assert 1.5 < work.elapsed < 15
    answer = work.as_dict()
    assert answer["findings"] == [] and answer["seed"] == 1
    assert "states" in work.table() and not list(tmp_path.iterdir())


def test_a_signal_ends_it_and_nothing_stays(tmp_path: Path) -> None:
    """While a server is being killed over and over: no process, no directory is left."""
    here = {"TMPDIR": str(tmp_path), **environment()}
    words = command("torture", "kill", "--time", "60s", "-p")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=here, text=True)
    deadline = monotonic() + 20
    while not list(tmp_path.glob("enban-kill-*/socket")):
        assert process.poll() is None and monotonic() < deadline
        sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "kill" in out and "no promise was broken" in out and "terminated" in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_zeroes_in_place() -> None:
    """Seed 185 on ext4 once showed old bytes after zeroing had failed for want of room."""
    place = fulldisk.Place()
    try:
        fulldisk.fill(next(image for image in fulldisk.KINDS if str(image) == "raw"), 185, place)
    finally:
        place.close()


@pytest.mark.long
@pytest.mark.parametrize("name", PARTS)
def test_a_minute_of_each_part(name: str, tmp_path: Path) -> None:
    work = Campaign(
        make_parts([name], 77, corpus=str(CORPUS)),
        seed=77,
        seconds=60.0,
        directory=tmp_path,
        screen=Screen(silent=True),
    )
    assert not work.run(), work.table()


def test_the_corpus() -> None:
    """Images that once did harm, or nearly."""
    corpus = load(CORPUS)
    assert len(corpus) >= 8 and sum(path.stat().st_size for path in CORPUS.iterdir()) < 200_000
    for name, content in corpus:
        one(content, note=name)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["nothing"], "crash"),
        (["--only", "nothing"], "--list"),
        (["--time", "soon"], "8h"),
        (["faults", "--script", "x"], "crash"),
        (["crash", "--script", "no-such-file"], "no-such-file"),
        (["storm", "--server", "x"], "kill"),
        (["nbd://127.0.0.1:1/x"], "--overwrite"),
        (["--seed", "x"], "number"),
        (["crash", "--count", "0"], "number"),
        (["--quick", "--time", "9s"], "contradict"),
        (["crash", "--corpus", "x"], "fuzz"),
        (["crash", "--overwrite"], "NBD"),
        (["nbd://127.0.0.1:1/x", "--overwrite", "--only", "512"], "--only is for"),
        (["nbd://127.0.0.1:1/x", "--overwrite"], "is the server running"),
        (["--peer", "qemu", "crash"], "no use for crash"),
        (["--peer", "qemu", "--time", "9s"], "no use for --time"),
        (["fuzz", "--corpus", "no-such-directory"], "no-such-directory"),
        (["kill", "--server", "no-such-program {socket}"], "no-such-program"),
        (["kill", "--server", "false {socket}"], "by hand"),
        (["kill", "--server", "false {sock"], "{socket}"),
        (["kill", "--server", "false {sock}"], "{socket}"),
        (["kill", "--server", "false '"], "{socket}"),
    ],
)
def test_words_it_does_not_understand(words: list[str], hint: str) -> None:
    assert hint in refused("torture", *words)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (b"", "no operation in it"),
        (b"# a remark\n", "no operation in it"),
        (b"flush\nwrite 0x0\n", "line 2"),
        (b"write 0x0+0x400000000000 #1\n", "line 1"),
        (b"write -0x200+0x200 #1\n", "line 1"),
        (b"resize 0x400000000000\n", "line 1"),
        (b"snapshot\n", "line 1"),
        (b"dance\n", "'dance', is no operation"),
        (b"\xff\xfe", "no text"),
    ],
)
def test_a_script_that_cannot_be_done_is_named_by_its_line(tmp_path: Path, script: bytes, words: str) -> None:
    (tmp_path / "script").write_bytes(script)
    said = refused("torture", "crash", "--only", "512", "--script", tmp_path / "script", "--count", "1")
    assert words in said


def test_a_corpus_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "no images" in refused("torture", "fuzz", "--corpus", tmp_path)
    (tmp_path / "broken.z").write_bytes(b"not packed")
    assert "broken.z: no file packed by zlib" in refused("torture", "fuzz", "--corpus", tmp_path)


def test_a_finding_about_another_server_says_which() -> None:
    part = KillPart(3, "kill-4k", server="other -k {socket} {image}")
    again = part.found(part.kinds[0], 3, Violation(LOST, "x")).again
    assert "--server 'other -k {socket} {image}'" in again


@pytest.mark.parametrize("kind", ["as this machine has it", "limit"])
def test_a_full_disk_with_each_kind_of_image(kind: str) -> None:
    place = fulldisk.Place()
    mounted = place.kind
    place.kind = "limit" if kind == "limit" else mounted
    refused = 0
    try:
        for image in fulldisk.KINDS:
            for seed in range(12):  # how much room there is follows from the seed
                errors, done = fulldisk.fill(image, seed, place)
                assert done == 90
                refused += errors
                if errors:
                    break
            # A limit on the file's size is no hindrance to what does not grow.
            assert errors or place.kind == "limit", f"{image} never met a full disk"
    finally:
        place.loosen()
        place.kind = mounted
        place.close()
    assert refused > 20


def test_a_soak_finds_what_grows() -> None:
    def judge(memory: int, descriptors: int, *, seconds: int = 200) -> None:
        soak = Soak()
        for second in range(seconds):
            soak.samples.append(
                (float(second), (100 << 20) + memory * second // seconds, 8 + descriptors * second // seconds)
            )
        soak.judge()

    judge(0, 0)
    judge(20 << 20, 3)
    judge(1 << 30, 100, seconds=60)  # it settles yet
    with pytest.raises(Violation, match="memory grew from "):
        judge(1 << 30, 0)
    with pytest.raises(Violation, match="open descriptors grew"):
        judge(0, 40)


def test_a_leak_while_it_runs_ends_in_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that leaves descriptors open each time."""
    held: list[int] = []

    def work(part: Part, image: Image, seed: int) -> None:
        held.extend(os.dup(0) for _ in range(10))
        sleep(0.05)

    monkeypatch.setattr(parts.CrashPart, "work", work)
    monkeypatch.setattr(campaign, "SOAK_S", 1.0)
    monkeypatch.setattr(Soak, "EVERY_S", 0.05)
    (part,) = make_parts(["crash"], 1)
    run = Campaign([part], seed=1, seconds=1.5, directory=tmp_path, screen=Screen(silent=True))
    try:
        (finding,) = run.run()
    finally:
        for descriptor in held:
            os.close(descriptor)
    assert finding.part == "soak" and "descriptors grew" in finding.text


def test_progress_is_told_while_it_runs(tmp_path: Path) -> None:
    told = io.StringIO()
    screen = Screen(plain=True, stream=told)
    run = Campaign(make_parts(["crash"], 1), seed=1, seconds=1.0, directory=tmp_path, screen=screen)
    screen.every = screen.next = 0.0
    assert not run.run()
    lines = told.getvalue().splitlines()
    assert re.fullmatch(r"\d:\d\d of 0:01  crash [\d,]+ states( \([\d,]+/s\))? \| findings 0", lines[-1]), (
        lines[-1]
    )
    screen.every = 3600.0
    before = len(told.getvalue())
    screen.next = monotonic() + 3600
    screen.show("not yet")
    assert len(told.getvalue()) == before


def test_kinds_are_listed() -> None:
    out = cli("torture", "--list").out
    for part in PARTS:
        assert f"{part}: " in out
    assert "512-chain" in out and "kill-raw" in out
