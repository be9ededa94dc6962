"""One-pass statistics of activations that merge exactly, in any order and any grouping.

Every part of the state is combined by an operation that is associative and commutative to the bit: least and
greatest, integer addition, and a histogram whose bins are powers of two wide, so that a coarser histogram is the
exact sum of bins of a finer one. A distributed calibration is therefore an all-reduce of the parts, and its result
does not depend on batch size, batch order or the number of processes.

The extremes are taken over every element. The histogram looks at every sample and channel, but only at a regular
lattice of positions (:func:`lattice`) of at most :data:`PROBED` elements a sample: it estimates densities, for which
the lattice is plenty, at a small fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopt_api.errors import CalibrationError
from dopt_api.quantizer.affine import as_float32

__all__ = ["BINS", "HALF_BINS", "LIMB_UNITS", "LOWEST_EXPONENT", "PROBED", "Statistics", "lattice"]

HALF_BINS = 2048
"""Bin ``i`` holds the values ``x`` with ``trunc(x / width) == i``, for ``-HALF_BINS < i < HALF_BINS``."""

BINS = 2 * HALF_BINS - 1

LOWEST_EXPONENT = -100
"""No histogram is finer than that of data within ``2**LOWEST_EXPONENT``: bins are at least ``2**-111`` wide."""

PROBED = 1024
"""How many elements of each sample the histogram looks at, at most (never less than one per channel)."""

LIMB_BITS = 32
LIMB_UNITS: NDArray[np.float64] = np.exp2(-149.0 + LIMB_BITS * np.arange(9, dtype=np.float64))
"""Units of the limbs that hold exact sums of float32 numbers, from the smallest subnormal upwards."""


@lru_cache(maxsize=4096)
def lattice(shape: tuple[int, ...], channel_axis: int) -> tuple[slice, ...]:
    """Return the index of the elements that the histogram looks at.

    Axis 0 (samples) and the channel axis are taken whole; the other axes with one common stride, the smallest for
    which at most :data:`PROBED` elements a sample remain. The rule does not depend on the memory layout, so channels
    first and channels last see the same elements.

    Args:
        shape: Shape of the batch, samples first.
        channel_axis: The axis of the channels; may be negative.

    Example:
        >>> lattice((8, 64, 56, 56), 1)
        (slice(None, None, None), slice(None, None, None), slice(6, None, 13), slice(6, None, 13))
    """
    channels = channel_axis % len(shape)
    inner = [axis for axis in range(1, len(shape)) if axis != channels]
    allowed = max(1, PROBED // max(1, shape[channels] if channels else 1))
    stride = 1
    while prod(len(range(*_probe(shape[a], stride).indices(shape[a]))) for a in inner) > allowed:
        stride += 1
    return tuple(_probe(shape[a], stride) if a in inner else slice(None) for a in range(len(shape)))


def _probe(size: int, stride: int) -> slice:
    return slice(None) if stride == 1 else slice(min(stride // 2, size - 1), None, stride)


@dataclass(eq=False)
class Statistics:
    """What one pass over the data leaves of an activation tensor.

    A sample is one index of axis 0. Samples with NaN or infinity are counted and otherwise left out.

    Attributes:
        samples: Number of samples with finite values, int64 ``[]``.
        non_finite: Number of samples with NaN or infinity, int64 ``[]``.
        minimum: Least value, float32 ``[]``, ``inf`` before any data.
        maximum: Greatest value, float32 ``[]``, ``-inf`` before any data.
        sums: Exact sums of the samples' minima (row 0) and maxima (row 1), int64 ``[2, 9]`` limbs of
            :data:`LIMB_UNITS`.
        exponent: ``e`` such that all data lie in ``(-2**e, 2**e)``; the histogram's bins are ``2**e / 2048`` wide,
            the bin about zero twice that. int64 ``[]``.
        counts: The histogram, int64 ``[BINS]``.

    Example:
        >>> first, second = Statistics(), Statistics()
        >>> first.update([[0.0, 1.0], [-2.0, 3.0]])
        >>> second.update([[4.0, 5.0]])
        >>> both = first.merge(second)
        >>> float(both.minimum), float(both.maximum), int(both.samples)
        (-2.0, 5.0, 3)
        >>> both.mean_extremes()
        (0.6666666666666666, 3.0)
    """

    samples: NDArray[np.int64] = field(default_factory=lambda: np.zeros((), np.int64))
    non_finite: NDArray[np.int64] = field(default_factory=lambda: np.zeros((), np.int64))
    minimum: NDArray[np.float32] = field(default_factory=lambda: np.full((), np.inf, np.float32))
    maximum: NDArray[np.float32] = field(default_factory=lambda: np.full((), -np.inf, np.float32))
    sums: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, len(LIMB_UNITS)), np.int64))
    exponent: NDArray[np.int64] = field(default_factory=lambda: np.full((), LOWEST_EXPONENT, np.int64))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def __repr__(self) -> str:
        return (
            f"Statistics(samples={int(self.samples)}, non_finite={int(self.non_finite)}, "
            f"minimum={float(self.minimum):g}, maximum={float(self.maximum):g}, counted={int(self.counts.sum())})"
        )

    def update(self, batch: ArrayLike, channel_axis: int = 1) -> None:
        """Take in a batch ``[N, ...]``, samples first; an empty batch changes nothing."""
        data = as_float32(batch)
        if data.size == 0:
            return
        inner = tuple(range(1, data.ndim))
        low, high = data.min(axis=inner), data.max(axis=inner)
        finite = np.isfinite(low) & np.isfinite(high)
        new = Statistics(
            samples=np.asarray(finite.sum(), np.int64),
            non_finite=np.asarray((~finite).sum(), np.int64),
            minimum=np.asarray(np.where(finite, low, np.inf).min(), np.float32),
            maximum=np.asarray(np.where(finite, high, -np.inf).max(), np.float32),
            sums=_limbs(np.where(finite, np.stack([low, high]), 0.0)),
        )
        peak = np.where(finite, np.maximum(-low, high), 0.0).max(initial=2.0 ** (LOWEST_EXPONENT - 1))
        new.exponent = np.asarray(np.frexp(np.float32(peak))[1], np.int64)  # at least the lowest, also of all zeros
        probed = data[finite][lattice(data.shape, channel_axis)].astype(np.float64)
        bins = (probed / 2.0 ** (int(new.exponent) - 11)).astype(np.int64) + (HALF_BINS - 1)
        new.counts = np.bincount(bins.ravel(), minlength=BINS).astype(np.int64)
        self.__dict__.update(self.merge(new).__dict__)

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of both; associative and commutative to the bit."""
        exponent = np.maximum(self.exponent, other.exponent)
        zero = np.float32(0.0)  # added so that -0.0 becomes 0.0: which of the two is the lesser depends on the order
        return Statistics(
            samples=np.asarray(self.samples + other.samples),
            non_finite=np.asarray(self.non_finite + other.non_finite),
            minimum=np.asarray(np.minimum(self.minimum, other.minimum) + zero),
            maximum=np.asarray(np.maximum(self.maximum, other.maximum) + zero),
            sums=self.sums + other.sums,
            exponent=np.asarray(exponent),
            counts=self._counts_at(int(exponent)) + other._counts_at(int(exponent)),
        )

    def mean_extremes(self) -> tuple[float, float]:
        """Return the mean over samples of the samples' minima and of their maxima, rounded once to float64."""
        scale = 2 ** int(-np.log2(LIMB_UNITS[0]))  # the limbs as one exact integer, in units of the lowest limb
        low, high = (sum(int(limb) << (LIMB_BITS * i) for i, limb in enumerate(row)) for row in self.sums)
        count = int(self.samples) * scale
        return low / count, high / count

    def bin_edges(self) -> NDArray[np.float64]:
        """Return the ``BINS + 1`` edges of the histogram's bins, ascending, float64."""
        width = 2.0 ** (int(self.exponent) - 11)
        steps = np.arange(-HALF_BINS, HALF_BINS + 1, dtype=np.float64)
        return np.delete(steps, HALF_BINS) * width

    def check(self, layer: str, role: str = "input") -> None:
        """Raise if no range can be drawn from these statistics.

        Args:
            layer: The layer's name, for the message.
            role: Whether they are those of its ``input`` or its ``output``, likewise.

        Raises:
            CalibrationError: There are no data, or some had NaN or infinity.
        """
        if int(self.non_finite):
            total = int(self.non_finite) + int(self.samples)
            raise CalibrationError(
                f"The {role} of layer {layer!r} had NaN or infinity in {int(self.non_finite)} of {total} samples",
                where=f"layer {layer!r}",
                expected="finite values in every calibration sample",
                fix="Look for broken pictures or an overflow before this layer, then calibrate again.",
            )
        if not int(self.samples):
            raise CalibrationError(
                f"{'Layer' if role == 'input' else f'The {role} of layer'} {layer!r} has seen no data",
                where=f"layer {layer!r}",
                expected="at least one calibration sample",
                fix="Run forward passes that reach this layer while the calibration mode is on, or leave it 'float'.",
            )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the parts by name, as they stand in a checkpoint."""
        return dict(self.__dict__)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Statistics:
        """Rebuild statistics from :meth:`arrays`; dtypes and shapes are checked.

        Raises:
            CalibrationError: A part is missing, or has another shape or kind of number than it should.
        """
        empty = cls()
        parts: dict[str, NDArray[np.generic]] = {}
        for name, model in empty.__dict__.items():
            found = arrays.get(name)
            stored = np.asarray(found)
            if stored.shape != model.shape or not np.can_cast(stored.dtype, model.dtype, "same_kind"):
                raise CalibrationError(
                    f"The stored statistics have {'no' if found is None else 'a wrong'} {name!r}",
                    expected=f"{model.dtype} of shape {list(model.shape)}",
                    fix="Calibrate again.",
                )
            parts[name] = np.asarray(stored.astype(model.dtype) + model.dtype.type(0))  # -0.0 becomes 0.0, as in merge
        return cls(**parts)  # type: ignore[arg-type]  # the dtypes were taken from an instance

    def _counts_at(self, exponent: int) -> NDArray[np.int64]:
        shift = exponent - int(self.exponent)
        if not shift:
            return self.counts
        bins = np.trunc(np.arange(1 - HALF_BINS, HALF_BINS) / 2.0**shift).astype(np.int64)
        counts = np.zeros(BINS, np.int64)
        np.add.at(counts, bins + HALF_BINS - 1, self.counts)
        return counts


def _limbs(values: ArrayLike) -> NDArray[np.int64]:
    """Return the exact sums over the last axis as limbs: ``[..., N]`` float32 to ``[..., 9]`` int64."""
    units = np.asarray(values, np.float64)[..., None] / LIMB_UNITS
    steps = np.floor(units)
    steps[..., :-1] -= steps[..., 1:] * 2.0**LIMB_BITS
    total: NDArray[np.int64] = steps.astype(np.int64).sum(axis=-2)
    return total


def pool(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of all ``parts`` together."""
    total = Statistics()
    for part in parts:
        total = total.merge(part)
    return total
