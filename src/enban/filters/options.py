"""Filters by name and options, as the catalog finds them in a chain.

driver=qcow2,file.driver=throttle,file.bps-write=10M,file.file.filename=disk.qcow2

throttle   bps-total, bps-read, bps-write, iops-total, iops-read, iops-write, burst-ms
trace      log (a file)
delay      most-us, share (percent), seed
faults     operation (write, read, flush, zero, discard, truncate, allocate; several with +),
           at (the first call that fails, from 1), sticky (on: all later ones too),
           errno (EIO, ENOSPC, ...), done (bytes moved before the failure)
writelog   log (a file)
"""

from __future__ import annotations

from ..errors import UsageError
from ..units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..block.storage import Storage

    Options = dict[str, Any]

_LIMITS = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")


def open_filter(driver: str, below: Storage, options: Options) -> Storage:
    """The filter in front of a storage. Raises UsageError, HostError."""
    given = {key: value for key, value in options.items() if key not in ("driver", "file")}
    make = {
        "throttle": _throttle,
        "trace": _trace,
        "delay": _delay,
        "faults": _faults,
        "writelog": _writelog,
    }
    filter_ = make[driver](below, given)
    if given:
        raise UsageError(f"filter {driver} has no option '{next(iter(given))}'")
    return filter_


def _size(options: Options, key: str, default: int = 0) -> int:
    value = options.pop(key, default)
    return value if isinstance(value, int) and value >= 0 else parse_size(str(value))


def _text(options: Options, key: str, driver: str) -> str:
    value = options.pop(key, None)
    if not isinstance(value, str) or not value:
        raise UsageError(f"filter {driver} needs the option {key}", hint=f"give {key}=...")
    return value


def _throttle(below: Storage, options: Options) -> Storage:
    from .throttle import Throttle

    limits = {key.replace("-", "_"): _size(options, key) for key in _LIMITS}
    return Throttle(below, **limits, burst_s=_size(options, "burst-ms", 100) / 1000)


def _trace(below: Storage, options: Options) -> Storage:
    from .trace import trace_to_file

    return trace_to_file(below, _text(options, "log", "trace"))


def _writelog(below: Storage, options: Options) -> Storage:
    from .logfile import LogFile

    return LogFile(below, _text(options, "log", "writelog"))


def _delay(below: Storage, options: Options) -> Storage:
    from .delay import Delay

    most, share = _size(options, "most-us", 2000), _size(options, "share", 100)
    return Delay(below, _size(options, "seed"), most_s=most / 1e6, share=share / 100)


def _faults(below: Storage, options: Options) -> Storage:
    import errno

    from . import faults

    names = {
        "read": faults.READ,
        "write": faults.WRITE,
        "flush": faults.FLUSH,
        "zero": faults.ZERO,
        "discard": faults.DISCARD,
        "truncate": faults.TRUNCATE,
        "allocate": faults.ALLOCATE,
    }
    wanted = str(options.pop("operation", "write")).split("+")
    number = str(options.pop("errno", "EIO"))
    sticky = str(options.pop("sticky", "off")).lower()
    if unknown := [name for name in wanted if name not in names]:
        raise UsageError(f"operation '{unknown[0]}' is not known", hint=f"use {' or '.join(names)}")
    code = getattr(errno, number, None) if number.startswith("E") else None
    if not isinstance(code, int):
        raise UsageError(f"'{number}' is no error number", hint="use EIO, ENOSPC, ...")
    if sticky not in ("on", "off", "true", "false"):
        raise UsageError(f"sticky is on or off, not '{sticky}'")
    decide = faults.fail_at(
        _size(options, "at", 1),
        operations=[names[name] for name in wanted],
        errno=code,
        sticky=sticky in ("on", "true"),
        done=_size(options, "done"),
    )
    return faults.Faults(below, decide)
