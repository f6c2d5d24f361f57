"""Statistics of a bench row: medians, spread, ratios, and how a cost grows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle and the ends of some samples."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if not samples:
            raise ValueError("no samples")
        return cls(min(samples), statistics.median(samples), max(samples))


def ratio(peer: Sequence[float], ours: Sequence[float]) -> Spread:
    """Peer time / our time: of the medians, with the smallest and largest ratio of a pair.

    A pair (the k-th sample of each) shares whatever the machine was busy with. The ends are widened to hold
    the ratio of the medians, which need not lie between them.
    """
    middle = statistics.median(peer) / statistics.median(ours)
    pairs = [one / other for one, other in zip(peer, ours, strict=False)]
    return Spread(min([middle, *pairs]), middle, max([middle, *pairs]))


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The power p for which cost ~ size**p fits best (in logarithms): 1 is linear, 0 constant."""
    if len(sizes) < 2:
        raise ValueError("growth needs two sizes or more")
    slope, _ = statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    )
    return slope
