"""What is said when a file below an image cannot be opened: which file, and who names it."""

from __future__ import annotations

from pathlib import Path

import pytest

import enban as library
from tests.cli.command import enban, refused
from tests.support import MIB, make_qcow2

VERBS = (
    ("map", "top"),
    ("info", "--backing-chain", "top"),
    ("convert", "top", "out.raw"),
    ("commit", "-b", "bottom", "top"),
    ("rebase", "-b", "", "top"),
    ("stream", "top"),
    ("serve", "top"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """top over middle over bottom, qcow2 over qcow2 over raw; names are relative to the directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bottom").write_bytes(bytes(MIB))
    make_qcow2(tmp_path / "middle", MIB, backing_file="bottom", backing_fmt="raw")
    make_qcow2(tmp_path / "top", MIB, backing_file="middle", backing_fmt="qcow2")
    return tmp_path


@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[0])
def test_a_missing_backing_file(folder: Path, words: tuple[str, ...]) -> None:
    (folder / "bottom").unlink()
    line = refused(*words)
    assert line.startswith("enban: bottom (backing file of middle): cannot open")
    assert line.endswith("no such file or directory")


@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[0])
def test_a_chain_that_comes_back(folder: Path, words: tuple[str, ...]) -> None:
    enban("rebase", "-u", "-b", "top", "-F", "qcow2", "middle")
    line = refused(*words)
    assert line.startswith("enban: top (backing file of middle): the backing chain comes back to this file;")


def test_damage_below_is_told_with_its_place(folder: Path) -> None:
    with (folder / "middle").open("r+b") as file:
        file.seek(20)
        file.write((5).to_bytes(4, "big"))  # cluster_bits
    line = refused("map", "top")
    assert (
        line == "enban: middle (backing file of top): cluster size 2^5 is outside 2^9..2^21 (at offset 0x14)"
    )


def test_a_name_that_is_no_reference(folder: Path) -> None:
    enban("rebase", "-u", "-b", "json:nonsense", "-F", "raw", "middle")
    assert refused("map", "top").startswith("enban: middle: backing file: 'json:nonsense' is not valid JSON")


def test_a_missing_data_file(folder: Path) -> None:
    enban("create", "-q", "-f", "qcow2", "-o", "data_file=middle.data", "middle", "1M")
    (folder / "middle.data").unlink()
    assert refused("map", "top").startswith("enban: middle.data (data file of middle): cannot open")


def test_what_a_person_named_is_not_laid_to_the_image(folder: Path) -> None:
    with pytest.raises(library.EnbanError) as caught:
        library.open({"driver": "qcow2", "file": {"filename": "top"}, "backing": {"filename": "nothing"}})
    assert str(caught.value) == "nothing: cannot open: no such file or directory"
