"""Entries of the qcow2 L1, L2 and refcount tables: which bits mean what.

Only bits and their packing; what an entry means for the guest is in `formats/qcow2`.

Source: specification, "L1 table entry", "L2 table entry", "Extended L2 Entries", "Refcount table entry".
"""

from __future__ import annotations

COPIED = 1 << 63  # the refcount is exactly 1: may be written in place
COMPRESSED = 1 << 62
ALL_ZERO = 1  # version 3: the cluster reads as zeros
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE  # of a standard cluster entry
REFTABLE_MASK = 0xFFFF_FFFF_FFFF_FE00
SUBCLUSTERS = 32
ALL_ALLOCATED = 0x0000_0000_FFFF_FFFF
ALL_ZEROES = 0xFFFF_FFFF_0000_0000


# -- compressed cluster descriptors ("Compressed Clusters Descriptor") ---------------------
#
#   bits 0 .. x-1     host offset of the packed data, any byte
#   bits x .. 61      additional 512-byte sectors after the one the offset is in
#   with x = 62 - (cluster_bits - 8)


def unpack_compressed(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, bytes to read) of a compressed cluster; the count runs to a sector's end."""
    shift = 62 - (cluster_bits - 8)
    host = entry & (1 << shift) - 1
    sectors = (entry & COMPRESSED - 1) >> shift
    return host, (sectors + 1) * 512 - host % 512


def pack_compressed(host: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of `length` packed bytes at `host`."""
    shift = 62 - (cluster_bits - 8)
    sectors = (host + length - 1) // 512 - host // 512
    return COMPRESSED | sectors << shift | host
