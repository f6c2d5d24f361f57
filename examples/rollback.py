"""Change a disk in one go: a snapshot before, and back to it if anything fails.

    python examples/rollback.py disk.qcow2 OFFSET=TEXT...

Writes each TEXT at its OFFSET. If one of them cannot be written, the disk is as it was before the first.
The snapshot lives inside the qcow2 image and is gone at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import enban
from enban.units import parse_size


@contextmanager
def transaction(disk: enban.Disk, name: str = "before-the-change") -> Iterator[None]:
    """Undo everything written inside the `with` block if it is left by an exception.

    If the process dies inside it, the snapshot is still in the image: `enban snapshot -a` goes back.
    """
    disk.create_snapshot(name)
    try:
        yield
    except BaseException:
        disk.apply_snapshot(name)
        raise
    finally:
        disk.delete_snapshot(name)


def main(arguments: list[str]) -> int:
    path, *changes = arguments or [""]
    if not changes or not all("=" in change for change in changes):
        print("usage: rollback.py IMAGE OFFSET=TEXT...", file=sys.stderr)
        return 2
    try:
        with enban.open(path, writable=True) as disk, transaction(disk):
            for change in changes:
                offset, _, text = change.partition("=")
                disk.pwrite(text.encode(), parse_size(offset))
    except enban.EnbanError as error:
        print(f"rollback: {error}", file=sys.stderr)
        return 1
    print(f"{len(changes)} changes made")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
