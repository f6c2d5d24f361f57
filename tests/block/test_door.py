"""The door: ranges, permission, closed disks, one end for each request, and changes of the size."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

import enban
from enban.aio import AsyncDisk, AsyncioRuntime
from enban.block.door import Door
from enban.block.runtime import BLOCKING, drive
from enban.errors import ClosedError, CorruptImageError, HostError, OutOfRangeError, ReadOnlyError, UsageError
from enban.filters import faults
from enban.filters.delay import Delay
from enban.filters.faults import Faults
from enban.formats.raw import RawNode
from enban.storage.memory import MemoryStorage
from tests.support import KIB, Face, check_bytes, empty_image, open_memory, pattern


async def make(face: Face, size: int = 64 * KIB, *, writable: bool = True) -> Door:
    return await open_memory(
        MemoryStorage(face.runtime(), empty_image(size, cluster_size=4096)), writable=writable
    )


def test_ranges_are_checked_before_anything_else(face: Face) -> None:
    async def scenario() -> None:
        disk = face.disk(await make(face))
        size = disk.size
        for offset, length in ((-1, 1), (size, 1), (size - 1, 2), (0, size + 1), (1 << 62, 1)):
            with pytest.raises(OutOfRangeError):
                await disk.pwrite(bytes(min(length, size + 1)), offset)
            for call in (disk.discard, disk.write_zeroes):
                with pytest.raises(OutOfRangeError):
                    await call(offset, length)
            with pytest.raises(OutOfRangeError):
                await disk.pread(length, offset)
        with pytest.raises(OutOfRangeError):
            await disk.pread(-5, 10)
        assert disk.door.ledger.started == 0
        await disk.close()

    face.run(scenario())


def test_nothing_of_nothing_is_allowed_everywhere(face: Face) -> None:
    async def scenario() -> None:
        disk = face.disk(await make(face))
        for offset in (0, 777, disk.size):
            assert await disk.pread(0, offset) == b""
            assert await disk.pwrite(b"", offset) == 0
            await disk.write_zeroes(offset, 0)
            await disk.discard(offset, 0)
        await disk.close()

    face.run(scenario())


def test_a_read_only_disk_is_never_written(face: Face) -> None:
    async def scenario() -> bytearray:
        door = await make(face, writable=False)
        memory = door.node.file
        assert isinstance(memory, MemoryStorage)
        before = bytes(memory.content)
        disk = face.disk(door)
        for call in (
            disk.pwrite(b"x", 0),
            disk.write_zeroes(0, 512),
            disk.discard(0, 4096),
            disk.resize(4096),
        ):
            with pytest.raises(ReadOnlyError):
                await call
        await disk.flush()
        assert await disk.pread(512, 0) == bytes(512)
        await disk.close()
        assert memory.content == before
        return memory.content

    face.run(scenario())


def test_a_closed_disk_says_so_and_closing_twice_is_fine(face: Face) -> None:
    async def scenario() -> None:
        disk = face.disk(await make(face))
        await disk.pwrite(b"x", 0)
        await disk.close()
        await disk.close()
        for call in (
            disk.pread(1, 0),
            disk.pwrite(b"x", 0),
            disk.flush(),
            disk.discard(0, 1),
            disk.resize(0),
        ):
            with pytest.raises(ClosedError):
                await call

    face.run(scenario())


def test_unaligned_access_of_every_kind(face: Face) -> None:
    async def scenario() -> None:
        disk = face.disk(await make(face, 20000 // 512 * 512))
        model = bytearray(disk.size)
        for number, (offset, length) in enumerate(
            ((1, 1), (4095, 2), (511, 513), (8191, 4098), (0, disk.size), (17, 9000), (disk.size - 1, 1))
        ):
            data = pattern(length, number + 1)
            assert await disk.pwrite(data, offset) == length
            model[offset : offset + length] = data
            assert await disk.pread(disk.size, 0) == model
        await disk.write_zeroes(4000, 5000)
        model[4000:9000] = bytes(5000)
        buffer = bytearray(100)
        assert await disk.readinto(buffer, 3950) == 100
        assert buffer == model[3950:4050]
        assert await disk.pread(disk.size, 0) == model
        await disk.close()

    face.run(scenario())


def test_buffers_of_other_item_sizes_count_in_bytes(face: Face) -> None:
    from array import array

    async def scenario() -> None:
        disk = face.disk(await make(face))
        numbers = array("Q", range(1, 101))
        assert await disk.door.write(numbers, 8) is None  # type: ignore[arg-type, func-returns-value]
        back = array("Q", bytes(800))
        await disk.door.read_into(back, 8)  # type: ignore[arg-type]
        assert back == numbers
        await disk.close()

    face.run(scenario())


def test_a_failed_request_ends_as_failed() -> None:
    memory = MemoryStorage(BLOCKING, empty_image(64 * KIB, cluster_size=4096))
    storage = Faults(memory)
    door = drive(open_memory(storage))
    disk = enban.Disk(door)
    storage.decide = faults.fail_at(1, operations=(faults.WRITE,), sticky=True)
    with pytest.raises(HostError):
        disk.pwrite(b"x" * 10, 5)
    assert (door.ledger.failed, door.ledger.done, len(door.ledger.in_flight)) == (1, 0, 0)
    storage.decide = None
    disk.close()


def test_a_request_ends_even_if_marking_the_image_corrupt_fails() -> None:
    """The L2 table points outside the file; setting the corrupt bit fails as well."""
    image = empty_image(64 * KIB, cluster_size=4096)
    l1 = int.from_bytes(image[40:48], "big")
    image[l1 : l1 + 8] = ((1 << 63) | (1 << 40)).to_bytes(8, "big")
    storage = Faults(MemoryStorage(BLOCKING, image))
    disk = enban.Disk(drive(open_memory(storage)))
    storage.decide = faults.fail_at(1)
    with pytest.raises(HostError):
        disk.pread(1, 0)
    assert not disk.door.ledger.in_flight
    storage.decide = None
    disk.close()


def test_writethrough_flushes_each_change() -> None:
    storage = Faults(MemoryStorage(BLOCKING, empty_image(64 * KIB, cluster_size=4096)))
    node = drive(open_memory(storage)).node
    disk = enban.Disk(Door(node, writable=True, writethrough=True))
    flushes: list[int] = []
    storage.decide = lambda call: flushes.append(1) if call.operation == faults.FLUSH else None
    changes: tuple[Callable[[], object], ...] = (
        lambda: disk.pwrite(b"x", 0),
        lambda: disk.pwrite(b"y", 0),
        lambda: disk.write_zeroes(0, 4096),
        lambda: disk.discard(0, 4096),
    )
    for number, change in enumerate(changes):
        before = len(flushes)
        change()
        assert len(flushes) > before, number
    disk.close()


def test_fua_is_durable_on_return() -> None:
    storage = Faults(MemoryStorage(BLOCKING, empty_image(64 * KIB, cluster_size=4096)))
    disk = enban.Disk(drive(open_memory(storage)))
    disk.pwrite(b"x" * 9000, 100, fua=True)
    guest_image = storage.below
    assert isinstance(guest_image, MemoryStorage)
    copy = enban.Disk(drive(open_memory(MemoryStorage(BLOCKING, guest_image.content), writable=False)))
    assert copy.pread(9000, 100) == b"x" * 9000
    disk.close()


# -- resize beside other requests ------------------------------------------------------------


def test_requests_wait_while_the_size_changes() -> None:
    async def scenario() -> None:
        runtime = AsyncioRuntime(2)
        memory = MemoryStorage(runtime, empty_image(256 * KIB, cluster_size=512))
        disk = AsyncDisk(await open_memory(Delay(memory, 3, most_s=0.001)), runtime)
        model = bytearray(256 * KIB)
        for round_number in range(6):
            size = (256 if round_number % 2 else 1024) * KIB
            writes = []
            for number in range(40):
                at = (number * 6007 + round_number) % (250 * KIB) // 64 * 64
                data = bytes([round_number * 40 + number + 1 & 255]) * 64
                writes.append((at, data, asyncio.create_task(disk.pwrite(data, at))))
            resize = asyncio.create_task(disk.resize(size))
            later = [asyncio.create_task(disk.pread(64, at)) for at, _, _ in writes]
            await resize
            assert disk.size == size
            await asyncio.gather(*(task for _, _, task in writes), *later)
            for at, data, _ in writes:
                model[at : at + 64] = data
            for (_, data, _), seen in zip(writes, later, strict=True):
                assert len(seen.result()) == len(data)
            assert await disk.pread(250 * KIB, 0) == model[: 250 * KIB]
        assert not disk.door.ledger.in_flight and not disk.door.ledger.failed
        await disk.close()
        check_bytes(memory.content)

    asyncio.run(scenario())


def test_a_request_that_waited_for_a_shrink_is_refused_if_its_range_is_gone() -> None:
    async def scenario() -> None:
        runtime = AsyncioRuntime(2)
        memory = MemoryStorage(runtime, empty_image(256 * KIB, cluster_size=4096))
        disk = AsyncDisk(await open_memory(Delay(memory, 4, most_s=0.001)), runtime)
        await disk.pwrite(b"x" * 4096, 200 * KIB)
        resize = asyncio.create_task(disk.resize(64 * KIB))
        await asyncio.sleep(0)
        late = asyncio.create_task(disk.pwrite(b"late", 200 * KIB))
        inside = asyncio.create_task(disk.pwrite(b"inside", 100))
        await resize
        with pytest.raises(OutOfRangeError):
            await late
        await inside
        ledger = disk.door.ledger
        assert ledger.started == ledger.done + ledger.failed and not ledger.in_flight
        await disk.close()
        check_bytes(memory.content)

    asyncio.run(scenario())


def test_cancelled_while_waiting_for_a_resize() -> None:
    async def scenario() -> None:
        runtime = AsyncioRuntime(2)
        memory = MemoryStorage(runtime, empty_image(256 * KIB, cluster_size=4096))
        disk = AsyncDisk(await open_memory(Delay(memory, 4, most_s=0.001)), runtime)
        resize = asyncio.create_task(disk.resize(512 * KIB))
        await asyncio.sleep(0)
        parked = [asyncio.create_task(disk.pwrite(b"x", n)) for n in range(5)]
        await asyncio.sleep(0)
        for task in parked[:3]:
            task.cancel()
        await resize
        done = await asyncio.gather(*parked, return_exceptions=True)
        assert [type(r).__name__ for r in done] == ["CancelledError"] * 3 + ["int"] * 2
        assert not disk.door.ledger.in_flight and not disk.door.resizing.held
        await disk.close()
        check_bytes(memory.content)

    asyncio.run(scenario())


def test_threads_resize_and_write() -> None:
    memory = MemoryStorage(BLOCKING, empty_image(128 * KIB, cluster_size=512))
    disk = enban.Disk(drive(open_memory(memory)))
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for turn in range(150):
                disk.pwrite(bytes([number + 1]) * 700, (number * 31 + turn) % 180 * 700)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        disk.resize((128 + 64 * (turn % 3)) * KIB)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors, errors[0]
    disk.close()
    check_bytes(memory.content)


# -- damage found while running --------------------------------------------------------------


def damaged() -> tuple[MemoryStorage, enban.Disk]:
    """An image of two L2 tables, the second of which points its data at the header."""
    memory = MemoryStorage(BLOCKING, empty_image(256 * KIB, cluster_size=512))
    disk = enban.Disk(drive(open_memory(memory)))
    disk.pwrite(b"a" * 512, 0)
    disk.pwrite(b"b" * 512, 40 * KIB)
    disk.close()
    image = memory.content
    l1 = int.from_bytes(image[40:48], "big")
    table = int.from_bytes(image[l1 + 8 : l1 + 16], "big") & ((1 << 56) - 1)
    for entry in range(table, table + 512, 8):
        if int.from_bytes(image[entry : entry + 8], "big") & ((1 << 62) - 1):
            image[entry : entry + 8] = ((1 << 63) | 512).to_bytes(8, "big")  # the refcount table
    memory = MemoryStorage(BLOCKING, image)
    return memory, enban.Disk(drive(open_memory(memory)))


def test_found_damage_stops_all_writing_and_is_marked_first() -> None:
    memory, disk = damaged()
    disk.pwrite(b"c" * 1024, 0)  # the second half takes new space
    with pytest.raises(CorruptImageError) as info:
        disk.pwrite(b"d" * 512, 40 * KIB)
    assert "metadata" in str(info.value) and info.value.path
    assert int.from_bytes(memory.content[72:80], "big") & 2, "the corrupt bit is not set"
    before = bytes(memory.content)
    for change in (
        lambda: disk.pwrite(b"e" * 512, 0),  # in place, by the short cut
        lambda: disk.pwrite(b"e" * 512, 100 * KIB),
        lambda: disk.write_zeroes(0, 512),
        lambda: disk.discard(0, 512),
        lambda: disk.resize(512 * KIB),
        lambda: disk.flush(),  # not a success: what was written is not durable
    ):
        with pytest.raises(CorruptImageError):
            change()
    assert disk.pread(512, 0) == b"c" * 512
    assert memory.content == before
    with pytest.raises(CorruptImageError):
        disk.close()  # the write before was never flushed
    with pytest.raises(CorruptImageError, match="marked corrupt"):
        drive(open_memory(MemoryStorage(BLOCKING, memory.content)))
    reader = enban.Disk(drive(open_memory(MemoryStorage(BLOCKING, memory.content), writable=False)))
    assert len(reader.pread(512, 0)) == 512


def test_damage_in_a_read_only_image_marks_nothing() -> None:
    memory, disk = damaged()
    disk.close()
    before = bytes(memory.content)
    reader = enban.Disk(drive(open_memory(memory, writable=False)))
    reader.pread(reader.size, 0)
    reader.close()
    assert memory.content == before


def test_usage_errors_do_not_pass() -> None:
    memory = MemoryStorage(BLOCKING, empty_image(64 * KIB, cluster_size=4096))
    disk = enban.Disk(drive(open_memory(memory)))
    with pytest.raises(UsageError):
        disk.resize(-512)
    with pytest.raises(UsageError):
        disk.resize(1000)
    with pytest.raises(UsageError):
        drive(disk.door.write_packed(b"x", 100))
    with pytest.raises(OutOfRangeError):
        drive(disk.door.write_packed(b"x", disk.size))
    with pytest.raises(UsageError):
        drive(disk.door.write_packed(b"x" * 4096, 0))
    raw = enban.Disk(
        Door(RawNode("r", BLOCKING, MemoryStorage(BLOCKING, bytes(4096)), writable=True), writable=True)
    )
    with pytest.raises(UsageError):
        drive(raw.door.write_packed(b"x", 0))
    disk.close()


def test_going_back_to_a_snapshot_does_not_wait_for_a_batch_that_waits_for_it() -> None:
    """A server's batch stays in the ledger while one of its requests is held up at the door."""
    disk = enban.Disk(drive(open_memory(MemoryStorage(BLOCKING, empty_image(64 * KIB, cluster_size=4096)))))
    disk.create_snapshot("then")
    door = disk.door
    batch = door.ledger.begin_batch()
    held = drive(door.node.ranges.acquire(0, 4096))  # so that the door is still paused when the write comes
    back = threading.Thread(target=disk.apply_snapshot, args=("then",))
    back.start()
    while not door.paused:
        pass
    write = threading.Thread(target=disk.pwrite, args=(b"late", 0))
    write.start()
    door.node.ranges.release(held)
    write.join(30)
    assert not write.is_alive()
    door.ledger.end_batch(batch, 0)
    back.join(30)
    assert not back.is_alive() and disk.pread(4, 0) == b"late"
    disk.close()
