"""Checking images for consistency, and repairing them.

A check reads metadata only: no guest data, no backing file. A repair is the format's own:
every step leaves an image that can be repaired again.
"""

from __future__ import annotations

from ..block.gate import SIBLINGS
from ..block.runtime import BLOCKING, drive
from ..catalog import Opener
from ..errors import EnbanError, UnsupportedOperationError, UsageError
from ..formats.common.findings import CheckResult, Finding

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any

    from ..block.gate import Gate
    from ..block.node import Node
    from ..block.runtime import Runtime
    from .progress import Report

__all__ = ["CheckResult", "Finding", "check", "run_check"]

REPAIRS = (None, "leaks", "all")


def check(
    path: str | os.PathLike[str] | dict[str, Any],
    repair: str | None = None,
    format: str = "",
    progress: Report | None = None,
    *,
    force_share: bool = False,
    cache: str = "writeback",
    gate: Gate = SIBLINGS,
) -> CheckResult:
    """Check an image, or check and repair it.

    path: a file, a URI, a `json:{...}` string, or a dictionary of image options.
    repair: None; "leaks" frees clusters that are counted but not used; "all" also repairs what is
        corrupt, as far as that can be done without guessing. What is left is in the result.
    format: the driver's name; "" finds it out from the content.
    progress: called with (done, total) bytes of tables; what it raises ends the check and comes
        out of here. An image under repair is then as after a crash: repair it again.
    force_share: check an image although another process has it open for writing; what is being
        changed meanwhile may show as errors.
    gate: whether the data file that an image names may be opened (a check does not read it).

    Raises UnsupportedOperationError for a format without a check, ImageError for an image whose
    header cannot be used, HostError (LockedError, ...), UsageError.
    """
    from os import fspath

    reference = path if isinstance(path, dict) else fspath(path)
    return drive(
        run_check(
            reference,
            BLOCKING,
            repair=repair,
            format=format,
            progress=progress,
            lock=not force_share,
            cache=cache,
            gate=gate,
        )
    )


async def run_check(
    reference: str | dict[str, Any],
    runtime: Runtime,
    *,
    repair: str | None = None,
    format: str = "",
    progress: Report | None = None,
    lock: bool = True,
    cache: str = "writeback",
    gate: Gate = SIBLINGS,
) -> CheckResult:
    """`check` on any runtime."""
    if repair not in REPAIRS:
        raise UsageError(f"repair mode '{repair}' is not known", hint="use leaks or all")
    if repair and not lock:
        raise UsageError("an image cannot be repaired while another process may be using it")
    opener = Opener(runtime, gate=gate, cache=cache, lock=lock, metadata_only=True)
    node = await opener.open_chain(reference, format=format, writable=bool(repair), backing=False)
    try:
        result = await _check(node, repair, progress)
    except BaseException:
        try:
            await node.close()
        except EnbanError:
            pass  # the error that led here is the one to report
        raise
    await node.close()
    return result


async def _check(node: Node, repair: str | None, progress: Report | None) -> CheckResult:
    from ..formats.qcow2.node import Qcow2Node

    if node.format == "qcow":
        return await _check_qcow(node, repair, progress)
    if not isinstance(node, Qcow2Node):
        raise UnsupportedOperationError(f"format {node.format} has no check", path=node.name)
    if repair:
        from ..formats.qcow2.repair import repair_image

        return await repair_image(node, repair, progress)
    from ..formats.qcow2.check import check_image

    return await check_image(node, progress)


async def _check_qcow(node: Node, repair: str | None, progress: Report | None) -> CheckResult:
    from ..formats.qcow.check import check_image
    from ..formats.qcow.node import QcowNode

    assert isinstance(node, QcowNode)
    if repair:
        raise UnsupportedOperationError(
            "a qcow image cannot be repaired in place", path=node.name, hint="convert it to a new image"
        )
    return await check_image(node, progress)
