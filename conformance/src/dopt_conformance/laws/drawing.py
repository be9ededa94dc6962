"""What the laws are tried on: grids, scales and data, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from dopt_api.quantizer import Grid

__all__ = ["Case", "activation_cases", "grids", "weight_cases", "weight_grids"]

Float32 = NDArray[np.float32]

SHAPES = ((), (0,), (1,), (7,), (2, 3), (3, 1, 4), (2, 0, 3), (2, 3, 2, 2))
"""Few shapes, since frameworks prepare kernels for each; scalars, empty arrays and single channels are among them."""

CHANNELED = (((4, 1), 0), ((1, 3), 0), ((3, 2), 1), ((2, 3, 2), 1), ((2, 1, 2, 3), 1), ((5, 1), 1), ((2, 2, 1, 3), 3))
"""Shapes of weights with the axis of their channels."""


@dataclass(frozen=True, eq=False)
class Case:
    """Data with the parameters to quantize them.

    Attributes:
        x: The data.
        scale: ``[]`` or ``[C]``.
        zero_point: Of the same shape.
        grid: The integers.
        axis: The axis of the channels, or ``None``.
    """

    x: Float32
    scale: Float32
    zero_point: NDArray[np.int32]
    grid: Grid
    axis: int | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of :meth:`dopt_conformance.Harness.fake_quantize`."""
        return self.x, self.scale, self.zero_point, self.grid, self.axis

    def on_data(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values ``[]`` or ``[C]`` in a shape that broadcasts to that of the data."""
        if self.axis is None:
            return values
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(self.x.ndim)])

    def __repr__(self) -> str:
        bits = [np.asarray(part).tolist() for part in (self.x, self.scale, self.zero_point)]
        return f"Case(x={bits[0]}, scale={bits[1]}, zero_point={bits[2]}, grid={self.grid}, axis={self.axis})"


weight_grids = st.builds(
    Grid,
    st.integers(2, 16),
    signed=st.just(True),
    symmetric=st.just(True),
    narrow=st.booleans(),
    per_channel=st.just(True),
)
"""Symmetric grids."""

_asymmetric = st.builds(Grid, st.integers(2, 16), signed=st.booleans())

grids = st.one_of(_asymmetric, weight_grids)
"""Grids of every kind."""

# data in units of the scale: about the integers, on ties, far out, and without end
_steps = st.one_of(
    st.floats(-300, 300, width=32),
    st.integers(-70000, 70000).map(lambda n: n + 0.5),
    st.integers(-70000, 70000).map(float),
    st.floats(-1e6, 1e6, width=32),
    st.sampled_from([0.0, -0.0, np.inf, -np.inf]),
)
_mantissas = st.floats(1.0, 2.0, width=32, exclude_max=True)


def _scales(low: int, high: int) -> st.SearchStrategy[float]:
    return st.builds(lambda mantissa, exponent: mantissa * 2.0**exponent, _mantissas, st.integers(low, high))


def _data(shape: tuple[int, ...]) -> st.SearchStrategy[NDArray[np.float64]]:
    return hnp.arrays(np.float64, shape, elements=_steps)


def _normal(x: NDArray[np.float64]) -> Float32:
    """Return float32 without subnormal numbers, which a law of their own is about."""
    single = x.astype(np.float32)
    return np.where(np.abs(single) < np.finfo(np.float32).tiny, np.float32(0.0), single)


@st.composite
def activation_cases(draw: st.DrawFn, low: int = -100, high: int = 90) -> Case:
    """Draw data with one scale between ``2**low`` and ``2**high``."""
    grid = draw(grids)
    scale = np.float32(draw(_scales(low, high)))
    zero_point = 0 if grid.symmetric else draw(st.integers(grid.qmin, grid.qmax))
    steps = draw(st.sampled_from(SHAPES).flatmap(_data))
    return Case(_normal(steps * scale), np.asarray(scale), np.asarray(zero_point, np.int32), grid, None)


@st.composite
def weight_cases(draw: st.DrawFn, low: int = -100, high: int = 90) -> Case:
    """Draw a weight with a scale for each channel."""
    grid = draw(weight_grids)
    shape, axis = draw(st.sampled_from(CHANNELED))
    scale = np.asarray(draw(st.lists(_scales(low, high), min_size=shape[axis], max_size=shape[axis])), np.float32)
    case = Case(np.zeros(shape, np.float32), scale, np.zeros(scale.shape, np.int32), grid, axis)
    steps = draw(_data(shape))
    return Case(_normal(steps * case.on_data(scale)), scale, case.zero_point, grid, axis)
