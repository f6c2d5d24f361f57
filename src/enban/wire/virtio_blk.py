"""The virtio block device: features, configuration, requests.

    a request   0   4 type     4   4 reserved     8   8 sector     in what the device may read
                    data: read by the device for OUT, DISCARD, WRITE_ZEROES; written by it for IN, GET_ID
                1 byte of status, the last that the device may write

Sectors have 512 bytes whatever `blk_size` says. Source: VIRTIO 1.2, 5.2 "Block Device".
"""

from __future__ import annotations

from struct import Struct

SECTOR = 512
SECTOR_BITS = 9

# Features, as bits.
F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_CONFIG_WCE = 1 << 11
F_MQ = 1 << 12
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14
F_INDIRECT = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32

# Types of requests.
IN = 0
OUT = 1
FLUSH = 4
GET_ID = 8
DISCARD = 11
WRITE_ZEROES = 13

NAMES = {IN: "read", OUT: "write", FLUSH: "flush", GET_ID: "identify", DISCARD: "discard"} | {
    WRITE_ZEROES: "write zeroes"
}

# Status.
OK = 0
IOERR = 1
UNSUPP = 2

REQUEST = Struct("<IIQ")
ID_BYTES = 20

RANGE = Struct("<QII")  # of DISCARD and WRITE_ZEROES: sector, sectors, flags
UNMAP = 1  # the one flag, of WRITE_ZEROES
MOST_RANGES = 16
MOST_RANGE_SECTORS = 1 << 22  # 2 GiB

# capacity, size_max, seg_max, geometry (3), blk_size, physical_block_exp, alignment_offset, min_io_size,
# opt_io_size, writeback, unused, num_queues, limits of discard (3) and write zeroes (2), may_unmap, unused
_CONFIG = Struct("<QIIHBBIBBHIBBHIIIIIB3x")
CONFIG_SIZE = _CONFIG.size
WRITEBACK_AT = 32
BLOCK = 512
PHYSICAL_EXP = 3  # 4 KiB is what disks and page caches like


def pack_config(
    size: int, *, segments: int, queues: int, grain: int, writeback: bool, read_only: bool = False
) -> bytes:
    """The configuration of a disk of `size` bytes; what is behind the last whole sector is not shown.

    segments: pieces of data a request may have. grain: bytes of which whole ones can be discarded.
    """
    ranges, sectors, aligned = MOST_RANGES, MOST_RANGE_SECTORS, max(1, grain >> SECTOR_BITS)
    if read_only:
        ranges = sectors = aligned = 0
    return _CONFIG.pack(
        *(size >> SECTOR_BITS, 0, segments, 0, 0, 0, BLOCK, PHYSICAL_EXP, 0, 1 << PHYSICAL_EXP, 0),
        *(writeback, 0, queues, sectors, ranges, aligned, sectors, ranges, not read_only),
    )


def pack_id(text: str) -> bytes:
    return text.encode("ascii", "replace")[:ID_BYTES].ljust(ID_BYTES, b"\0")
