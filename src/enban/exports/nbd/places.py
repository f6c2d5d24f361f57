"""Where the data of a disk lie in its file, in a form that is quick to ask."""

from __future__ import annotations

from array import array

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.door import Door
    from ...units import GuestOffset, HostOffset

_MOST_PLACES = 1 << 20  # remembered; 8 bytes each


class Places:
    """known[offset >> shift] is where a unit of 1 << shift bytes lies in the file, -1 if that is not known.

    A raw disk is one such unit. Of other disks places are remembered only where nobody writes to them, so
    that nothing moves, and if that takes no more than _MOST_PLACES.
    """

    def __init__(self, door: Door) -> None:
        node = door.node
        self._locate = node.locate
        self._size = node.size
        self.shift, count, first = 63, 1, -1
        if node.format == "raw":
            first = self._locate(0, 1)
        elif not door.writable and -(-self._size // node.unit) <= _MOST_PLACES:
            self.shift = node.unit.bit_length() - 1
            count = -(-self._size // node.unit)
        self.unit = 1 << self.shift
        self.known = array("q", [first]) * count

    def find(self, offset: GuestOffset, length: int) -> HostOffset:
        """As `Node.locate`."""
        if self.shift < 63:
            start = offset & -self.unit
            self.known[offset >> self.shift] = self._locate(start, min(self.unit, self._size - start))
        return self._locate(offset, length)
