"""Changing what an existing image was created with, where the format allows it.

Everything is checked before anything is changed; then the steps go in an order in which each finds
what it needs:

    up to compat 1.1  ->  refcount width, flags, data file's name, size  ->  down to compat 0.10
"""

from __future__ import annotations

from enban.block.disk import Disk
from enban.block.door import Door
from enban.block.gate import TRUSTED
from enban.block.runtime import BLOCKING, drive
from enban.catalog import Opener
from enban.errors import UnsupportedOperationError, UsageError
from enban.jobs.create import Option, option_table, read_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from enban.block.gate import Gate
    from enban.formats.qcow2.node import Qcow2Node
    from enban.jobs.create import Value
    from enban.jobs.progress import Report

_OPTIONS = ("compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits", "size")
_V2 = ("0.10", "v2")
_LEVELS = (*_V2, "1.1", "v3")


def amend_table(format: str) -> tuple[Option, ...]:
    """The options of a format that can be changed later. Raises UsageError if there are none."""
    if format != "qcow2":
        raise UsageError(f"nothing can be amended in an image of format {format}", hint="convert it")
    return tuple(option for option in option_table(format) if option.name in _OPTIONS)


def amend(
    reference: str | dict[str, Any],
    options: Mapping[str, str],
    *,
    format: str = "",
    cache: str = "writeback",
    gate: Gate = TRUSTED,
    progress: Report | None = None,
) -> None:
    """Change options of an image, named and spelt as for `create`: compat, lazy_refcounts, refcount_bits,
    size (only to a larger one), data_file and data_file_raw=off.

    The disk reads the same before, during and after; after a crash each option is as before or as asked.
    Raises UsageError (UnsupportedOperationError), HostError, ImageError.
    """
    opener = Opener(BLOCKING, gate=gate, cache=cache)
    node: Any = drive(opener.open_chain(reference, format=format, writable=True))
    with Disk(Door(node, writable=True)) as disk:
        amend_table(node.format)
        values = read_options(node.format, options)
        _vet(node, values)
        _carry_out(disk, node, values, progress)
        disk.flush()


def _vet(node: Qcow2Node, values: Mapping[str, Value]) -> None:
    """Refuse what cannot be, before anything is changed."""
    for name in values:
        if name in ("backing_file", "backing_fmt"):
            raise UsageError("the backing file is changed with: enban rebase", path=node.name)
        if name not in _OPTIONS:
            raise UsageError(
                f"option '{name}' counts only when an image is created",
                path=node.name,
                hint="convert it to an image with that option",
            )
    level = values.get("compat", "1.1" if node.header.version > 2 else "0.10")
    if level not in _LEVELS:
        raise UsageError(f"compat level '{level}' is not known", hint="use 0.10 or 1.1")
    width = values.get("refcount_bits", node.header.refcount_bits)
    if width not in (1, 2, 4, 8, 16, 32, 64):
        raise UsageError(f"refcount width {width} is not possible", hint="use a power of two from 1 to 64")
    if level in _V2:
        if values.get("lazy_refcounts"):
            raise UsageError("lazy_refcounts needs compat level 1.1", path=node.name, hint="add compat=1.1")
        if width != 16:
            raise UsageError(
                "compat level 0.10 needs 16-bit refcounts", path=node.name, hint="add refcount_bits=16"
            )
    if int(values.get("size", node.size)) < node.size:
        raise UsageError("the image would shrink", path=node.name, hint="use: enban resize --shrink")
    if values.get("data_file_raw"):
        raise UnsupportedOperationError("data_file_raw=on counts only for new images", path=node.name)
    if "data_file" in values and not node.external:
        raise UnsupportedOperationError("the image has no data file to rename", path=node.name)


def _carry_out(disk: Disk, node: Qcow2Node, values: Mapping[str, Value], progress: Report | None) -> None:
    from enban.formats.qcow2 import amend as steps
    from enban.wire.qcow2 import AUTOCLEAR_RAW_DATA, EXT_DATA_FILE

    level = values.get("compat")
    if level is not None and level not in _V2 and node.header.version < 3:
        drive(steps.upgrade(node))
    if "refcount_bits" in values:
        drive(steps.set_refcount_bits(node, int(values["refcount_bits"]), progress))
    if "lazy_refcounts" in values and (node.header.version > 2 or values["lazy_refcounts"]):
        drive(steps.set_lazy(node, bool(values["lazy_refcounts"])))
    if "data_file" in values:
        name = str(values["data_file"]).encode("utf-8", "surrogateescape")
        drive(steps.set_extension(node, EXT_DATA_FILE, name))
    if values.get("data_file_raw") is False and node.header.autoclear & AUTOCLEAR_RAW_DATA:
        drive(steps.set_flags(node, AUTOCLEAR_RAW_DATA, False, autoclear=True))
    if int(values.get("size", node.size)) > node.size:
        disk.resize(int(values["size"]))
    if level in _V2 and node.header.version > 2:
        drive(steps.downgrade(node, progress))
