"""Random histories of a disk, on both faces, against a plain model: a bytearray.

What all formats have in common: the requests, and what must hold after each. The machine of a format makes
the image and its chain, then says `begin`; it knows how to open the image, and who looks through it after
each closing.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import enban
from enban.block.codec import deflater
from enban.extent import UNALLOCATED, ZERO
from tests.support import FACES, KIB, AnyDisk, BlockingFace, Face, pattern

T = TypeVar("T")


class Histories(RuleBasedStateMachine):
    """One image, its model, and whichever face holds it open at the moment.

    cluster: bytes. may_pack: whether compressed clusters can be written.
    """

    cluster: int
    may_pack = True

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="enban-stateful-"))
        self.loop = asyncio.new_event_loop()
        self.disk: AnyDisk | None = None
        self.writes = 0

    def begin(self, image: str, chain: str, face: Face, size: int, backing: bytes) -> None:
        """The image is made; backing: what the one below it holds."""
        note(f"image {image}, chain {chain}, {face} face")
        self.face = face
        self.backing = backing
        self.model = bytearray(backing[:size].ljust(size, b"\0"))
        self._open()

    def reference(self) -> str | Path | dict[str, Any]:
        """What is opened."""
        raise NotImplementedError

    def look_through(self) -> None:
        """The image is closed: an independent reader must find it sound and see the model's bytes."""
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        if isinstance(self.face, BlockingFace):
            return self.face.run(work)
        return self.loop.run_until_complete(work)

    @property
    def open(self) -> AnyDisk:
        assert self.disk is not None
        return self.disk

    def _open(self) -> None:
        self.disk = self.run(self.face.open(self.reference(), writable=True, cache="unsafe"))
        assert self.open.node.runtime.blocking is isinstance(self.face, BlockingFace)

    def _close(self) -> None:
        if self.disk is not None:
            self.run(self.disk.close())
            self.disk = None
            self.look_through()

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        offset, length = self._range(data)
        self.writes += 1
        content = pattern(length, self.writes)
        self.run(self.open.pwrite(content, offset))
        self.model[offset : offset + length] = content

    @rule(data=st.data(), unmap=st.booleans())
    def zero(self, data: st.DataObject, unmap: bool) -> None:
        offset, length = self._range(data)
        self.run(self.open.write_zeroes(offset, length, unmap=unmap))
        self.model[offset : offset + length] = bytes(length)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        offset, length = self._range(data)
        self.run(self.open.discard(offset, length))
        end = offset + length
        for at in range(offset // 512 * 512, end, 512):  # each sector: zeros or as before, outside as before
            first, last = max(at, offset), min(at + 512, end)
            seen = self.run(self.open.pread(last - first, first))
            assert seen in (bytes(last - first), self.model[first:last]), f"sector at {at:#x}"
            self.model[first:last] = seen

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        offset, length = self._range(data)
        assert self.run(self.open.pread(length, offset)) == self.model[offset : offset + length]

    @precondition(lambda self: self.may_pack)
    @rule(data=st.data())
    def write_packed(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, (len(self.model) - 1) // self.cluster)) * self.cluster
        self.writes += 1
        content = pattern(self.cluster // 4, self.writes).ljust(self.cluster, b"\x5a")
        packed = deflater(self.open.node.codec)(content)
        if len(packed) < self.cluster:
            self.run(self.open.door.write_packed(packed, at))
            self.model[at : at + self.cluster] = content[: len(self.model) - at]

    @rule()
    def flush(self) -> None:
        self.run(self.open.flush())

    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(1, 3 * len(self.model) // 1024 + 8)) * 512
        self.run(self.open.resize(size))
        assert self.open.size == size
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    @rule(face=st.sampled_from(FACES))
    def reopen(self, face: Face) -> None:
        self._close()
        self.face = face
        self._open()

    @rule()
    def read_whole_and_map(self) -> None:
        async def extents() -> list[tuple[int, int, int]]:
            return [(e.start, e.length, e.kind) async for e in self.open.map()]

        assert self.run(self.open.pread(len(self.model), 0)) == self.model
        at = 0
        for start, length, kind in self.run(extents()):
            assert start == at and length > 0
            if kind in (ZERO, UNALLOCATED):
                assert not any(self.model[start : start + length])
            at += length
        assert at == len(self.model)

    @invariant()
    def nothing_is_left_over(self) -> None:
        if self.disk is None:
            return
        ledger, node = self.disk.door.ledger, self.disk.node
        assert ledger.started == ledger.done and not ledger.in_flight
        assert not len(node.ranges)

    def _range(self, data: st.DataObject) -> tuple[int, int]:
        size = len(self.model)
        unit = data.draw(st.sampled_from((1, 512, self.cluster)))
        offset = min(data.draw(st.integers(0, size // unit)) * unit, size - 1)
        most = min(size - offset, 12 * self.cluster)
        length = data.draw(st.integers(1, max(1, most // unit))) * unit
        return offset, min(length, most)

    def finish(self) -> None:
        """A last look, after the last closing."""

    def teardown(self) -> None:
        try:
            if self.disk is not None:
                self._close()
                self.finish()
        finally:
            self.loop.close()
            shutil.rmtree(self.directory)


def content_below(size: int, *, long: bool) -> bytes:
    """What the image below a disk of this size holds: half of it, or more than all."""
    return pattern(size + 40 * KIB if long else size // 2 // 512 * 512 + 512, 7)


def fill(image: Path, content: bytes) -> bytes:
    """Write half of a content to an image, in parts; what the image reads as then."""
    with enban.open(image, writable=True, cache="unsafe") as disk:
        for at in range(0, len(content), 6000):
            disk.pwrite(content[at : at + 3000], at)
        return disk.pread(disk.size, 0)
