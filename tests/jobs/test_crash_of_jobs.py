"""Power cuts in jobs that write to two files: commit, stream, rebase. The disk reads the same throughout.

Every storage call of the job is recorded, of both files in one order; each file then loses its own
unflushed writes, whatever the other one loses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import enban
from enban.block.storage import Storage
from enban.catalog import Opener
from enban.filters.writelog import Entry, WriteLog
from enban.lab.crash_states import Replay
from enban.lab.images import Image
from enban.lab.qcow2_reader import Qcow2Reader
from enban.lab.workload import operations, perform

KIB = 1024


class Joined(WriteLog):
    """A write log that tells all storages' calls in one list."""

    def __init__(self, below: Storage, joint: list[tuple[str, Entry]]) -> None:
        super().__init__(below)
        self.joint = joint

    def _begin(self, kind: str, offset: int = 0, length: int = 0, data: bytes = b"") -> Entry:
        entry = super()._begin(kind, offset, length, data)
        self.joint.append((Path(self.name).name, entry))
        return entry


def record(monkeypatch: pytest.MonkeyPatch, job: Callable[[], object]) -> list[tuple[str, Entry]]:
    """The calls of a job to all files it writes."""
    joint: list[tuple[str, Entry]] = []
    original = Opener.open_storage

    async def logged(
        self: Opener, options: dict[str, Any], *, writable: bool, create: bool = False
    ) -> Storage:
        storage = await original(self, options, writable=writable, create=create)
        return Joined(storage, joint) if writable else storage

    with monkeypatch.context() as patch:
        patch.setattr(Opener, "open_storage", logged)
        job()
    return joint


def used(path: Path, size: int, seed: int, cluster: int, backing: str = "") -> None:
    """An image with some history."""
    options = {"cluster_size": str(cluster)}
    if backing:
        options |= {"backing_file": backing, "backing_fmt": "qcow2"}
    enban.create(path, "qcow2", options, size=size)
    image = Image("any", size, cluster_size=cluster)
    with enban.open(path, writable=True, format="qcow2") as disk:
        for operation in operations(image, seed, 20, resizes=False):
            perform(disk, operation)


def seen(files: dict[str, bytes], name: str) -> bytes:
    """What the chain that begins with a file shows."""
    reader = Qcow2Reader(files[name])
    report = reader.check()
    assert not report.corruptions, (name, report.corruptions[:3])
    below = seen(files, Path(reader.backing_name).name) if reader.backing_name else b""
    return reader.read(backing=below)


def explore(directory: Path, joint: list[tuple[str, Entry]], before: dict[str, bytes], seed: int) -> int:
    """States of the record: each shows what the disk showed before the job."""
    expected = seen(before, "top")
    random = Random(seed)
    replays = {name: Replay(content, []) for name, content in before.items()}
    states = 0
    for name, entry in joint:
        replays[name].take(entry)
        for _ in range(3):
            files = {name: bytes(replay.some(random)) for name, replay in replays.items()}
            assert seen(files, "top") == expected, f"after {name} {entry}"
            states += 1
    after = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert seen(after, "top") == expected
    return states


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("job", ["commit", "stream", "rebase"])
def test_power_cuts_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, seed: int) -> None:
    size = 48 * KIB
    used(tmp_path / "base", size, 100 + seed, 1024)
    used(tmp_path / "other", size, 200 + seed, 1024)
    used(tmp_path / "top", size, 300 + seed, 512, "base")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    jobs: dict[str, Callable[[], object]] = {
        "commit": lambda: enban.commit(str(tmp_path / "top")),
        "stream": lambda: enban.stream(str(tmp_path / "top")),
        "rebase": lambda: enban.rebase(str(tmp_path / "top"), "other", "qcow2"),
    }
    joint = record(monkeypatch, jobs[job])
    assert len(joint) > 10, "the job wrote next to nothing"
    assert explore(tmp_path, joint, before, seed) > 30


def test_a_commit_without_flushes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument: the base is not flushed before the overlay is emptied."""
    used(tmp_path / "base", 48 * KIB, 1, 1024)
    used(tmp_path / "top", 48 * KIB, 2, 512, "base")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    joint = record(monkeypatch, lambda: enban.commit(str(tmp_path / "top")))
    joint = [(name, entry) for name, entry in joint if not (name == "base" and entry.kind == "flush")]
    with pytest.raises(AssertionError):
        explore(tmp_path, joint, before, 1)
