"""The lab itself: broken variants of the engine, each of which it must find in under a minute."""

from __future__ import annotations

from time import monotonic

import pytest

from enban.lab import parts
from enban.lab.campaign import make_parts
from tests.lab.mutants import MUTANTS

MOST_S = 60.0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if long else [])
        for name, (_, _, long, _) in MUTANTS.items()
    ],
)
def test_the_lab_finds_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part_name, only, _, break_it = MUTANTS[name]
    monkeypatch.setattr(parts, "SHRINK_S", 2.0)
    (part,) = make_parts([part_name], 1, only=only)
    break_it(monkeypatch)
    began = monotonic()
    try:
        while (finding := part.step()) is None:
            assert monotonic() - began < MOST_S, f"{name} was not found by {part_name}: {part.counts}"
    finally:
        part.close()
    print(f"{name}: {finding.kind} after {monotonic() - began:.1f} s, {finding.text}")
    if part_name == "crash":
        assert 0 < len(finding.script) <= parts.OPERATIONS
