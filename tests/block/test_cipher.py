"""The AES of old qcow images, against a version that follows the description word for word."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.block.cipher import LegacyAes, MissingKey, read_key_file
from enban.errors import HostError, UnsupportedFeatureError, UsageError
from tests.qcow_support import needs_cryptography


def plain_aes(passphrase: bytes, data: bytes, offset: int) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = algorithms.AES((passphrase + bytes(16))[:16])
    out = b""
    for at in range(0, len(data), 512):
        sector = (offset + at) // 512
        encryptor = Cipher(key, modes.CBC(sector.to_bytes(16, "little"))).encryptor()
        out += encryptor.update(data[at : at + 512]) + encryptor.finalize()
    return out


@needs_cryptography
@given(
    passphrase=st.binary(min_size=1, max_size=20).filter(lambda p: b"\0" not in p),
    sectors=st.integers(1, 9),
    first=st.one_of(st.integers(0, 5), st.integers(0, (1 << 54) - 10)),
    seed=st.binary(min_size=8, max_size=8),
)
def test_sectors(passphrase: bytes, sectors: int, first: int, seed: bytes) -> None:
    data = (seed * 64 * sectors)[: 512 * sectors]
    cipher = LegacyAes(passphrase, name="x")
    packed = cipher.encrypt(data, first * 512)
    assert packed == plain_aes(passphrase, data, first * 512)
    buffer = bytearray(packed)
    cipher.decrypt(memoryview(buffer), first * 512)
    assert buffer == data


@needs_cryptography
def test_a_passphrase_ends_at_a_zero_byte_and_after_sixteen() -> None:
    data = bytes(512)
    assert LegacyAes(b"ab\0cd", name="x").encrypt(data, 0) == LegacyAes(b"ab", name="x").encrypt(data, 0)
    long = b"0123456789abcdef"
    assert LegacyAes(long + b"more", name="x").encrypt(data, 0) == LegacyAes(long, name="x").encrypt(data, 0)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_cryptography(name: str, *rest: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_cryptography)
    with pytest.raises(UnsupportedFeatureError, match=r"disk.qcow: .*enban\[crypto\]"):
        LegacyAes(b"x", name="disk.qcow")


def test_without_a_passphrase() -> None:
    for call in (MissingKey("x").decrypt, MissingKey("x").encrypt):
        with pytest.raises(UsageError, match="no passphrase"):
            call(bytearray(512), 0)


def test_key_files(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"secret\n")
    assert read_key_file(str(tmp_path / "key")) == b"secret\n"
    with pytest.raises(HostError, match="read the key file: no such file"):
        read_key_file(str(tmp_path / "none"))
