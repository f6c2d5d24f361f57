"""Writes a fully allocated qcow2 of any virtual size without its data: what check, map and info read.

Version 3, 64 KiB clusters, 16 bit refcounts. Every guest cluster has a host cluster of its own, which is a
hole of the sparse file. Layout, in host clusters:

    header | refcount table | refcount blocks | L1 table | L2 table, its 8192 data clusters | L2 table, ...

In order, guest cluster j lies in the j-th data slot; shuffled, in a random other one, tables staying where
they are. Every cluster of the file is referenced exactly once and counted once, so the image checks clean.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L2_ENTRIES = CLUSTER // 8
REFCOUNTS_PER_BLOCK = CLUSTER // 2
COPIED = 1 << 63
HEADER_V3 = struct.Struct(">4sI QI I Q I I Q Q I I Q QQQ I I")


def clusters(size_bytes: int) -> int:
    return -(-size_bytes // CLUSTER)


def write_image(path: Path, virtual_bytes: int, *, shuffled: bool) -> None:
    guest = clusters(virtual_bytes)
    l2_tables = -(-guest // L2_ENTRIES)
    l1_clusters = clusters(l2_tables * 8)

    # Refcount blocks count themselves and their table too: grow until they cover everything.
    blocks = 1
    while True:
        table_clusters = clusters(blocks * 8)
        total = 1 + table_clusters + blocks + l1_clusters + l2_tables + guest
        needed = -(-total // REFCOUNTS_PER_BLOCK)
        if needed <= blocks:
            break
        blocks = needed
    first_block = 1 + table_clusters
    l1 = first_block + blocks
    first_l2 = l1 + l1_clusters

    order = numpy.random.Generator(numpy.random.PCG64(3)).permutation(guest) if shuffled else None
    with path.open("wb") as file:
        file.truncate(total * CLUSTER)
        no_backing, no_snapshots, no_features = (0, 0), (0, 0), (0, 0, 0)
        encryption, refcount_order = 0, 4
        l1_table, refcount_table = (l2_tables, l1 * CLUSTER), (1 * CLUSTER, table_clusters)
        start = (b"QFI\xfb", 3, *no_backing, CLUSTER_BITS, virtual_bytes, encryption)
        tables_at = (*l1_table, *refcount_table, *no_snapshots)
        # Zeroes follow: the end of the header extensions.
        file.write(HEADER_V3.pack(*start, *tables_at, *no_features, refcount_order, HEADER_V3.size))

        def put(cluster: int, values: numpy.ndarray[tuple[int], numpy.dtype[numpy.uint64]]) -> None:
            file.seek(cluster * CLUSTER)
            file.write(values.astype(">u8").tobytes())

        put(1, numpy.arange(first_block, first_block + blocks, dtype=numpy.uint64) * CLUSTER)
        file.seek(first_block * CLUSTER)
        counted = numpy.ones(REFCOUNTS_PER_BLOCK, dtype=">u2").tobytes()
        for block in range(blocks):
            file.write(counted[: 2 * max(0, min(REFCOUNTS_PER_BLOCK, total - block * REFCOUNTS_PER_BLOCK))])
        tables = first_l2 + numpy.arange(l2_tables, dtype=numpy.uint64) * (L2_ENTRIES + 1)
        put(l1, tables * CLUSTER | numpy.uint64(COPIED))
        for table in range(l2_tables):
            first, end = table * L2_ENTRIES, min((table + 1) * L2_ENTRIES, guest)
            slots = numpy.arange(first, end) if order is None else order[first:end]
            hosts = (first_l2 + slots // L2_ENTRIES + 1 + slots).astype(numpy.uint64)
            put(int(tables[table]), hosts * CLUSTER | numpy.uint64(COPIED))
