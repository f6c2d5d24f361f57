"""What an image says of itself, under the keys of qemu-img info's JSON.

Only headers and tables are read. Neither the backing file nor the data file is opened, so
an image that lost one of them can still be looked at.
"""

from __future__ import annotations

import os

from enban.block.gate import TRUSTED
from enban.block.runtime import BLOCKING, drive
from enban.catalog import Opener, loop
from enban.errors import EnbanError
from enban.units import SECTOR, align_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from enban.block.gate import Gate
    from enban.block.node import Node


def image_info(
    reference: str | dict[str, Any],
    *,
    format: str = "",
    chain: bool = False,
    gate: Gate = TRUSTED,
    force_share: bool = False,
) -> list[dict[str, Any]]:
    """Facts of an image and, with `chain`, of each image below it, top first.

    Sizes are in bytes; `virtual-size` is in whole sectors, `actual-size` is missing where nobody knows (NBD).
    gate: for the names of backing files.
    Raises HostError, ImageError, UsageError (GateError).
    """
    opener = Opener(BLOCKING, gate=gate, lock=not force_share, metadata_only=True)
    found: list[dict[str, Any]] = []
    seen: set[Any] = set()
    following: str | dict[str, Any] | None = reference
    above = ""
    try:
        while following is not None:
            node = drive(opener.open_chain(following, format=format, backing=False))
            try:
                if node.file.identity in seen:
                    raise loop(node.name)
                seen.add(node.file.identity)
                found.append(drive(_describe(node)))
                following = None
                if chain and node.backing_name:
                    above = node.name
                    gate.check(node.backing_name, image=node.name, role="backing file")
                    following = opener.resolve(node.backing_name, node.name)
                    format = node.backing_format
            finally:
                drive(node.close())
    except EnbanError as error:
        if above:
            error.named_by(above, "backing file")
        raise
    return found


async def _describe(node: Node) -> dict[str, Any]:
    facts = await node.describe()
    info: dict[str, Any] = {}
    if "snapshots" in facts:
        info["snapshots"] = facts["snapshots"]
    if node.backing_name and node.backing_format:
        info["backing-filename-format"] = node.backing_format
    info["virtual-size"] = align_up(node.size, SECTOR)
    info["filename"] = node.name
    if facts.get("cluster-size"):
        info["cluster-size"] = facts["cluster-size"]
    info["format"] = node.format
    allocated = node.file.allocated()
    if allocated >= 0:
        info["actual-size"] = allocated
    for key in ("encrypted", "format-specific"):
        if key in facts:
            info[key] = facts[key]
    if node.backing_name:
        info["full-backing-filename"] = full_backing_name(node)
        info["backing-filename"] = node.backing_name
    if allocated >= 0 or node.format != "raw":  # qemu-img, too, has none for a raw disk of somebody else
        info["dirty-flag"] = bool(facts.get("dirty-flag"))
    return info


def full_backing_name(node: Node) -> str:
    """The backing file's name as it is opened from here."""
    name = node.backing_name
    if "://" in name or name.startswith(("json:", "nbd:", "file:")):
        return name
    return os.path.join(os.path.dirname(node.name), name)
