"""What the gate lets an image open."""

from __future__ import annotations

from pathlib import Path

import pytest

import enban
from enban.errors import GateError


@pytest.mark.parametrize("name", ["base.raw", "sub/base.raw", "./base.raw", "sub/../base.raw"])
def test_siblings_are_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    enban.SIBLINGS.check(name, image=str(tmp_path / "disk.qcow2"), role="backing file")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../base.raw",
        "sub/../../base.raw",
        "json:{}",
        "nbd://host/x",
        "link",
        "dir/passwd",
        "a\0b",
        "..",
    ],
)
def test_others_are_not(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "dir").symlink_to("/etc")
    with pytest.raises(GateError, match="outside its own directory"):
        enban.SIBLINGS.check(name, image=str(tmp_path / "disk.qcow2"), role="backing file")
    enban.TRUSTED.check(name, image=str(tmp_path / "disk.qcow2"), role="backing file")
    with pytest.raises(GateError, match="not allowed"):
        enban.CLOSED.check(name, image=str(tmp_path / "disk.qcow2"), role="backing file")


def test_an_image_in_a_linked_directory_has_siblings(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "real")
    enban.SIBLINGS.check("base.raw", image=str(tmp_path / "images" / "disk.qcow2"), role="backing file")
