"""Finding zeros in buffers, at memory speed and without memory of its own to speak of."""

from __future__ import annotations

_BLOCK = 1 << 16
_zeroes: dict[int, bytearray] = {}


def is_zero(view: memoryview) -> bool:
    """Whether a buffer is all zeros.

    A bytearray on the left compares at memory speed, the other way round element by element. The
    zeros to compare with are kept, by length, and short: making large ones anew costs more in page
    faults than all the comparing.
    """
    for start in range(0, len(view), _BLOCK):
        part = view[start : start + _BLOCK]
        zeroes = _zeroes.get(len(part))
        if zeroes is None:
            if len(_zeroes) > 128:
                _zeroes.clear()
            zeroes = _zeroes[len(part)] = bytearray(len(part))
        if zeroes != part:
            return False
    return True


def find_data(view: memoryview, grain: int) -> list[tuple[int, int]]:
    """The parts [start, end) of a buffer that are not zero, in units of `grain` bytes.

    A unit whose first byte is not zero needs no further look; only the others are compared.
    """
    if is_zero(view):
        return []
    found: list[tuple[int, int]] = []
    start = 0
    firsts = bytes(view[::grain])
    position = firsts.find(0)
    while position >= 0:
        here = position * grain
        end = min(here + grain, len(view))
        if is_zero(view[here:end]):
            if here > start:
                found.append((start, here))
            start = end
        position = firsts.find(0, position + 1)
    if start < len(view):
        found.append((start, len(view)))
    return found
