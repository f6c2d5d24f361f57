"""Encryption of guest data, the one place that talks to a cryptography library.

A node whose DATA extents hold encrypted bytes has a `cipher`; the mover then reads and
writes whole 512-byte sectors and passes them through it. Only the AES of old qcow images is
here. It is weak (no salt, no check of the passphrase, ciphertexts of equal sectors at equal
places show that they are equal): good for reading and keeping old images, not for secrets.
"""

from __future__ import annotations

from ..errors import UnsupportedFeatureError, UsageError, from_oserror
from ..units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..units import GuestOffset

    # What callers may give: the passphrase (text as UTF-8), or a function asked with an image's name that
    # answers None where it has none.
    Passphrase = str | bytes | Callable[[str], str | bytes | None] | None

_KEY_BYTES = 16
_BLOCK = 16
_KEY_FILE_BYTES = 4096


class Cipher:
    """Turns sectors of guest data into what is stored and back. Both calls may run in any thread.

    The data is a whole number of 512-byte sectors; `offset` is the guest offset of the first.
    """

    def decrypt(self, buffer: bytearray | memoryview, offset: GuestOffset) -> None:
        """Decrypt in place."""
        raise NotImplementedError

    def encrypt(self, data: bytes | bytearray | memoryview, offset: GuestOffset) -> bytes:
        raise NotImplementedError


class MissingKey(Cipher):
    """Stands in where an encrypted image is opened for its tables alone."""

    def __init__(self, name: str) -> None:
        self._name = name

    def decrypt(self, buffer: bytearray | memoryview, offset: GuestOffset) -> None:
        raise no_passphrase(self._name)

    def encrypt(self, data: bytes | bytearray | memoryview, offset: GuestOffset) -> bytes:
        raise no_passphrase(self._name)


def no_passphrase(name: str) -> UsageError:
    return UsageError(
        "the image is encrypted and no passphrase was given",
        path=name,
        hint="give it as passphrase=, or its file with the option encrypt.key-file=FILE",
    )


def passphrase_for(name: str, given: Passphrase) -> bytes | None:
    """The passphrase of the image `name`, asked for if need be; None if there is none."""
    answer = given(name) if callable(given) else given
    return answer.encode("utf-8", "surrogateescape") if isinstance(answer, str) else answer


class LegacyAes(Cipher):
    """AES-128 in CBC mode, each sector by itself, as qcow and qcow2 encryption method 1 use it.

    The key is the passphrase, cut to 16 bytes or filled up with zero bytes. A sector's initial
    vector is its number (guest offset / 512) as 16 bytes little-endian.
    """

    def __init__(self, passphrase: bytes, *, name: str) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher as LibraryCipher
            from cryptography.hazmat.primitives.ciphers import algorithms, modes
        except ImportError:
            raise UnsupportedFeatureError(
                "the image is encrypted, which needs the package cryptography",
                path=name,
                hint="run: pip install 'enban[crypto]'",
            ) from None
        # A passphrase ends at a zero byte, as it does in a program in C.
        key = algorithms.AES(passphrase.split(b"\0")[0][:_KEY_BYTES].ljust(_KEY_BYTES, b"\0"))

        def start(vector: bytes) -> LibraryCipher[modes.CBC]:
            return LibraryCipher(key, modes.CBC(vector))

        self._start = start

    # One context for many sectors is several times as fast as one for each. Run on from one
    # sector to the next, CBC mixes the ciphertext before a sector into its first block in
    # place of the sector's own vector; both calls put that right with a XOR of that block.

    def decrypt(self, buffer: bytearray | memoryview, offset: GuestOffset) -> None:
        sector = offset // SECTOR
        packed = bytes(buffer)
        buffer[:] = self._start(sector.to_bytes(_BLOCK, "little")).decryptor().update(packed)
        number = int.from_bytes
        for place in range(SECTOR, len(packed), SECTOR):
            sector += 1
            before = number(packed[place - _BLOCK : place], "little")
            first = number(buffer[place : place + _BLOCK], "little")
            buffer[place : place + _BLOCK] = (first ^ before ^ sector).to_bytes(_BLOCK, "little")

    def encrypt(self, data: bytes | bytearray | memoryview, offset: GuestOffset) -> bytes:
        plain = memoryview(data)
        sector = offset // SECTOR
        update = self._start(bytes(_BLOCK)).encryptor().update
        parts = []
        before = 0
        for place in range(0, len(plain), SECTOR):
            first = int.from_bytes(plain[place : place + _BLOCK], "little") ^ before ^ sector
            parts.append(update(first.to_bytes(_BLOCK, "little")))
            parts.append(update(plain[place + _BLOCK : place + SECTOR]))
            before = int.from_bytes(parts[-1][-_BLOCK:], "little")
            sector += 1
        return b"".join(parts)


def read_key_file(path: str) -> bytes:
    """The passphrase in a file: all of its bytes, a newline at the end too, as QEMU takes them.

    Raises HostError.
    """
    try:
        with open(path, "rb") as file:
            return file.read(_KEY_FILE_BYTES)
    except OSError as error:
        raise from_oserror(error, "read the key file", path) from error
