"""What tests with guests share: a place for their machines, and a Linux guest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.tiny_guest import CannotBuild, build


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A short XDG_RUNTIME_DIR of its own: tests do not meet each other's machines."""
    with tempfile.TemporaryDirectory(prefix="enban-t") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield folder


@pytest.fixture(scope="session")
def linux(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings that boot the tiny guest; skips the test if it cannot be had."""
    folder = tmp_path_factory.mktemp("linux")
    try:
        build(folder)
    except CannotBuild as error:
        pytest.skip(str(error))
    return {
        "kernel": str(folder / "kernel"),
        "initrd": str(folder / "initrd"),
        "append": "console=ttyS0 quiet panic=-1",
        "memory": 256 << 20,
        "accel": "tcg",
    }
