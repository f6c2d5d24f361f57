"""The convert job: every pair of formats, its options, and what is left when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

import enban
from enban.errors import EnbanError, UsageError
from enban.jobs.convert import convert
from enban.jobs.zeroes import find_data
from tests.support import check_file, make_qcow2, needs_qemu_img, pattern, qemu_check, qemu_img

KIB, MIB = 1 << 10, 1 << 20

SIZE = 9 * (1 << 20) + 512 * 3


def mixed(size: int = SIZE, seed: int = 1) -> bytes:
    """Runs of zeros, of text and of noise whose ends lie anywhere."""
    random = Random(seed)
    out = bytearray()
    while len(out) < size:
        length = random.choice([100, 512, 4096, 70000, 300000])
        kind = random.random()
        if kind < 0.4:
            out += bytes(length)
        elif kind < 0.7:
            out += (b"some words that repeat %d " % random.randrange(99)) * (length // 20 + 1)
        else:
            out += random.randbytes(length)
    return bytes(out[:size])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.raw"
    path.write_bytes(mixed())
    return path


def run(source: Path, target: Path, format: str, **more: object) -> Path:
    convert([str(source)], str(target), target_format=format, target_cache="unsafe", **more)  # type: ignore[arg-type]
    return target


def content(path: Path, format: str = "") -> bytes:
    with enban.open(path, format=format, gate=enban.TRUSTED) as disk:
        return disk.pread(disk.size, 0)


TARGETS = [
    pytest.param("raw", {}, False, id="raw"),
    pytest.param("qcow2", {}, False, id="qcow2"),
    pytest.param("qcow2", {"cluster_size": "512"}, False, id="qcow2-512"),
    pytest.param("qcow2", {"cluster_size": "2M"}, False, id="qcow2-2M"),
    pytest.param("qcow2", {"compat": "0.10"}, False, id="qcow2-v2"),
    pytest.param("qcow2", {"extended_l2": "on"}, False, id="qcow2-extended"),
    pytest.param("qcow2", {"preallocation": "metadata"}, False, id="qcow2-metadata"),
    pytest.param("qcow2", {"preallocation": "full"}, False, id="qcow2-full"),
    pytest.param("qcow2", {"refcount_bits": "1"}, False, id="qcow2-1bit"),
    pytest.param("qcow2", {}, True, id="qcow2-zlib"),
    pytest.param("qcow2", {"compression_type": "zstd"}, True, id="qcow2-zstd"),
    pytest.param("qcow2", {"cluster_size": "4k", "refcount_bits": "64"}, True, id="qcow2-zlib-4k"),
    pytest.param("qcow2", {"extended_l2": "on"}, True, id="qcow2-zlib-extended"),
    pytest.param("qcow", {}, False, id="qcow"),
    pytest.param("qcow", {}, True, id="qcow-zlib"),
]


@needs_qemu_img
@pytest.mark.parametrize(("format", "options", "compress"), TARGETS)
def test_there_and_back(
    tmp_path: Path, source: Path, format: str, options: dict[str, str], compress: bool
) -> None:
    image = run(source, tmp_path / "image", format, options=options, compress=compress)
    if format == "qcow2":
        check_file(image)
        qemu_check(image)
    qemu_img("compare", "-f", format, "-F", "raw", image, source)
    back = run(image, tmp_path / "back.raw", "raw", source_format=format)
    assert back.read_bytes() == source.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.raw", "image"]


@needs_qemu_img
@pytest.mark.parametrize(
    "flags", [[], ["-c"], ["-c", "-o", "compression_type=zstd"], ["-o", "extended_l2=on"]]
)
def test_what_qemu_wrote(tmp_path: Path, source: Path, flags: list[str]) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("convert", *flags, "-f", "raw", "-O", "qcow2", source, image)
    back = run(image, tmp_path / "back.raw", "raw")
    assert back.read_bytes() == source.read_bytes()


def test_the_same_input_gives_the_same_image(tmp_path: Path, source: Path) -> None:
    images = [run(source, tmp_path / f"{n}.qcow2", "qcow2", workers=n).read_bytes() for n in (1, 2, 5)]
    assert images[0] == images[1] == images[2]


def test_out_of_order_gives_the_same_disk(tmp_path: Path, source: Path) -> None:
    image = run(source, tmp_path / "image.qcow2", "qcow2", workers=4, out_of_order=True)
    check_file(image)
    assert content(image) == source.read_bytes()


@needs_qemu_img
def test_no_larger_than_the_peer(tmp_path: Path, source: Path) -> None:
    ours = run(source, tmp_path / "ours.qcow2", "qcow2")
    theirs = tmp_path / "theirs.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", source, theirs)
    assert ours.stat().st_size <= theirs.stat().st_size
    assert ours.stat().st_blocks <= theirs.stat().st_blocks


def test_several_sources_stand_one_after_the_other(tmp_path: Path) -> None:
    parts = [mixed(1 << 20, seed=2), mixed(512 * 7, seed=3), mixed(3 << 20, seed=4)]
    names = []
    for number, part in enumerate(parts):
        names.append(str(tmp_path / f"{number}.raw"))
        Path(names[-1]).write_bytes(part)
    convert(list(names), str(tmp_path / "all.qcow2"), target_format="qcow2", target_cache="unsafe")
    assert content(tmp_path / "all.qcow2") == b"".join(parts)


def test_a_run_of_data_goes_over_from_one_source_to_the_next(tmp_path: Path) -> None:
    parts = [bytes([number]) * length for number, length in ((1, 4096 * 3), (2, 512), (3, 3 << 20))]
    names = []
    for number, part in enumerate(parts):
        names.append(str(tmp_path / f"{number}.raw"))
        Path(names[-1]).write_bytes(part)
    packed = str(tmp_path / "packed.qcow2")
    convert(names[2], packed, source_format="raw", target_format="qcow2", compress=True)
    convert([*names[:2], packed], str(tmp_path / "all.raw"), target_cache="unsafe", workers=2)
    assert (tmp_path / "all.raw").read_bytes() == b"".join(parts)


def test_into_an_existing_image_zeros_are_written(tmp_path: Path, source: Path) -> None:
    target = make_qcow2(tmp_path / "target.qcow2", SIZE, cluster_size=4096)
    with enban.open(target, writable=True) as disk:
        disk.pwrite(b"x" * SIZE, 0)
    run(source, target, "qcow2", target_exists=True)
    check_file(target)
    assert content(target) == source.read_bytes()


def test_an_existing_image_that_is_too_small_is_refused(tmp_path: Path, source: Path) -> None:
    target = make_qcow2(tmp_path / "target.qcow2", SIZE - 512)
    with pytest.raises(UsageError, match="the target has"):
        run(source, target, "qcow2", target_exists=True)


def test_over_a_backing_file_only_the_top_layer_is_copied(tmp_path: Path, source: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    enban.create(overlay, "qcow2", {"backing_file": str(source), "backing_fmt": "raw"})
    with enban.open(overlay, writable=True, gate=enban.TRUSTED) as disk:
        disk.pwrite(b"new" * 1000, 200_000)
        disk.write_zeroes(1 << 20, 1 << 20)
        expected = disk.pread(disk.size, 0)
    copy = run(overlay, tmp_path / "copy.qcow2", "qcow2", backing=str(source), backing_format="raw")
    check_file(copy)
    assert content(copy) == expected
    assert copy.stat().st_size < 1 << 20


def test_sparse_size_zero_writes_everything(tmp_path: Path, source: Path) -> None:
    target = run(source, tmp_path / "full.raw", "raw", sparse_size=0)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 >= SIZE - 4096


def test_copying_inside_the_host(tmp_path: Path, source: Path) -> None:
    target = run(source, tmp_path / "copy.raw", "raw", offload=True)
    assert target.read_bytes() == source.read_bytes()


@needs_qemu_img
def test_an_internal_snapshot_is_copied(tmp_path: Path, source: Path) -> None:
    image = run(source, tmp_path / "image.qcow2", "qcow2")
    qemu_img("snapshot", "-c", "before", image)
    with enban.open(image, writable=True) as disk:
        disk.pwrite(b"z" * 100_000, 0)
    back = run(image, tmp_path / "back.raw", "raw", snapshot="before")
    assert back.read_bytes() == source.read_bytes()
    with pytest.raises(UsageError, match="no snapshot 'after'"):
        run(image, tmp_path / "none.raw", "raw", snapshot="after")


def test_verify_reads_back(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = convert(
        [str(source)], str(tmp_path / "a.qcow2"), target_format="qcow2", target_cache="unsafe", verify=True
    )
    assert result.verified
    from enban.storage.file import FileStorage

    honest = FileStorage._write

    def lying(self: FileStorage, view: memoryview, offset: int) -> None:
        if len(view) > 100_000:
            view = memoryview(bytes(view[:-1]) + b"!")
        honest(self, view, offset)

    monkeypatch.setattr(FileStorage, "_write", lying)
    with pytest.raises(EnbanError, match="does not read back"):
        run(source, tmp_path / "b.qcow2", "qcow2", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.qcow2"]


def test_source_and_target_must_differ(tmp_path: Path) -> None:
    target = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    with pytest.raises(EnbanError):
        run(target, target, "qcow2", target_exists=True)


@pytest.mark.parametrize("grain", [512, 4096])
def test_find_data(grain: int) -> None:
    random = Random(3)
    for _ in range(300):
        units = random.randrange(1, 40)
        buffer = bytearray(units * grain - random.randrange(grain // 2))
        for _ in range(random.randrange(6)):
            buffer[random.randrange(len(buffer))] = random.randrange(256)
        found = find_data(memoryview(buffer), grain)
        shown = bytearray(len(buffer))
        for first, last in found:
            assert first % grain == 0
            shown[first:last] = buffer[first:last]
        assert shown == buffer
        for first, last in found:
            for unit in range(first, last, grain):
                assert any(buffer[unit : unit + grain])


# -- interruption (data-loss case 25) ----------------------------------------------------------


def slow_convert(source: Path, target: Path, *more: str) -> subprocess.Popen[bytes]:
    """A convert in a process of its own whose reads take long enough to be interrupted."""
    code = (
        "import sys, time\n"
        "from enban.jobs.sources import Sources\n"
        "from enban.jobs import journal\n"
        "journal.INTERVAL_S = 0.1\n"
        "honest = Sources.read\n"
        "def slow(self, buffer, offset):\n"
        "    time.sleep(len(buffer) / (8 << 20))\n"
        "    honest(self, buffer, offset)\n"
        "Sources.read = slow\n"
        "from enban.cli import main\n"
        "print('ready', flush=True)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        *more,
        str(source),
        str(target),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_convert_leaves_nothing(tmp_path: Path, source: Path, number: int) -> None:
    process = slow_convert(source, tmp_path / "image.qcow2")
    time.sleep(0.6)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (130, 143)
    assert errors.count(b"\n") == 1 and b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_killed_convert_leaves_nothing_under_the_final_name(tmp_path: Path, source: Path) -> None:
    """Data-loss case 25: SIGKILL in the middle must not leave an image that looks finished."""
    target = tmp_path / "image.qcow2"
    target.write_bytes(b"what was there before")
    process = slow_convert(source, target)
    time.sleep(0.6)
    process.kill()
    process.communicate(timeout=30)
    assert target.read_bytes() == b"what was there before"
    run(source, target, "qcow2")  # the left-over is no obstacle
    assert content(target) == source.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["image.qcow2"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_resume_goes_on_where_it_was(tmp_path: Path, source: Path, number: int) -> None:
    target = tmp_path / "image.qcow2"
    process = slow_convert(source, target, "--resume", "-m", "1")
    deadline = time.monotonic() + 30
    journal = tmp_path / "image.qcow2.enban-journal"
    while not (journal.exists() and json.loads(journal.read_text())["position"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert not target.exists() and journal.exists()
    result = convert([str(source)], str(target), source_format="raw", target_format="qcow2", resume=True)
    assert 0 < result.resumed_at < SIZE
    assert result.bytes_read < SIZE - result.resumed_at + (4 << 20)
    assert content(target) == source.read_bytes()
    check_file(target, leaks=number == signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["image.qcow2"]


def test_resume_starts_again_when_the_source_changed(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(mixed(seed=8))
    target = tmp_path / "image.qcow2"
    process = slow_convert(source, target, "--resume", "-m", "1")
    journal = tmp_path / "image.qcow2.enban-journal"
    deadline = time.monotonic() + 30
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=30)
    source.write_bytes(mixed(seed=9))
    os.utime(source, ns=(1, 1))
    result = convert([str(source)], str(target), source_format="raw", target_format="qcow2", resume=True)
    assert result.resumed_at == 0
    assert content(target) == source.read_bytes()


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["-c"]])
def test_memory_does_not_grow_with_the_image(tmp_path: Path, flags: list[str]) -> None:
    """Peak memory of a convert stays under 96 MiB, for a disk several times that."""
    source = tmp_path / "big.raw"
    with source.open("wb") as file:
        for number in range(300):
            file.write(number.to_bytes(4, "big") * (1 << 18))
    code = (
        "import sys\n"
        "from enban.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])\n"
        "sys.exit(code)\n"
    )
    words = ["convert", "-t", "unsafe", *flags, "-O", "qcow2", str(source), str(tmp_path / "big.qcow2")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 96 << 10


def test_sources_of_odd_length_begin_at_sectors(tmp_path: Path) -> None:
    one, two = mixed(1000, seed=5), mixed(5000, seed=6)
    (tmp_path / "1.raw").write_bytes(one)
    (tmp_path / "2.raw").write_bytes(two)
    convert([tmp_path / "1.raw", tmp_path / "2.raw"], tmp_path / "both.raw", source_format="raw")
    assert (tmp_path / "both.raw").read_bytes() == one.ljust(1024, b"\0") + two.ljust(5120, b"\0")


@pytest.mark.parametrize(
    "more", [{"verify": True}, {"target_exists": True}, {"snapshot": "x"}, {"source_format": "qcow2"}]
)
def test_standard_input_refuses_what_it_cannot_do(tmp_path: Path, more: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="standard input does not go with"):
        convert("-", tmp_path / "out.raw", **more)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("out_of_order", [False, True])
def test_packing_over_something_writes_the_zeros_too(
    tmp_path: Path, compression: str, out_of_order: bool
) -> None:
    """Into an image that holds other data, and into an overlay, where only what the source's top layer holds
    is copied: a cluster that is in part below is packed with what shows through."""
    size = 6 * MIB + 512
    base, source = tmp_path / "base.qcow2", tmp_path / "source.qcow2"
    make_qcow2(base, size)
    with enban.open(base, writable=True) as disk:
        disk.pwrite(pattern(size, seed=1), 0)
    make_qcow2(source, size, backing_file=str(base), backing_fmt="qcow2")
    small = tmp_path / "small.qcow2"  # its clusters are smaller than the target's
    make_qcow2(small, size, backing_file=str(base), backing_fmt="qcow2", cluster_size=4096)
    for path in (source, small):
        with enban.open(path, writable=True, gate=enban.TRUSTED) as disk:
            disk.pwrite(bytes(128 * KIB), 64 * KIB)
            disk.pwrite(b"text " * 1000, 1 * MIB + 4096)
            disk.write_zeroes(3 * MIB, 100 * KIB)
            disk.pwrite(os.urandom(200 * KIB), 4 * MIB)
            disk.write_zeroes(size - 4096, 4096)
    for path in (source, small):
        with enban.open(path, gate=enban.TRUSTED) as disk:
            content = disk.pread(size, 0)
        over = tmp_path / f"over-{path.name}"
        settings = {"cluster_size": "64k", "compression_type": compression}
        enban.convert(
            path,
            over,
            target_format="qcow2",
            options=settings,
            compress=True,
            backing=str(base),
            backing_format="qcow2",
            out_of_order=out_of_order,
        )
        into = tmp_path / f"into-{path.name}"
        make_qcow2(into, size, compression_type=compression)
        with enban.open(into, writable=True) as disk:
            disk.pwrite(pattern(size, seed=2), 0)
        enban.convert(
            path,
            into,
            target_format="qcow2",
            compress=True,
            target_exists=True,
            out_of_order=out_of_order,
        )
        for made in (over, into):
            with enban.open(made, gate=enban.TRUSTED) as disk:
                assert disk.pread(size, 0) == content
            check_file(made)
        with enban.open(over, gate=enban.TRUSTED) as disk:
            assert {extent.depth for extent in disk.map()} == {0, 1}
