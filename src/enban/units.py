"""Sizes and alignment.

The offset types are aliases, not wrappers: they say in a signature which address
space an integer lives in and cost nothing on the hot path.
"""

from __future__ import annotations

from .errors import UsageError

GuestOffset = int  # a byte offset on the virtual disk
HostOffset = int  # a byte offset in a storage (a file, a device, an export)
Cluster = int  # a cluster number: an offset divided by the cluster size

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
SECTOR = 512

_SUFFIX = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB, "P": 1 << 50, "E": 1 << 60}


def align_down(value: int, unit: int) -> int:
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def parse_size(text: str, *, default_suffix: str = "") -> int:
    """Read a size as qemu-img spells it: `10G`, `1.5M`, `512`, `64k`, `0x200`. Units are binary.

    Raises UsageError for anything else, for negative sizes and above 2^63 - 1.
    """
    stripped = text.strip()
    number, suffix = stripped, default_suffix
    hexadecimal = stripped[:2].lower() == "0x"
    if not hexadecimal and stripped and stripped[-1].upper() in _SUFFIX:
        number, suffix = stripped[:-1], stripped[-1].upper()
    try:
        unit = _SUFFIX[suffix.upper()]
        if hexadecimal:
            value = int(number, 16) * unit
        elif "." in number:
            whole, _, fraction = number.partition(".")
            if not (fraction.isdigit() and (whole.isdigit() or not whole)):
                raise ValueError
            value = int(whole or "0") * unit + int(fraction) * unit // 10 ** len(fraction)
        elif number.isdigit() and number.isascii():
            value = int(number) * unit
        else:
            raise ValueError
    except (ValueError, KeyError):
        raise UsageError(
            f"'{text}' is not a size", hint="use a number with an optional suffix k, M, G, T, P or E"
        ) from None
    if value >= 1 << 63:
        raise UsageError(f"size '{text}' is too large", hint="the limit is 8 EiB - 1")
    return value


def format_size(value: int) -> str:
    """A size for a person, three significant digits: `1.5 GiB`, `196 KiB`, `512 B`."""
    if value < KIB:
        return f"{value} B"
    for suffix in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value_f = value / KIB
        if value_f < 999.5 or suffix == "EiB":
            return f"{value_f:.3g} {suffix}"
        value = int(value_f)
    raise AssertionError("unreachable")
