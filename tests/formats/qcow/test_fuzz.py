"""Images with bytes changed at random: data, or one clear line; never another exception, never a hang."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from enban.block.codec import deflater
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.errors import EnbanError, UnsupportedFeatureError
from enban.formats.qcow.check import check_image
from enban.formats.qcow.opening import open_qcow
from enban.storage.memory import MemoryStorage
from tests.qcow_support import memory_qcow, open_disk
from tests.support import KIB, MIB, pattern, raw_node


def sample() -> bytes:
    storage = memory_qcow(300 * KIB, cluster_size=1024, l2_entries=64, backing_file="base")
    disk = open_disk(storage, backing=raw_node(pattern(100 * KIB)))
    disk.pwrite(pattern(20_000), 700)
    for number in range(100, 120):
        disk.write_packed(deflater("zlib")(bytes([number]) * 1024), number * 1024)
    disk.pwrite(pattern(3000), 250 * KIB)
    disk.close()
    return bytes(storage.content)


IMAGE = sample()
INTERESTING = [
    0,
    1,
    8,
    48,
    511,
    512,
    1024,
    4096,
    len(IMAGE) - 1,
    len(IMAGE),
    1 << 31,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
]
_numbers = st.one_of(
    st.sampled_from(INTERESTING), st.integers(0, len(IMAGE) + 1024), st.integers(0, (1 << 64) - 1)
)
# Fields of the header, entries of the L1 table and of the first L2 table, any eight bytes.
_places = st.one_of(
    st.sampled_from([8, 16, 20, 24, 32, 36, 40]),
    st.integers(0, 5).map(lambda n: 56 + n * 8),
    st.integers(0, 64).map(lambda n: 1024 + n * 8),
    st.integers(0, len(IMAGE) - 8),
)
_changes = st.lists(st.tuples(_places, _numbers, st.sampled_from([1, 4, 8])), min_size=1, max_size=4)


def use(disk: Disk) -> None:
    size = disk.size
    for offset in (0, 100 * KIB, 249 * KIB, size // 2, max(0, size - 3000)):
        length = max(0, min(3000, size - offset))
        for act in (disk.pread, lambda n, at: disk.pwrite(b"\xab" * n, at), disk.pread):
            try:
                act(length, offset)
            except EnbanError as error:
                assert "\n" not in str(error)
    calls: list[Callable[[], object]] = [
        lambda: disk.write_zeroes(0, min(size, 50 * KIB)),
        lambda: disk.discard(0, min(size, 50 * KIB)),
        lambda: sum(extent.length for extent in disk.map(0, min(size, MIB))),
        disk.flush,
        lambda: disk.resize(min(size, MIB) // 512 * 512 + 512),
        lambda: drive(disk.node.set_backing("other")),
        disk.close,
    ]
    for call in calls:
        try:
            call()
        except EnbanError as error:
            assert "\n" not in str(error)


@given(changes=_changes, cut=st.one_of(st.none(), st.integers(0, len(IMAGE))))
def test_changed_images(changes: list[tuple[int, int, int]], cut: int | None) -> None:
    image = bytearray(IMAGE)
    for place, number, width in changes:
        image[place : place + width] = number.to_bytes(8, "big")[8 - width :]
    storage = MemoryStorage(BLOCKING, image[:cut], limit=64 * MIB)
    try:
        node = drive(open_qcow("image", BLOCKING, storage, writable=True, metadata_only=True))
    except EnbanError as error:
        assert str(error).startswith("image: ") and "\n" not in str(error)
        return
    result = drive(check_image(node))
    assert len(result.findings) <= 100
    assert bytes(storage.content) == image[:cut]
    try:
        disk = open_disk(storage, backing=raw_node(pattern(100 * KIB)), passphrase=b"x")
    except UnsupportedFeatureError as error:  # encrypted now, and the package for it is not there
        assert "cryptography" in str(error)
    else:
        use(disk)
