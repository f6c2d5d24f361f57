"""Another size for a disk."""

from __future__ import annotations

from enban.errors import UsageError
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.block.disk import Disk


def parse_change(text: str, current: int) -> int:
    """The size that `10G`, `+1G` or `-512M` stands for, in bytes. Raises UsageError."""
    sign = text[:1]
    if sign not in ("+", "-"):
        size = parse_size(text)
    else:
        change = parse_size(text[1:])
        size = current + change if sign == "+" else current - change
    if size <= 0:
        raise UsageError(f"the new size must be more than 0, not {size}")
    return size


def resize(disk: Disk, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
    """Set the virtual size in bytes, durably.

    shrink: allow a smaller size; what lies beyond it is lost.
    Raises UsageError, HostError (NoSpaceError), UnsupportedOperationError.
    """
    if size < disk.size and not shrink:
        raise UsageError(
            f"{size} bytes are fewer than the {disk.size} there are; what lies beyond would be lost",
            path=disk.name,
            hint="to shrink it all the same, say --shrink",
        )
    if size <= disk.size and preallocation != "off":
        raise UsageError("preallocation goes with growing only", path=disk.name)
    disk.resize(size, preallocation=preallocation)
    disk.flush()
