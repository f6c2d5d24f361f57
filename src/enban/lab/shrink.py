"""Cutting a failing script down: as few operations as still fail."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


def shrink(script: list[T], fails: Callable[[list[T]], bool], *, seconds: float = 20.0) -> list[T]:
    """The shortest list found, in the time given, of which `fails` still says yes: parts are left out, halves
    first, then ever smaller ones, until no single one can be."""
    deadline = monotonic() + seconds
    size = max(1, len(script) // 2)
    while True:
        start, cut = 0, False
        while start < len(script):
            if monotonic() > deadline:
                return script
            shorter = script[:start] + script[start + size :]
            if shorter and fails(shorter):
                script, cut = shorter, True
            else:
                start += size
        if size == 1 and not cut:
            return script
        size = max(1, size // 2)
