"""What the property tests draw: grids, ranges, data, scales and statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dopt_api.quantizer import Grid, Statistics
from dopt_api.quantizer.affine import LARGEST_END

__all__ = ["batches", "data", "finite", "grids", "moderate", "names", "ranges", "same_bits", "scales", "statistics_of"]

F32 = np.float32

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
"""Every finite float32, subnormal and huge ones included."""

moderate = st.one_of(st.just(0.0), st.floats(2.0**-40, 2.0**40, width=32), st.floats(-(2.0**40), -(2.0**-40), width=32))
"""Float32 numbers that stay normal when multiplied or divided by a few powers of two."""

scales = st.floats(float(F32(2.0**-149)), float(F32(2.0**100)), width=32)
"""Positive scales, subnormal ones included."""

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
"""Names that can be written as UTF-8."""


@st.composite
def grids(draw: st.DrawFn, *, symmetric: bool | None = None, max_bits: int = 16) -> Grid:
    """Draw a grid, symmetric or not as asked."""
    signed = draw(st.booleans()) or bool(symmetric)
    centred = signed and (draw(st.booleans()) if symmetric is None else symmetric)
    narrow = signed and draw(st.booleans())
    return Grid(draw(st.integers(2, max_bits)), signed=signed, symmetric=centred, narrow=narrow)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[float, float]:
    """Draw a least and a greatest value; they need not contain zero."""
    ends = st.floats(float(F32(-LARGEST_END)), float(F32(LARGEST_END)), width=32)
    low, high = sorted([draw(ends), draw(ends)])
    return low, high


def data(elements: st.SearchStrategy[float] = finite, max_dims: int = 3) -> st.SearchStrategy[Any]:
    """Return arrays of float32, empty ones included."""
    return hnp.arrays(F32, hnp.array_shapes(min_dims=1, max_dims=max_dims, min_side=0, max_side=5), elements=elements)


@st.composite
def batches(draw: st.DrawFn, elements: st.SearchStrategy[float] = finite, max_batches: int = 4) -> list[Any]:
    """Draw batches ``[N, C, ...]`` of the same sample shape; ``N`` may be 0."""
    sample = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=3))
    sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=max_batches))
    return [draw(hnp.arrays(F32, (size, *sample), elements=elements)) for size in sizes]


def statistics_of(*parts: Any) -> Statistics:
    """Return the statistics of batches, taken in one after the other."""
    result = Statistics()
    for part in parts:
        result.update(part)
    return result


def same_bits(first: Statistics, second: Statistics) -> bool:
    """Return whether every part is equal in dtype, shape and bytes."""
    pairs = zip(first.arrays().values(), second.arrays().values(), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)
