"""Has the machine's memory ready for what is timed next: `python -m bench.memory BYTES`.

Where a virtual machine gives free memory back to its host, as Linux does two seconds after it was freed (free
page reporting), each new page comes from the host when it is first touched, and that takes longer than all
that is to be measured. So this process takes BYTES, keeps them until what was free before has been given
back, and ends: then there is that much memory to be had at once, for about as long.

A process of its own, so that its size is not the harness's, below which no peak is seen.
"""

from __future__ import annotations

import mmap
import sys
import time

HOLD_S = 2.3
LITTLE = 256 << 20  # bytes that are there anyway


def available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no MemAvailable")


def hold(wanted: int) -> int:
    """Takes `wanted` bytes, but at most half of what is available, for a while; how many it took."""
    if wanted < LITTLE:
        return 0
    pages = min(wanted, available_bytes() // 2) // mmap.PAGESIZE
    with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel built without them
        memory[:: mmap.PAGESIZE] = b"1" * pages
        time.sleep(HOLD_S)
    return pages * mmap.PAGESIZE


if __name__ == "__main__":
    hold(int(sys.argv[1]))
