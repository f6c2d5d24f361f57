"""Random histories of a disk, on both faces, against a plain model: a bytearray.

After each reopening the image is checked by the independent reader, which must also see the
model's bytes; at the end `qemu-img check` has the last word where it is installed.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import enban
from enban.block.codec import deflater
from enban.extent import UNALLOCATED, ZERO
from enban.lab.qcow2_reader import Qcow2Reader
from tests.support import FACES, KIB, AnyDisk, BlockingFace, Face, make_qcow2, pattern, qemu_check

T = TypeVar("T")

# (name, creation options, virtual size). Sizes that end inside a cluster are the rule, not the exception.
IMAGES: list[tuple[str, dict[str, Any], int]] = [
    ("512", {"cluster_size": 512}, 41 * KIB + 512),
    ("1k-rc64", {"cluster_size": 1024, "refcount_bits": 64}, 60 * KIB),
    ("4k-rc1", {"cluster_size": 4096, "refcount_bits": 1}, 201 * KIB),
    ("4k-v2", {"cluster_size": 4096, "compat": "0.10"}, 200 * KIB + 512),
    ("512-v2", {"cluster_size": 512, "compat": "0.10"}, 20 * KIB),
    ("64k-lazy", {"lazy_refcounts": True}, 601 * KIB),
    ("4k-zstd", {"cluster_size": 4096, "compression_type": "zstd", "refcount_bits": 8}, 100 * KIB + 1536),
    ("16k-ext", {"cluster_size": 16384, "extended_l2": True}, 401 * KIB),
    ("64k-ext-rc32", {"extended_l2": True, "refcount_bits": 32}, 513 * KIB),
    ("4k-data", {"cluster_size": 4096, "data_file": "data.raw"}, 150 * KIB + 512),
    ("512-data-raw", {"cluster_size": 512, "data_file": "data.raw", "data_file_raw": True}, 30 * KIB),
    ("16k-ext-data", {"cluster_size": 16384, "extended_l2": True, "data_file": "data.raw"}, 200 * KIB + 512),
]
CHAINS = ("alone", "raw-short", "raw-long", "qcow2", "qcow2-raw")


class DiskMachine(RuleBasedStateMachine):
    """One image, its model, and whichever face holds it open at the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="enban-stateful-"))
        self.path = self.directory / "top.qcow2"
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

    @initialize(image=st.sampled_from(IMAGES), chain=st.sampled_from(CHAINS), face=st.sampled_from(FACES))
    def create(self, image: tuple[str, dict[str, Any], int], chain: str, face: Face) -> None:
        name, options, size = image
        if options.get("data_file_raw"):
            chain = "alone"
        note(f"image {name}, chain {chain}, {face} face")
        self.options, self.face = options, face
        self.cluster = options.get("cluster_size", 65536)
        backing = self._make_chain(chain, size)
        if "data_file" in options:
            (self.directory / "data.raw").touch()
        names = {"backing_file": "base", "backing_fmt": self.base_format} if backing is not None else {}
        make_qcow2(self.path, size, **options, **names)
        self.model = bytearray(size)
        if backing is not None:
            self.model[: len(backing)] = backing[:size]
        self.backing = backing or b""
        self._open()

    def _make_chain(self, chain: str, size: int) -> bytes | None:
        base, self.base_format = self.directory / "base", "qcow2" if chain.startswith("qcow2") else "raw"
        if chain == "alone":
            return None
        content = pattern(size // 2 // 512 * 512 + 512 if chain != "raw-long" else size + 40 * KIB, 7)
        if chain.startswith("raw"):
            base.write_bytes(content)
            return content
        under = {}
        if chain == "qcow2-raw":  # the lowest layer is shorter still
            (self.directory / "under").write_bytes(pattern(size // 4 // 512 * 512, 9))
            under = {"backing_file": "under", "backing_fmt": "raw"}
        make_qcow2(base, len(content), cluster_size=1024, **under)
        with enban.open(base, writable=True, cache="unsafe") as disk:
            for at in range(0, len(content), 6000):
                piece = content[at : at + 3000]
                disk.pwrite(piece, at)
            return disk.pread(disk.size, 0)

    def _open(self) -> None:
        self.disk = self.run(self.face.open(self.path, writable=True, cache="unsafe"))
        if isinstance(self.face, BlockingFace):
            return
        assert not self.open.node.runtime.blocking

    def _close(self) -> None:
        if self.disk is not None:
            self.run(self.disk.close())
            self.disk = None
            raw = self.options.get("data_file")
            data = (self.directory / raw).read_bytes() if raw else None
            reader = Qcow2Reader(self.path.read_bytes(), data_file=data)
            report = reader.check()
            assert report.clean, (report.corruptions[:5], report.leaks[:5])
            assert reader.read(backing=self.backing) == self.model
            if self.options.get("data_file_raw"):
                assert data is not None
                assert data.ljust(len(self.model), b"\0")[: len(self.model)] == self.model

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

    @precondition(lambda self: "data_file" not in self.options)
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

    def teardown(self) -> None:
        try:
            if self.disk is not None:
                self._close()
                if shutil.which("qemu-img"):
                    qemu_check(self.path)
        finally:
            self.loop.close()
            shutil.rmtree(self.directory)


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(max_examples=max(settings().max_examples, 500))
