"""Opening a qcow image: header, L1 table, passphrase and the checks at the door."""

from __future__ import annotations

from array import array

from ...block.cipher import LegacyAes, MissingKey, no_passphrase
from ...errors import CorruptImageError
from ...wire.qcow import HEADER, Header, parse_header
from ..common.tables import from_big_endian
from .node import QcowNode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...block.cipher import Cipher
    from ...block.runtime import Runtime
    from ...block.storage import Storage

_STRIDE = 1 << 20


async def read_header(file: Storage, name: str) -> Header:
    """The parsed header with the backing file's name. Raises ImageError, HostError."""
    header = parse_header(await file.read(0, min(HEADER.size, file.size())), file.size(), path=name)
    if header.backing_offset:
        header.backing_name = bytes(await file.read(header.backing_offset, header.backing_length))
        if b"\0" in header.backing_name:
            raise CorruptImageError(
                "backing file name holds a NUL byte", path=name, offset=header.backing_offset
            )
    return header


async def open_qcow(
    name: str,
    runtime: Runtime,
    file: Storage,
    *,
    writable: bool,
    metadata_only: bool = False,
    passphrase: Callable[[], bytes | None] | None = None,
) -> QcowNode:
    """An open image without its backing file; the caller attaches that.

    metadata_only: the caller will not touch guest data (info, map), so an encrypted image opens
        without its passphrase.
    passphrase: asked if the image is encrypted; None where there is none to give. A wrong one
        cannot be told from the right one: the data then reads as noise.
    Raises CorruptImageError, UnsupportedFeatureError, HostError; UsageError without a passphrase.
    """
    header = await read_header(file, name)
    cipher: Cipher | None = None
    if header.crypt_method:
        given = None if passphrase is None else passphrase()
        if given is not None:
            cipher = LegacyAes(given, name=name)
        elif metadata_only:
            cipher = MissingKey(name)
        else:
            raise no_passphrase(name)
    l1 = array("Q")
    end = header.l1_offset + header.l1_entries * 8
    for offset in range(header.l1_offset, end, _STRIDE):
        l1.extend(from_big_endian(await file.read(offset, min(_STRIDE, end - offset))))
    return QcowNode(name, runtime, file, header, l1, writable=writable, cipher=cipher)
