"""Promise 2: a failed write changes nothing, and work goes on when the fault is gone.

The lab's fault walker (`enban.lab.faultwalk`) makes each storage call of a workload fail in turn,
in each way it can, and judges what follows. Here it walks over a fixed part of the space.
"""

from __future__ import annotations

import errno

import pytest

from enban.errors import HostError
from enban.filters import faults
from enban.lab.faultwalk import KINDS, WAYS, Walk, walk, walk_failing_flush, walk_sizes
from enban.lab.images import IMAGES, Image, pattern
from enban.lab.workload import prepare
from tests.support import check_bytes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("image", KINDS, ids=repr)
def test_each_call_fails_once(image: Image, way: str) -> None:
    calls, errors = walk(image, 1, way)
    if way in ("EIO", "ENOSPC", "full", "torn"):
        assert calls > 10 and errors > 5, "the workload does not reach the storage often enough"
    if way == "slow":
        assert calls > 10 and not errors


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 30))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("image", KINDS, ids=repr)
def test_each_call_fails_once_long(image: Image, way: str, seed: int) -> None:
    walk(image, seed, way)


@pytest.mark.parametrize("image", IMAGES, ids=repr)
def test_a_full_disk_at_every_size(image: Image) -> None:
    assert walk_sizes(image, 3, range(64)) > 2


@pytest.mark.parametrize("image", KINDS, ids=repr)
def test_a_flush_that_keeps_failing_is_never_called_a_success(image: Image) -> None:
    assert sum(walk_failing_flush(image, 4, index) for index in range(1, 12)) > 1


def test_a_failed_write_of_every_size_leaves_neighbours_alone() -> None:
    """The cluster around a failed partial write still shows its backing file."""
    backing = pattern(16 * 1024, 9)
    image = Image("4k", 16 * 1024, cluster_size=4096, backing=backing)
    start = prepare(image, 0)
    guest = start[2]
    for index in range(1, 4):
        here = Walk(image, 0, start)
        here.aim(faults.fail_at(index, operations=(faults.WRITE,), errno=errno.ENOSPC))
        for at in range(100, 16000, 4096):
            before = here.disk.pread(16384, 0)
            try:
                here.disk.pwrite(b"x" * 10, at)
            except HostError as error:
                assert error.errno == errno.ENOSPC
                assert here.disk.pread(16384, 0) == before
        here.aim(None)
        here.disk.close()
        check_bytes(here.memory.content, leaks=True)
    assert len(guest) == 16384
