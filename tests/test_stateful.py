"""Random histories of a qcow2 disk (see `tests/histories.py`).

After each reopening the image is checked by the independent reader, which must also see the
model's bytes; at the end `qemu-img check` has the last word where it is installed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from enban.lab.qcow2_reader import Qcow2Reader
from tests.histories import Histories, content_below, fill
from tests.support import FACES, KIB, Face, make_qcow2, pattern, qemu_check

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


class DiskMachine(Histories):
    @initialize(image=st.sampled_from(IMAGES), chain=st.sampled_from(CHAINS), face=st.sampled_from(FACES))
    def create(self, image: tuple[str, dict[str, Any], int], chain: str, face: Face) -> None:
        name, options, size = image
        if options.get("data_file_raw"):
            chain = "alone"
        self.path = self.directory / "top.qcow2"
        self.options = options
        self.cluster = options.get("cluster_size", 65536)
        self.may_pack = "data_file" not in options
        backing = self._make_chain(chain, size)
        if "data_file" in options:
            (self.directory / "data.raw").touch()
        base_format = "qcow2" if chain.startswith("qcow2") else "raw"
        names = {"backing_file": "base", "backing_fmt": base_format} if chain != "alone" else {}
        make_qcow2(self.path, size, **options, **names)
        self.begin(name, chain, face, size, backing)

    def _make_chain(self, chain: str, size: int) -> bytes:
        if chain == "alone":
            return b""
        base = self.directory / "base"
        content = content_below(size, long=chain == "raw-long")
        if chain.startswith("raw"):
            base.write_bytes(content)
            return content
        under = {}
        if chain == "qcow2-raw":  # the lowest layer is shorter still
            (self.directory / "under").write_bytes(pattern(size // 4 // 512 * 512, 9))
            under = {"backing_file": "under", "backing_fmt": "raw"}
        make_qcow2(base, len(content), cluster_size=1024, **under)
        return fill(base, content)

    def reference(self) -> Path:
        return self.path

    def look_through(self) -> None:
        raw = self.options.get("data_file")
        data = (self.directory / raw).read_bytes() if raw else None
        reader = Qcow2Reader(self.path.read_bytes(), data_file=data)
        report = reader.check()
        assert report.clean, (report.corruptions[:5], report.leaks[:5])
        assert reader.read(backing=self.backing) == self.model
        if self.options.get("data_file_raw"):
            assert data is not None
            assert data.ljust(len(self.model), b"\0")[: len(self.model)] == self.model

    def finish(self) -> None:
        if shutil.which("qemu-img"):
            qemu_check(self.path)


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(max_examples=max(settings().max_examples, 500))
