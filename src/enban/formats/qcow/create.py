"""Making a new qcow image.

    offset 0     header, 48 bytes
    then         backing file name, filled up to a multiple of 8
    then         L1 table, filled up to a multiple of 512

Everything else grows behind. The caller makes the file appear under its name only when
it is complete.
"""

from __future__ import annotations

from ...block.cipher import read_key_file
from ...errors import UsageError
from ...units import SECTOR, align_up
from ...wire.qcow import (
    CRYPT_AES,
    HEADER,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L2_BITS,
    MIN_CLUSTER_BITS,
    MIN_L2_BITS,
    Header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.storage import Storage


class QcowOptions:
    """Creation options; sizes in bytes. `header` raises UsageError.

    cluster_size, l2_entries: 0 takes what QEMU takes: 4096 and 512, with a backing file 512 and 4096
        (small clusters, so that little is copied from the backing file). Only QEMU's own choice is
        fixed; any power of two from 512 to 64K, and from 64 to 8192, is read by it too.
    backing_fmt: accepted for the sake of the other formats; qcow has no place to keep it, so the
        backing file's format is found out again at each opening.
    encrypt_format: "" or "aes"; encryption: the old way to say "aes". encrypt_key_file: the file with the
        passphrase. It leaves no trace in the image (options `encrypt.key-file` give it at each opening);
        here it is only checked to be there and not empty.
    """

    def __init__(
        self,
        size: int,
        *,
        cluster_size: int = 0,
        l2_entries: int = 0,
        backing_file: str = "",
        backing_fmt: str = "",
        encryption: bool = False,
        encrypt_format: str = "",
        encrypt_key_file: str = "",
    ) -> None:
        self.size = size
        self.cluster_size = cluster_size
        self.l2_entries = l2_entries
        self.backing_file = backing_file
        self.backing_fmt = backing_fmt
        self.encrypt_format = encrypt_format or ("aes" if encryption else "")
        self.encrypt_key_file = encrypt_key_file

    def header(self) -> Header:
        """The header these options ask for. Its size is a multiple of 512: QEMU would not show the
        rest. Raises UsageError; HostError if the key file cannot be read."""
        header = Header()
        name = encode_backing_name(self.backing_file)
        if self.backing_fmt and not name:
            raise UsageError("a backing format needs a backing file")
        header.cluster_bits = _exponent(
            "cluster size", self.cluster_size or (512 if name else 4096), MIN_CLUSTER_BITS, MAX_CLUSTER_BITS
        )
        header.l2_bits = _exponent(
            "L2 table length", self.l2_entries or (4096 if name else 512), MIN_L2_BITS, MAX_L2_BITS
        )
        if self.encrypt_format not in ("", "aes"):
            raise UsageError(f"encryption format '{self.encrypt_format}' is not known", hint="use aes")
        if self.encrypt_key_file and not self.encrypt_format:
            raise UsageError("encrypt.key-file needs encrypt.format=aes")
        if self.encrypt_key_file and not read_key_file(self.encrypt_key_file):
            raise UsageError("the key file is empty", path=self.encrypt_key_file)
        if self.encrypt_format:
            header.crypt_method = CRYPT_AES
        header.size = align_up(self.size, SECTOR)
        if not 0 <= header.size <= header.largest_size:
            raise UsageError(
                f"a size of {self.size} bytes is too large for clusters of {header.cluster_size} bytes",
                hint=f"the limit is {header.largest_size}; use a larger cluster size",
            )
        header.backing_name = name
        if name:
            header.backing_offset, header.backing_length = HEADER.size, len(name)
        header.l1_offset = align_up(HEADER.size + len(name), 8)
        return header

    def warnings(self) -> list[str]:
        """What a person who asks for such an image should know, one line each."""
        lines = []
        if self.encrypt_format:
            lines.append("the encryption of qcow images is weak; use it only where an old program needs it")
        if not self.size:
            lines.append("QEMU does not open qcow images of size 0")
        return lines


def encode_backing_name(name: str) -> bytes:
    """A backing file's name as the image holds it. Raises UsageError."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > MAX_BACKING_NAME:
        raise UsageError(f"backing file name is longer than {MAX_BACKING_NAME} bytes")
    if b"\0" in encoded:
        raise UsageError("backing file name holds a NUL byte")
    return encoded


def _exponent(what: str, value: int, least: int, most: int) -> int:
    bits = value.bit_length() - 1
    if value != 1 << max(bits, 0) or not least <= bits <= most:
        raise UsageError(
            f"{what} {value} is not possible", hint=f"use a power of two from {1 << least} to {1 << most}"
        )
    return bits


async def write_empty(file: Storage, header: Header) -> None:
    """Write an image without data to an empty storage. Raises HostError."""
    l1_bytes = align_up(header.l1_entries * 8, SECTOR)
    if file.fixed_size:  # old content of a device must not look like a table
        await file.write_zeroes(0, header.l1_offset + l1_bytes, unmap=False)
    else:
        await file.truncate(header.l1_offset + l1_bytes)
    await file.write(header.build(), 0)
