"""Try a change on a copy that costs nothing, then keep it or throw it away.

    python examples/overlay.py base.qcow2 keep      # the change goes into base.qcow2
    python examples/overlay.py base.qcow2 drop      # base.qcow2 stays as it was

Makes an overlay beside the image, changes the first sector through it, shows that the image below does
not notice, and commits or deletes.
"""

from __future__ import annotations

import os
import sys

import enban

STAMP = b"written through the overlay".ljust(512, b".")


def first_words(path: str) -> bytes:
    with enban.open(path) as disk:
        return disk.pread(27, 0)


def change(base: str, overlay: str) -> None:
    """Make `overlay` over `base` and write to it."""
    with enban.open(base) as disk:
        format = disk.format
    # A name without a directory: it is looked for beside the overlay, wherever both are moved to.
    enban.create(overlay, "qcow2", {"backing_file": os.path.basename(base), "backing_fmt": format})
    with enban.open(overlay, writable=True) as disk:
        disk.pwrite(STAMP, 0)
        own = sum(extent.length for extent in disk.map() if extent.depth == 0 and extent.storage)
        print(f"the overlay itself holds {own} of {disk.size} bytes")


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[1] not in ("keep", "drop"):
        print("usage: overlay.py IMAGE keep|drop", file=sys.stderr)
        return 2
    base, decision = arguments
    overlay = f"{base}.overlay"
    try:
        change(base, overlay)
        print(f"overlay: {first_words(overlay)!r}")
        print(f"below:   {first_words(base)!r}")
        if decision == "keep":
            written = enban.commit(overlay, keep=True)  # keep: no need to empty what is deleted next
            print(f"{written} bytes went into {base}")
        os.unlink(overlay)
        print(f"now:     {first_words(base)!r}")
    except enban.EnbanError as error:
        print(f"overlay: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
