"""Random histories of a qcow disk, on both faces, against a plain model: a bytearray.

After each reopening the independent reader looks through the tables and must see the model's
bytes; of encrypted images it can only check the tables.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import enban
from enban.block.codec import deflater
from enban.extent import UNALLOCATED, ZERO
from tests.qcow_support import PASSPHRASE, check_sound, have_cryptography, make_qcow
from tests.support import FACES, KIB, AnyDisk, BlockingFace, Face, make_qcow2, pattern

T = TypeVar("T")

AES: dict[str, Any] = {"encrypt_format": "aes"}
# (name, creation options, virtual size).
IMAGES: list[tuple[str, dict[str, Any], int]] = [
    ("512x64", {"cluster_size": 512, "l2_entries": 64}, 41 * KIB + 512),
    ("512x4096", {"cluster_size": 512, "l2_entries": 4096}, 60 * KIB),
    ("4k", {}, 201 * KIB + 512),
    ("4k-spread", {"l2_entries": 64}, 1300 * KIB),
    ("64k", {"cluster_size": 65536, "l2_entries": 8192}, 401 * KIB),
    ("512-aes", {"cluster_size": 512, "l2_entries": 64, **AES}, 40 * KIB),
    ("4k-aes", AES, 150 * KIB + 512),
]
CHAINS = ("alone", "raw-short", "raw-long", "qcow2", "qcow")


class QcowMachine(RuleBasedStateMachine):
    """One image, its model, and whichever face holds it open at the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="enban-qcow-"))
        self.path = self.directory / "top.qcow"
        (self.directory / "key").write_bytes(PASSPHRASE)
        self.loop = asyncio.new_event_loop()
        self.disk: AnyDisk | None = None
        self.writes = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        if isinstance(self.face, BlockingFace):
            return self.face.run(work)
        return self.loop.run_until_complete(work)

    @property
    def open(self) -> AnyDisk:
        assert self.disk is not None
        return self.disk

    @initialize(
        image=st.sampled_from([i for i in IMAGES if have_cryptography() or "encrypt_format" not in i[1]]),
        chain=st.sampled_from(CHAINS),
        face=st.sampled_from(FACES),
    )
    def create(self, image: tuple[str, dict[str, Any], int], chain: str, face: Face) -> None:
        name, options, size = image
        note(f"image {name}, chain {chain}, {face} face")
        self.options, self.face = options, face
        self.cluster = options.get("cluster_size", 4096)
        self.backing = self._make_chain(chain, size)
        below = {"backing_file": "base"} if chain != "alone" else {}
        make_qcow(self.path, size, **{"cluster_size": 4096, "l2_entries": 512, **options, **below})
        self.model = bytearray(self.backing[:size].ljust(size, b"\0"))
        self._open()

    def _make_chain(self, chain: str, size: int) -> bytes:
        if chain == "alone":
            return b""
        base = self.directory / "base"
        content = pattern(size + 40 * KIB if chain == "raw-long" else size // 2 // 512 * 512 + 512, 7)
        if chain.startswith("raw"):
            base.write_bytes(content)
            return content
        if chain == "qcow2":
            make_qcow2(base, len(content), cluster_size=1024)
        else:
            make_qcow(base, len(content), cluster_size=1024, l2_entries=64)
        with enban.open(base, writable=True, cache="unsafe") as disk:
            for at in range(0, len(content), 6000):
                disk.pwrite(content[at : at + 3000], at)
            return disk.pread(disk.size, 0)

    def _open(self) -> None:
        reference: dict[str, Any] = {"driver": "qcow", "file": {"filename": str(self.path)}}
        if "encrypt_format" in self.options:
            reference["encrypt"] = {"key-file": str(self.directory / "key")}
        self.disk = self.run(self.face.open(reference, writable=True, cache="unsafe"))

    def _close(self) -> None:
        if self.disk is not None:
            self.run(self.disk.close())
            self.disk = None
            reader = check_sound(self.path.read_bytes())
            if "encrypt_format" not in self.options:
                assert reader.read(self.backing) == self.model

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

    @precondition(lambda self: "encrypt_format" not in self.options)
    @rule(data=st.data())
    def write_packed(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, (len(self.model) - 1) // self.cluster)) * self.cluster
        self.writes += 1
        content = pattern(self.cluster // 4, self.writes).ljust(self.cluster, b"\x5a")
        packed = deflater("zlib")(content)
        if len(packed) < self.cluster:
            self.run(self.open.door.write_packed(packed, at))
            self.model[at : at + self.cluster] = content[: len(self.model) - at]

    @rule(data=st.data())
    def several_at_once(self, data: st.DataObject) -> None:
        """Requests to ranges that do not meet, of which some share a cluster."""
        size = len(self.model)
        cuts = sorted({data.draw(st.integers(0, size - 1)) for _ in range(5)})
        ranges = [(a, min(b - a, 3 * self.cluster)) for a, b in pairwise(cuts)]
        contents = []
        for offset, length in ranges:
            self.writes += 1
            contents.append(pattern(length, self.writes))
            self.model[offset : offset + length] = contents[-1]

        async def together() -> None:
            await asyncio.gather(
                *(self.open.pwrite(c, o) for c, (o, _) in zip(contents, ranges, strict=True)),
                self.open.flush(),
            )

        async def in_turn() -> None:
            for content, (offset, _) in zip(contents, ranges, strict=True):
                await self.open.pwrite(content, offset)

        self.run(in_turn() if isinstance(self.face, BlockingFace) else together())

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

    def teardown(self) -> None:
        try:
            self._close()
        finally:
            self.loop.close()
            shutil.rmtree(self.directory)


TestQcow = QcowMachine.TestCase
