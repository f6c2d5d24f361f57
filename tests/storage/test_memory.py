"""Memory as a storage: it grows, reads zeros behind its end, and has a limit."""

from __future__ import annotations

import pytest

from enban.block.runtime import BLOCKING, drive
from enban.errors import NoSpaceError
from enban.storage.memory import MemoryStorage


def test_it_is_a_run_of_bytes() -> None:
    storage = MemoryStorage(BLOCKING, b"abc")
    drive(storage.write(b"xyz", 6))
    assert storage.content == b"abc\0\0\0xyz" and storage.size() == 9
    assert drive(storage.read(7, 5)) == b"yz\0\0\0"
    assert drive(storage.read(100, 2)) == b"\0\0"
    drive(storage.write_zeroes(1, 6))
    drive(storage.truncate(8))
    drive(storage.truncate(12))
    assert storage.content == b"a\0\0\0\0\0\0y\0\0\0\0"
    buffer = bytearray(b"\xff" * 4)
    assert storage.read_now(buffer, 6) and buffer == b"\0y\0\0"
    drive(storage.flush())
    drive(storage.close())


def test_a_limit_refuses_growth_and_changes_nothing() -> None:
    storage = MemoryStorage(BLOCKING, b"abc", limit=10)
    for change in (storage.write(b"0123456789", 1), storage.truncate(11), storage.write_zeroes(5, 6)):
        with pytest.raises(NoSpaceError):
            drive(change)
        assert storage.content == b"abc"
    drive(storage.write(b"0123456789", 0))
    assert storage.size() == 10


def test_two_are_never_the_same_disk() -> None:
    one, two = MemoryStorage(BLOCKING), MemoryStorage(BLOCKING)
    assert one.identity != two.identity == two.identity
