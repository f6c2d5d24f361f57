"""What the tests of qcow (version 1) share: images in files and in memory, sound or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from enban.block.disk import Disk
from enban.block.door import Door
from enban.block.node import Node
from enban.block.runtime import BLOCKING, drive
from enban.block.storage import Storage
from enban.formats.qcow.create import QcowOptions, write_empty
from enban.formats.qcow.opening import open_qcow
from enban.lab.qcow_reader import QcowReader
from enban.storage.file import open_file
from enban.storage.memory import MemoryStorage

Test = TypeVar("Test", bound=Callable[..., object])

PASSPHRASE = b"correct horse battery"  # longer than a key: it is cut


def have_cryptography() -> bool:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        return False
    return True


needs_cryptography = pytest.mark.skipif(
    not have_cryptography(), reason="the Python package cryptography is missing (pip install 'enban[crypto]')"
)


def make_qcow(path: str | Path, size: int, **options: Any) -> Path:
    """A new empty qcow file made by enban; `options` as for QcowOptions."""
    file = open_file(str(path), BLOCKING, writable=True, create=True)
    drive(write_empty(file, QcowOptions(size, **options).header()))
    drive(file.close())
    return Path(path)


def memory_qcow(size: int, **options: Any) -> MemoryStorage:
    """A new empty qcow image in memory."""
    storage = MemoryStorage(BLOCKING)
    drive(write_empty(storage, QcowOptions(size, **options).header()))
    return storage


async def open_storage(
    storage: Storage, *, backing: Node | None = None, writable: bool = True, passphrase: bytes | None = None
) -> Door:
    """A door to the qcow image in a storage (of any runtime)."""
    node = await open_qcow(
        storage.name, storage.runtime, storage, writable=writable, passphrase=lambda: passphrase
    )
    node.backing = backing
    return Door(node, writable=writable)


def open_disk(storage: Storage, **options: Any) -> Disk:
    return Disk(drive(open_storage(storage, **options)))


def check_sound(image: bytes | bytearray) -> QcowReader:
    """The independent reader finds nothing wrong with the tables."""
    reader = QcowReader(image)
    assert not reader.problems(), reader.problems()[:5]
    return reader
