"""Internal snapshots: against a model, at every crash point, with every I/O failing, under load."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from random import Random

import pytest

import enban
import enban.aio
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.catalog import open_door
from enban.errors import EnbanError, UnsupportedOperationError, UsageError
from enban.filters.faults import Call, Fault, Faults, fail_at
from enban.filters.writelog import WriteLog
from enban.lab.crash_states import Replay
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.support import check_bytes, check_file, empty_image, make_qcow2, open_memory

SHAPES = [
    pytest.param({}, id="default"),
    pytest.param({"cluster_size": 512}, id="512"),
    pytest.param({"cluster_size": 4096, "refcount_bits": 8}, id="4k-8bit"),
    pytest.param({"cluster_size": 1024, "refcount_bits": 64}, id="1k-64bit"),
    pytest.param({"cluster_size": 16384, "extended_l2": True}, id="extended"),
    pytest.param({"compat": "0.10", "cluster_size": 4096}, id="v2"),
]


def view(path: Path, name: str) -> bytes:
    """A snapshot as the library shows it."""
    with Disk(drive(open_door(str(path), BLOCKING, snapshot_name=name))) as disk:
        return disk.pread(disk.size, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_random_operations_equal_a_model(tmp_path: Path, shape: dict[str, object], seed: int) -> None:
    random = Random(seed)
    size = 1 << 20
    path = make_qcow2(tmp_path / "disk.qcow2", size, **shape)
    model = bytearray(size)
    kept: dict[str, bytes] = {}
    disk = enban.open(path, writable=True)
    for number in range(70):
        action = random.random()
        offset = random.randrange(len(model))
        length = min(len(model) - offset, random.choice([512, 5000, 70000, 300000]))
        if action < 0.5:
            data = random.randbytes(length)
            disk.pwrite(data, offset)
            model[offset : offset + length] = data
        elif action < 0.6:
            disk.write_zeroes(offset, length, unmap=random.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif action < 0.74:
            disk.create_snapshot(f"s{number}")
            kept[f"s{number}"] = bytes(model)
        elif action < 0.8 and kept:
            name = random.choice(list(kept))
            disk.apply_snapshot(name)
            model = bytearray(kept[name])
        elif action < 0.87 and kept:
            name = random.choice(list(kept))
            disk.delete_snapshot(name)
            del kept[name]
        elif action < 0.92 and shape.get("compat") != "0.10":
            new = random.randrange(1, 5) << 18
            disk.resize(new)
            model = model[:new] + bytes(max(0, new - len(model)))
        elif action < 0.94:
            disk.discard(offset, length)  # whole clusters may read as zeros then; nothing else changes
            found = disk.pread(length, offset)
            old = model[offset : offset + length]
            assert all(new in (before, 0) for new, before in zip(found, old, strict=True))
            model[offset : offset + length] = found
        elif action < 0.96:
            disk.close()
            check_file(path)
            disk = enban.open(path, writable=True)
        assert disk.size == len(model)
        assert disk.pread(disk.size, 0) == model
    assert [snapshot.name for snapshot in disk.snapshots] == list(kept)
    disk.close()
    check_file(path)
    for name, content in kept.items():
        assert view(path, name) == content


def test_deleting_all_gives_back_all(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20, cluster_size=4096)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"a" * 300000, 0)
        disk.flush()
    used = _counted(path)
    with enban.open(path, writable=True) as disk:
        for number in range(20):
            disk.create_snapshot(str(number + 100))
            disk.pwrite(bytes([number]) * 50000, 1000 * number)
        for number in range(20):
            disk.delete_snapshot(str(number + 100))
        assert disk.pread(1000, 0) == b"\0" * 1000
    check_file(path)
    assert _counted(path) <= used + 3  # tables may lie differently, data may not


def _counted(path: Path) -> int:
    """How many clusters of an image are in use."""
    reader = Qcow2Reader(path.read_bytes())
    total = 0
    for entry in reader.table(reader.table_offset, reader.table_clusters * reader.cluster // 8):
        if entry:
            block = reader.image[entry : entry + reader.cluster]
            total += sum(1 for i in range(0, len(block), 2) if block[i : i + 2] != b"\0\0")
    return total


def test_names_and_ids(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    with enban.open(path, writable=True) as disk:
        disk.create_snapshot("one")
        disk.create_snapshot("two")
        with pytest.raises(UsageError, match="already"):
            disk.create_snapshot("two")
        with pytest.raises(UsageError, match="no snapshot 'three'"):
            disk.delete_snapshot("three")
        assert [(s.id, s.name, s.disk_size) for s in disk.snapshots] == [
            ("1", "one", 1 << 20),
            ("2", "two", 1 << 20),
        ]
        disk.delete_snapshot("1")
        disk.create_snapshot("日本 – three")
        assert [(s.id, s.name) for s in disk.snapshots] == [("2", "two"), ("3", "日本 – three")]
    check_file(path)


def test_names_that_are_ids_of_others(tmp_path: Path) -> None:
    """-a and -l mean ids first, -d names first, as qemu-img has it; nobody loses another snapshot."""

    def image(name: str) -> Path:
        """Snapshots (id, name, first byte): (1, "2", "a"), (2, "3", "b"), (3, "1", "c")."""
        path = make_qcow2(tmp_path / name, 1 << 20)
        with enban.open(path, writable=True) as disk:
            for name, content in (("2", b"a"), ("3", b"b"), ("1", b"c")):
                disk.pwrite(content, 0)
                disk.create_snapshot(name)
        return path

    path = image("shown")
    for wanted, content in (("1", b"a"), ("2", b"b"), ("snapshot.name=1", b"c"), ("snapshot.id=3", b"c")):
        assert view(path, wanted)[:1] == content
        with enban.open(path, writable=True) as disk:
            disk.apply_snapshot(wanted)
            assert disk.pread(1, 0) == content
    for number, (wanted, gone) in enumerate((("1", "c"), ("snapshot.id=1", "a"), ("snapshot.name=3", "b"))):
        path = image(f"deleted{number}")
        with enban.open(path, writable=True) as disk:
            disk.delete_snapshot(wanted)
            left = {snapshot.name for snapshot in disk.snapshots}
        assert left == {"2", "3", "1"} - {{"a": "2", "b": "3", "c": "1"}[gone]}
    with (
        enban.open(path, writable=True) as disk,
        pytest.raises(UsageError, match=r"no snapshot 'snapshot\.id=x'"),
    ):
        disk.delete_snapshot("snapshot.id=x")


def test_formats_without_snapshots_say_so(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    with (
        enban.open(path, writable=True, format="raw") as disk,
        pytest.raises(UnsupportedOperationError, match="raw has no internal snapshots"),
    ):
        disk.create_snapshot("x")


def test_a_refcount_that_cannot_grow_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20, refcount_bits=1, cluster_size=4096)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"x" * 10000, 0)
        with pytest.raises(UnsupportedOperationError, match="refcount would exceed 1"):
            disk.create_snapshot("x")
        assert disk.pread(10000, 0) == b"x" * 10000
        disk.pwrite(b"y" * 100, 50000)
        assert disk.snapshots == []
    check_file(path)


def _prepared() -> tuple[bytes, dict[str, bytes], bytes]:
    """A small image with two snapshots: (its bytes, content of each snapshot, active content)."""
    storage = MemoryStorage(BLOCKING, empty_image(96 * 512, cluster_size=512))
    disk = Disk(drive(open_memory(storage)))
    disk.pwrite(b"a" * 9000, 0)
    disk.create_snapshot("one")
    one = disk.pread(disk.size, 0)
    disk.pwrite(b"b" * 9000, 5000)
    disk.create_snapshot("two")
    two = disk.pread(disk.size, 0)
    disk.pwrite(b"c" * 700, 512)
    active = disk.pread(disk.size, 0)
    disk.close()
    return bytes(storage.content), {"one": one, "two": two}, active


OPERATIONS = [
    ("create", "new"),
    ("apply", "one"),
    ("delete", "one"),
    ("delete", "two"),
]


def _do(disk: Disk, operation: str, name: str) -> None:
    if operation == "create":
        disk.create_snapshot(name)
    elif operation == "apply":
        disk.apply_snapshot(name)
    else:
        disk.delete_snapshot(name)


State = tuple[dict[str, bytes], bytes]  # the content of each snapshot, the active content


def _after(operation: str, name: str, kept: dict[str, bytes], active: bytes) -> State:
    if operation == "create":
        return {**kept, name: active}, active
    if operation == "apply":
        return kept, kept[name]
    return {other: content for other, content in kept.items() if other != name}, active


def _shown(image: bytes | bytearray) -> State:
    """Snapshots and active content as the independent reader sees them."""
    reader = Qcow2Reader(image)
    return {s.name: reader.read(snapshot=s.name) for s in reader.snapshots}, reader.read()


@pytest.mark.parametrize(("operation", "name"), OPERATIONS)
def test_a_crash_leaves_before_or_after(operation: str, name: str) -> None:
    image, kept, active = _prepared()
    log = WriteLog(MemoryStorage(BLOCKING, image))
    disk = Disk(drive(open_memory(log)))
    _do(disk, operation, name)
    disk.close()
    before, after = (kept, active), _after(operation, name, kept, active)
    replay = Replay(image, log.entries)
    random = Random(7)
    seen = set()
    states = 0
    for _ in replay.steps():
        for state in (replay.everything(), *replay.subsets(random, 20), replay.scattered(random)):
            check_bytes(state, leaks=True)
            shown = _shown(state)
            assert shown in (before, after)
            seen.add(shown == after)
            states += 1
    assert seen == {False, True}
    assert states > 50


class Watched:
    """A decision to fail the n-th change that remembers whether it did."""

    def __init__(self, index: int, number: int) -> None:
        self.decide = fail_at(index, errno=number)
        self.hit = False

    def __call__(self, call: Call) -> Fault | None:
        fault = self.decide(call)
        self.hit = self.hit or fault is not None
        return fault


@pytest.mark.parametrize(("operation", "name"), OPERATIONS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failing_call_changes_nothing(operation: str, name: str, number: int) -> None:
    image, kept, active = _prepared()
    before, after = (kept, active), _after(operation, name, kept, active)
    index = 0
    while True:
        index += 1
        storage = MemoryStorage(BLOCKING, image)
        fault = Watched(index, number)
        disk = Disk(drive(open_memory(Faults(storage, fault))))
        try:
            _do(disk, operation, name)
            failed = False
        except EnbanError:
            failed = True
        if disk.writable and disk.node.writable:
            assert disk.pread(disk.size, 0) == (active if failed else after[1])
        try:
            if disk.node.writable:
                disk.pwrite(b"z" * 600, 20000)
                disk.flush()
            disk.close()
        except EnbanError:
            failed = True
        check_bytes(storage.content, leaks=True)
        shown_kept, shown_active = _shown(storage.content)
        assert shown_kept in (before[0], after[0])
        assert shown_active[:20000] in (before[1][:20000], after[1][:20000])
        if not fault.hit:
            assert not failed
            break
    assert index > 10


def test_live_snapshots_under_asyncio_load(tmp_path: Path) -> None:
    """Tasks write while snapshots come and go; each snapshot holds, cluster by cluster, something that
    was written before it was complete, and never changes afterwards."""
    path = make_qcow2(tmp_path / "disk.qcow2", 64 * 4096, cluster_size=4096)

    async def scenario() -> dict[str, bytes]:
        random = Random(5)
        shown: dict[str, bytes] = {}
        async with await enban.aio.open(path, writable=True) as disk:
            stop = False
            newest = [0] * 64

            async def writer(lane: int) -> None:
                number = 0
                while not stop:
                    number += 1
                    cluster = lane * 8 + random.randrange(8)
                    await disk.pwrite(number.to_bytes(4, "big") * 1024, cluster * 4096)
                    newest[cluster] = number
                    await asyncio.sleep(0)

            writers = [asyncio.create_task(writer(lane)) for lane in range(8)]
            for turn in range(12):
                await asyncio.sleep(0.01)
                done_before = list(newest)
                await disk.create_snapshot(f"s{turn}")
                content = await asyncio.to_thread(_snapshot_bytes, path, f"s{turn}")
                shown[f"s{turn}"] = content
                for cluster in range(64):
                    words = {content[i : i + 4] for i in range(cluster * 4096, cluster * 4096 + 4096, 4)}
                    assert len(words) == 1  # a whole write, never a torn one
                    assert int.from_bytes(words.pop(), "big") >= done_before[cluster]
                if turn % 3 == 2:
                    await disk.delete_snapshot(f"s{turn - 1}")
                    del shown[f"s{turn - 1}"]
            stop = True
            await asyncio.gather(*writers)
        return shown

    shown = asyncio.run(scenario())
    check_file(path)
    for name, content in shown.items():
        assert view(path, name) == content


def _snapshot_bytes(path: Path, name: str) -> bytes:
    with Disk(drive(open_door(str(path), BLOCKING, snapshot_name=name, lock=False))) as disk:
        return disk.pread(disk.size, 0)


def test_huge_snapshot_tables_in_holes_take_no_memory(tmp_path: Path) -> None:
    """The snapshot table says 20 L1 tables of 32 MiB, in clusters of 512 bytes; all are holes."""
    import tracemalloc

    from enban.wire.qcow2_snapshots import SnapshotEntry, build_snapshots

    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20, cluster_size=512)
    entries = []
    for number in range(20):
        entry = SnapshotEntry()
        entry.id = entry.name = str(number)
        entry.disk_size = 1 << 20
        entry.l1_offset, entry.l1_entries = (number + 1) << 30, (32 << 20) // 8
        entries.append(entry)
    table = build_snapshots(entries)
    with path.open("r+b") as file:
        file.seek(60)
        file.write(len(entries).to_bytes(4, "big") + (1 << 20).to_bytes(8, "big"))
        file.seek(1 << 20)
        file.write(table)
        file.truncate(32 << 30)
    tracemalloc.start()
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"written", 0)
        disk.flush()
        assert disk.pread(7, 0) == b"written"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
