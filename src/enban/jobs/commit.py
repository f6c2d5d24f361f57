"""Writing an overlay's data into an image below it.

    grow the base if the overlay is longer
    copy what the layers above the base have          each step leaves the overlay as it was,
    flush the base                                    and it reads the same all along
    empty the overlay (one level, unless it is kept)

The base is opened for writing, so it must not be in use by anyone else, and no image but
those between should be based on it.
"""

from __future__ import annotations

from enban.block.disk import Disk
from enban.block.door import Door, close_chain
from enban.block.gate import TRUSTED
from enban.block.pull import names
from enban.block.runtime import BLOCKING, drive
from enban.catalog import Opener, loop, parse_reference, refuse_loop
from enban.errors import EnbanError, LockedError, UsageError
from enban.jobs.copying import PIECE, Writer, pieces
from enban.jobs.create import backing_reference
from enban.jobs.map import PRESENT, READS_ZERO, walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from enban.block.cipher import Passphrase
    from enban.block.gate import Gate
    from enban.block.node import Node
    from enban.jobs.progress import Report


def commit(
    reference: str | dict[str, Any],
    base: str = "",
    *,
    format: str = "",
    keep: bool = False,
    cache: str = "writeback",
    gate: Gate = TRUSTED,
    passphrase: Passphrase = None,
    progress: Report | None = None,
) -> int:
    """Commit an image into its backing file, or into `base` further down its chain.

    keep: leave the overlay's own data in place; with a `base` that is not the next image down it
    always stays, and the images between no longer show what they did.
    passphrase: of encrypted images, as for `enban.open`.
    Returns the number of guest bytes written to the base.
    Raises UsageError, HostError (LockedError if an image is in use), ImageError.
    """
    if "backing" in parse_reference(reference):
        raise UsageError(
            "commit goes by the backing files named in the images", hint="leave out option 'backing'"
        )
    opener = Opener(BLOCKING, gate=gate, cache=cache, passphrase=passphrase)
    top = drive(opener.open_chain(reference, format=format, writable=True, backing=False))
    try:
        if not top.backing_name:
            raise UsageError("the image has no backing file to commit to", path=top.name)
        depth = _open_down_to(opener, top, base)
        target = _node_at(top, depth)
        disk, below = Disk(Door(top, writable=True)), Disk(Door(target, writable=True))
        written = _copy_down(disk, below, depth, progress)
        below.flush()
        if depth == 1 and not keep:
            drive(top.make_empty())
        return written
    finally:
        drive(close_chain(top))


def _open_down_to(opener: Opener, top: Node, base: str) -> int:
    """Open the chain below `top`, the base for writing; how deep the base is."""
    node, depth = top, 0
    seen = {top.file.identity}
    while True:
        if not node.backing_name:
            raise UsageError(f"'{base}' is not in the backing chain", path=top.name)
        opener.gate.check(node.backing_name, image=node.name, role="backing file")
        depth += 1
        is_base = not base or names(base, node)
        try:
            below = backing_reference(node.name, node.backing_name, node.backing_format)
            try:
                node.backing = drive(opener.open_chain(below, writable=is_base, backing=is_base))
            except LockedError as error:
                refuse_loop(top, error)
                raise
            if node.backing.file.identity in seen:
                raise loop(node.backing.name)
        except EnbanError as error:
            error.named_by(node.name, "backing file")
            raise
        node = node.backing
        seen.add(node.file.identity)
        if is_base:
            return depth


def _node_at(node: Node, depth: int) -> Node:
    for _ in range(depth):
        assert node.backing is not None
        node = node.backing
    return node


def _copy_down(disk: Disk, below: Disk, depth: int, progress: Report | None) -> int:
    """Write to the base what the layers above it have; the number of bytes."""
    if below.size < disk.size:
        below.resize(disk.size)
    written, writer = 0, Writer(below)
    with memoryview(bytearray(PIECE)) as buffer:
        for start, length, layer, flags, _, _ in walk(disk.node, 0, disk.size):
            if layer < depth:  # a layer above answers, also where it ends short and so reads zeros
                if flags & READS_ZERO:
                    below.write_zeroes(start, length)
                else:
                    assert flags & PRESENT
                    for place, n in pieces(start, length):
                        disk.readinto(buffer[:n], place)
                        writer.write(buffer[:n], place)
                        if progress is not None:
                            progress(place + n, disk.size)
                written += length
            if progress is not None:
                progress(start + length, disk.size)
    return written
