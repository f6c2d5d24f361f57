"""Random histories of a qcow disk (see `tests/histories.py`).

After each reopening the independent reader looks through the tables and must see the model's
bytes; of encrypted images it can only check the tables.
"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.histories import Histories, content_below, fill
from tests.qcow_support import PASSPHRASE, check_sound, have_cryptography, make_qcow
from tests.support import FACES, KIB, BlockingFace, Face, make_qcow2, pattern

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


class QcowMachine(Histories):
    @initialize(
        image=st.sampled_from([i for i in IMAGES if have_cryptography() or "encrypt_format" not in i[1]]),
        chain=st.sampled_from(CHAINS),
        face=st.sampled_from(FACES),
    )
    def create(self, image: tuple[str, dict[str, Any], int], chain: str, face: Face) -> None:
        name, options, size = image
        (self.directory / "key").write_bytes(PASSPHRASE)
        self.path = self.directory / "top.qcow"
        self.options = options
        self.cluster = options.get("cluster_size", 4096)
        self.may_pack = "encrypt_format" not in options
        backing = self._make_chain(chain, size)
        below = {"backing_file": "base"} if chain != "alone" else {}
        make_qcow(self.path, size, **{"cluster_size": 4096, "l2_entries": 512, **options, **below})
        self.begin(name, chain, face, size, backing)

    def _make_chain(self, chain: str, size: int) -> bytes:
        if chain == "alone":
            return b""
        base = self.directory / "base"
        content = content_below(size, long=chain == "raw-long")
        if chain.startswith("raw"):
            base.write_bytes(content)
            return content
        if chain == "qcow2":
            make_qcow2(base, len(content), cluster_size=1024)
        else:
            make_qcow(base, len(content), cluster_size=1024, l2_entries=64)
        return fill(base, content)

    def reference(self) -> dict[str, Any]:
        reference: dict[str, Any] = {"driver": "qcow", "file": {"filename": str(self.path)}}
        if "encrypt_format" in self.options:
            reference["encrypt"] = {"key-file": str(self.directory / "key")}
        return reference

    def look_through(self) -> None:
        reader = check_sound(self.path.read_bytes())
        if "encrypt_format" not in self.options:
            assert reader.read(self.backing) == self.model

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


TestQcow = QcowMachine.TestCase
