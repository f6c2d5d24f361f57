"""docs/tutorial-guest.md, followed as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from enban.errors import EnbanError
from enban.guest import control
from scripts.tiny_guest import CannotBuild, fetch
from tests.docs_blocks import ROOT, Reader
from tests.support import needs_qemu_system

PAGE = ROOT / "docs" / "tutorial-guest.md"


@needs_qemu_system
def test_the_tutorial_rewinds_a_guest(tmp_path: Path) -> None:
    try:
        fetch()
    except CannotBuild as error:
        pytest.skip(str(error))
    try:
        Reader(PAGE, tmp_path).follow()
    finally:
        try:
            control.ask("disk", "shutdown", force=True)
        except EnbanError:
            pass  # it has been shut down, as the page does at its end
