"""A histogram small enough to be noted for every layer of a network, and to be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dopt_api.quantizer.statistics import HALF_BINS, Statistics

__all__ = ["Histogram", "condensed"]


@dataclass(frozen=True)
class Histogram:
    """Counts over parts of equal width.

    Attributes:
        low: Where the first part begins.
        width: Of each part, a power of two; ``low`` is a multiple of it.
        counts: How many values lie in each.
    """

    low: float
    width: float
    counts: tuple[int, ...]

    @property
    def high(self) -> float:
        """Where the last part ends."""
        return self.low + self.width * len(self.counts)


def condensed(statistics: Statistics, parts: int = 64) -> Histogram:
    """Return the histogram of statistics in few parts, from the first that has any values to the last.

    Whole bins are added to one another: the result has the same bytes wherever the statistics have. Of the bin about
    zero, which is twice as wide, everything is counted to the right of zero.

    Args:
        statistics: Of some data.
        parts: How many parts there may be, two or more.

    Example:
        >>> statistics = Statistics()
        >>> statistics.update(np.array([[0.0, 0.1, 0.2, 0.9]], np.float32))
        >>> condensed(statistics, 4)
        Histogram(low=0.0, width=0.25, counts=(3, 0, 0, 1))
    """
    width = 2.0 ** (int(statistics.exponent) - 11)
    steps = np.arange(1 - HALF_BINS, HALF_BINS)
    steps[: HALF_BINS - 1] -= 1  # where each bin begins, in steps; bin 0 counts as [0, 1)
    taken = np.flatnonzero(statistics.counts)
    if not taken.size:
        return Histogram(0.0, width, ())
    first, last = int(steps[taken[0]]), int(steps[taken[-1]])
    shift = 0
    while (last >> shift) - (first >> shift) >= parts:
        shift += 1
    places = (steps[taken] >> shift) - (first >> shift)
    counts = np.zeros(int(places[-1]) + 1, np.int64)
    np.add.at(counts, places, statistics.counts[taken])
    coarse = width * (1 << shift)
    return Histogram((first >> shift) * coarse, coarse, tuple(int(one) for one in counts))
