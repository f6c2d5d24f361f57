"""An independent reader of qcow images (version 1): what the format says, in the plainest way.

Shares no code with enban. It reads the guest's bytes and says what in the tables is wrong.
"""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise


class QcowReader:
    """An image held in memory. Encrypted clusters are refused: decrypting is QEMU's part in the tests."""

    def __init__(self, image: bytes | bytearray) -> None:
        self.image = bytes(image)
        (
            magic,
            version,
            self.backing_offset,
            self.backing_length,
            _mtime,
            self.size,
            self.cluster_bits,
            self.l2_bits,
            _padding,
            self.crypt,
            self.l1_offset,
        ) = struct.unpack_from(">4sIQIIQBBHIQ", self.image)
        assert magic == b"QFI\xfb" and version == 1
        self.cluster = 1 << self.cluster_bits
        span = 1 << self.cluster_bits + self.l2_bits
        count = (self.size + span - 1) // span
        self.l1 = struct.unpack_from(f">{count}Q", self.image, self.l1_offset)

    def table(self, index: int) -> tuple[int, ...]:
        count: int = 1 << self.l2_bits
        if not self.l1[index]:
            return (0,) * count
        entries: tuple[int, ...] = struct.unpack_from(f">{count}Q", self.image, self.l1[index])
        return entries

    def packed(self, entry: int) -> tuple[int, int]:
        shift = 63 - self.cluster_bits
        return entry & (1 << shift) - 1, entry >> shift & self.cluster - 1

    def read(self, backing: bytes = b"") -> bytes:
        assert not self.crypt
        out = bytearray()
        for index in range(len(self.l1)):
            for entry in self.table(index):
                start = len(out)
                if not entry:
                    out += backing[start : start + self.cluster].ljust(self.cluster, b"\0")
                elif entry >> 63:
                    host, length = self.packed(entry)
                    stream = zlib.decompressobj(-12)
                    data = stream.decompress(self.image[host : host + length])
                    assert len(data) == self.cluster, (hex(start), len(data))
                    out += data
                else:
                    out += self.image[entry : entry + self.cluster].ljust(self.cluster, b"\0")
        return bytes(out[: self.size])

    def problems(self) -> list[str]:
        """Places outside the file and places used twice; [] for a sound image."""
        found: list[str] = []
        used = [(0, 48, "header"), (self.l1_offset, self.l1_offset + 8 * len(self.l1), "L1 table")]
        if self.backing_offset:
            used.append((self.backing_offset, self.backing_offset + self.backing_length, "backing name"))
        for index, place in enumerate(self.l1):
            if not place:
                continue
            used.append((place, place + (8 << self.l2_bits), f"L2 table {index}"))
            for position, entry in enumerate(self.table(index)):
                name = f"cluster {index}.{position}"
                if entry >> 63:
                    host, length = self.packed(entry)
                    used.append((host, host + length, name))
                elif entry:
                    if entry % 512:
                        found.append(f"{name} at {entry:#x} is not aligned")
                    used.append((entry, entry + self.cluster, name))
        used.sort()
        for (_, end, first), (start, _, second) in pairwise(used):
            if start < end:
                found.append(f"{first} and {second} overlap at {start:#x}")
        last = -(-len(self.image) // self.cluster) * self.cluster
        found += [f"{name} ends at {end:#x}, past the end of the file" for _, end, name in used if end > last]
        return found
