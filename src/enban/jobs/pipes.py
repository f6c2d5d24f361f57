"""Convert from standard input and to standard output.

A pipe cannot be measured or sought. From standard input comes a raw disk that ends where the
pipe ends: the target grows while it is read. To standard output only raw can go, because
every other format begins with tables that are known last.
"""

from __future__ import annotations

import sys

from ..block.codec import deflater
from ..errors import HostError, UsageError, from_oserror
from ..units import align_up
from .copier import PIECE, ConvertResult
from .create import prepare_target
from .sources import READ
from .zeroes import find_data, is_zero

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..block.cipher import Passphrase
    from ..block.disk import Disk
    from ..block.gate import Gate
    from .progress import Report
    from .sources import Sources


def write_stdout(sources: Sources, format: str, progress: Report | None) -> ConvertResult:
    """Write a whole disk to standard output as raw. Raises HostError if the reader goes away."""
    if format != "raw":
        raise UsageError(f"format {format} cannot be written to a pipe", hint="use -O raw, or name a file")
    result = ConvertResult(sources.size)
    buffer = memoryview(bytearray(PIECE))
    out = sys.stdout.buffer
    try:
        position = 0
        while position < sources.size:
            length, kind = sources.extent(position, min(PIECE, sources.size - position))
            if kind == READ:
                sources.read(buffer[:length], position)
                result.bytes_read += length
            else:
                buffer[:length] = bytes(length)
            out.write(buffer[:length])
            position += length
            if progress is not None:
                progress(position, sources.size)
        out.flush()
    except OSError as error:
        if isinstance(error, HostError):
            raise
        raise from_oserror(error, "write to standard output", "-") from error
    result.bytes_written = sources.size
    return result


def convert_stdin(
    target: str,
    format: str,
    options: dict[str, str],
    *,
    cache: str,
    gate: Gate,
    compress: bool,
    passphrase: Passphrase = None,
    progress: Report | None,
) -> ConvertResult:
    """Read a raw disk from standard input to its end. Its length is rounded up to 512 bytes."""
    if target == "-":
        raise UsageError("one of source and target must be a file")
    buffer = memoryview(bytearray(PIECE))
    with prepare_target(
        target, format, options, size=0, cache=cache, gate=gate, passphrase=passphrase
    ) as made:
        disk = made.disk
        if compress and not disk.node.codec:
            raise UsageError(f"format {format} cannot hold compressed clusters", path=target)
        total = 0
        result = ConvertResult(0)
        while n := _fill(buffer):
            if total + n > disk.size:
                disk.resize(align_up(max(total + n, 2 * disk.size), PIECE))
            if n < PIECE:
                buffer[n:] = bytes(PIECE - n)
            result.bytes_written += _store(disk, buffer[: align_up(n, 512)], total, compress)
            total += n
            if progress is not None:
                progress(total, 0)
        disk.resize(align_up(total, 512))
        made.commit()
    result.size = result.bytes_read = total
    return result


def _fill(buffer: memoryview) -> int:
    """Read until the buffer is full or the input ends."""
    done = 0
    try:
        while done < len(buffer) and (data := sys.stdin.buffer.read(len(buffer) - done)):
            buffer[done : done + len(data)] = data
            done += len(data)
    except OSError as error:
        raise from_oserror(error, "read standard input", "-") from error
    return done


def _store(disk: Disk, view: memoryview, offset: int, compress: bool) -> int:
    """Write what is not zero of a buffer; how many bytes that were."""
    if not compress:
        parts = find_data(view, 4096)
        for first, last in parts:
            disk.pwrite(view[first:last], offset + first)
        return sum(last - first for first, last in parts)
    written = 0
    deflate, cluster = deflater(disk.node.codec), disk.node.cluster_size
    for first in range(0, len(view), cluster):
        data = view[first : first + cluster]
        if is_zero(data):
            continue
        packed = deflate(bytes(data) + bytes(cluster - len(data)))
        if len(packed) < cluster:
            disk.write_packed(packed, offset + first)
        else:
            disk.pwrite(data, offset + first)
        written += len(data)
    return written
