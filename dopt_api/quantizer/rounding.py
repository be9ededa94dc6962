"""Rounding a weight so that a layer's output, and not the weight, has the least error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopt_api.errors import NumbersError
from dopt_api.quantizer.grid import Grid
from dopt_api.quantizer.short_sums import PAIR_LIMIT, overflowing, within_pairs
from dopt_api.quantizer.training import gain_of

__all__ = [
    "Moments",
    "RoundedLayer",
    "Rounding",
    "best_scale",
    "compensated_weight",
    "output_error",
    "round_layer",
    "round_weight",
]

BLOCK = 64
"""How many columns are rounded before the rest of the weight is told."""

SWEEPS = 3
"""How often each integer is set anew."""

SHRINKS = np.arange(32, 9, -1) / 32
"""What :func:`best_scale` tries."""


@dataclass(frozen=True)
class RoundedLayer:
    """What rounding did to one layer of a network.

    Attributes:
        name: The layer's name.
        nearest: Mean squared difference, about its mean, of its output from the float network's with weights rounded to
            nearest, less what no weight could mend; as a share of the output's variance.
        rounded: The same as it is now; never more.
        reason: Why the layer was left alone, or empty.
    """

    name: str
    nearest: float = 0.0
    rounded: float = 0.0
    reason: str = ""


class Moments:
    """Sums over sampled positions of what a layer's weight is multiplied with, and of what should come out.

    Attributes:
        count: Number of positions.
        first: Of the patches, ``[G, K]``: groups, and what each output channel sums over.
        second: Of the products of patches, ``[G, K, K]``.
        outputs: Of the float outputs, without bias, ``[G, O]``.
        cross: Of the products of float outputs and patches, ``[G, O, K]``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: NDArray[np.float64] = np.zeros((), np.float64)
        self.second = self.outputs = self.cross = self.first

    def add(self, patches: ArrayLike, outputs: ArrayLike) -> None:
        """Take in patches ``[N, G, K]`` and the outputs ``[N, G, O]`` that the float network has in their places."""
        columns = np.asarray(patches, np.float64).transpose(1, 0, 2)
        rows = np.asarray(outputs, np.float64).transpose(1, 2, 0)
        self.first = self.first + columns.sum(axis=1)
        self.second = self.second + columns.transpose(0, 2, 1) @ columns
        self.outputs = self.outputs + rows.sum(axis=2)
        self.cross = self.cross + rows @ columns
        self.count += columns.shape[1]

    def mean(self) -> NDArray[np.float64]:
        """Return that of the patches, ``[G, K]``."""
        return self.first / self.count

    def covariance(self) -> NDArray[np.float64]:
        """Return the second moments of the patches about their mean, ``[G, K, K]``."""
        mean = self.mean()
        return self.second / self.count - mean[:, :, None] * mean[:, None, :]

    def cross_covariance(self) -> NDArray[np.float64]:
        """Return the moments of outputs and patches about their means, ``[G, O, K]``."""
        return self.cross / self.count - (self.outputs / self.count)[:, :, None] * self.mean()[:, None, :]


@dataclass(frozen=True, eq=False)
class Rounding:
    """What :func:`round_layer` found.

    Attributes:
        weight: The weight on its grid, not folded, ``[G, O, K]``.
        gain: What makes the scales that the weight's extremes give those of its grid, ``[G * O]``; 0 for channels of
            zeros. See :func:`dopt_api.quantizer.learned_scale`.
        shift: What the bias has to add, before a normalization, so that the mean of the outputs is the float one's,
            ``[G * O]``.
        nearest: Mean squared difference, about its mean, of the outputs from the float ones with the weight rounded to
            nearest, less what no weight could mend; as a share of the outputs' variance.
        rounded: The same with :attr:`weight`; never more.
    """

    weight: NDArray[np.float64]
    gain: NDArray[np.float64]
    shift: NDArray[np.float64]
    nearest: float
    rounded: float


def round_layer(
    weight: ArrayLike,
    scale: ArrayLike,
    moments: Moments,
    grid: Grid,
    *,
    factor: ArrayLike = 1.0,
    damping: float = 0.1,
    pairs: NDArray[np.intp] | None = None,
) -> Rounding:
    """Round a layer so that it gives the float outputs on inputs as they are in the quantized network.

    The weight that does so best (:func:`compensated_weight`) is put on scales and integers that do least to the output
    (:func:`best_scale`, :func:`round_weight`), and what the mean of the output moves by is told (bias correction, Nagel
    et al. 2019, "Data-free quantization through weight equalization and bias correction").

    Args:
        weight: Folded, ``[G, O, K]``.
        scale: ``[G, O]``, of the folded weight: those that its extremes give, or learned ones.
        moments: Of the layer's quantized inputs and its float outputs before a normalization.
        grid: The integers; symmetric.
        factor: By which folding multiplied the weight, not 0, of a shape that broadcasts to ``[G, O, 1]``.
        damping: See :func:`round_weight`.
        pairs: For kernels that add two products in 16 bits, which weights these are
            (:func:`dopt_api.quantizer.short_sums.partners`): in channels where such a sum can overflow, scales grow
            and integers stay within what cannot. By default nothing is limited.

    Raises:
        NumbersError: A number is NaN or infinite, or a scale is not positive.

    Example:
        >>> moments = Moments()
        >>> x = np.random.default_rng(0).standard_normal((50, 1, 3))
        >>> w = np.array([[[0.4, -0.1, 2.0]]])
        >>> moments.add(x, x @ w[0].T)
        >>> found = round_layer(w, [[0.5]], moments, Grid(4, signed=True, symmetric=True, narrow=True))
        >>> found.rounded <= found.nearest
        True
    """
    w, s, f = (np.asarray(part, np.float64) for part in (weight, scale, factor))
    covariance = moments.covariance()
    wanted = compensated_weight(w, covariance, moments.cross_covariance() * f)
    if pairs is not None:
        s = _wide_enough(w, s, grid, pairs)
    fitted = best_scale(wanted, s, covariance, grid, pairs)
    integers = round_weight(w, fitted, covariance, grid, wanted=wanted, damping=damping, pairs=pairs).astype(np.float64)
    nearest = _nearest(w, s, grid, pairs)
    errors = [output_error(q * step[..., None] - wanted, covariance) for q, step in ((nearest, s), (integers, fitted))]
    worse = errors[1] > errors[0]
    integers = np.where(worse[..., None], nearest, integers)
    found = integers * np.where(worse, s, fitted)[..., None] / f
    mean = np.einsum("gok,gk->go", found, moments.mean())
    variance = float(output_error(wanted, covariance).sum()) or 1.0
    largest = np.abs(integers).max(axis=2, initial=0.0).reshape(-1)
    ratio = (grid.qmax - grid.qmin) / (2 * np.where(largest > 0, largest, 1.0))
    return Rounding(
        weight=found,
        gain=np.where(largest > 0, gain_of(ratio), 0.0),
        shift=(moments.outputs / moments.count - mean).reshape(-1),
        nearest=float(errors[0].sum()) / variance,
        rounded=float(np.minimum(*errors).sum()) / variance,
    )


def round_weight(
    weight: ArrayLike,
    scale: ArrayLike,
    moments: ArrayLike,
    grid: Grid,
    *,
    wanted: ArrayLike | None = None,
    damping: float = 0.1,
    pairs: NDArray[np.intp] | None = None,
) -> NDArray[np.int32]:
    r"""Return integers for a weight whose error :math:`e` does least to the output: least :math:`e^T M e`.

    :math:`M` is the second moment of what the weight is multiplied with. Column by column, the greatest moment first,
    the weight is rounded to nearest, and the columns that are still to come take over what that changed in the output
    (the second-order update of Frantar et al. 2023, "GPTQ", with the order of columns of that paper's code). Then each
    integer is set anew to what is best beside the others, some times over (coordinate descent, as in Behdin et al.
    2023, "QuantEase"). An output channel for which this comes out worse than rounding to nearest is rounded to nearest.

    Args:
        weight: ``[G, O, K]``: groups, output channels of a group, and what each sums over.
        scale: ``[G, O]``, positive, in the unit of the weight.
        moments: ``[G, K, K]``, symmetric and positive semi-definite.
        grid: The integers; symmetric.
        wanted: ``[G, O, K]``: the weight from which errors count, as :func:`compensated_weight` gives it; by default
            ``weight``.
        damping: Added to the diagonal of the moments, as a share of its mean: how little the samples are trusted to
            show all that the network will see.
        pairs: See :func:`round_layer`; what cannot overflow is chosen from.

    Returns:
        Integers ``[G, O, K]`` of the grid.

    Raises:
        NumbersError: A number is NaN or infinite, or a scale is not positive.

    Example:
        >>> moments = np.array([[[1.0, 0.9], [0.9, 1.0]]])  # two inputs that are nearly the same
        >>> grid = Grid(8, signed=True, symmetric=True, narrow=True)
        >>> round_weight([[[0.4, 0.4]]], [[1.0]], moments, grid)  # 1 nearly makes up for both; rounding gives 0, 0
        array([[[0, 1]]], dtype=int32)
    """
    w, s, m = (np.asarray(part, np.float64) for part in (weight, scale, moments))
    target = w if wanted is None else np.asarray(wanted, np.float64)
    if not (all(np.isfinite(part).all() for part in (w, s, m, target)) and (s > 0).all()):
        raise NumbersError("A weight, scale or moment is NaN or infinite, or a scale is not positive")
    nearest = _nearest(w, s, grid, pairs)
    diagonal = np.diagonal(m, axis1=1, axis2=2)
    damped = _damped(m, damping)
    order = np.argsort(-diagonal, axis=1, kind="stable")
    others = None if pairs is None else _reordered(pairs, order)
    along, across = order[:, None, :], order[:, :, None]
    ordered = np.take_along_axis(np.take_along_axis(damped, across, 1), along, 2)
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(ordered)), 1, 2)
    found = np.empty_like(w)
    np.put_along_axis(found, along, _rounded(np.take_along_axis(target, along, 2), s, upper, grid, others), 2)
    for _ in range(SWEEPS):
        _descend(found, target, s, damped, grid, pairs)
    worse = output_error(found * s[..., None] - target, m) > output_error(nearest * s[..., None] - target, m)
    return np.where(worse[..., None], nearest, found).astype(np.int32)


def compensated_weight(
    weight: ArrayLike, moments: ArrayLike, cross: ArrayLike, *, ridge: float = 3.0
) -> NDArray[np.float64]:
    """Return the weight whose outputs on the quantized inputs come closest to the float outputs, by least squares.

    The error that the layers before have made is so undone as far as this layer can. It is ridge regression towards
    the weight itself: what the samples do not show stays as it is.

    Args:
        weight: ``[G, O, K]``.
        moments: ``[G, K, K]``, of the quantized inputs, about their mean.
        cross: ``[G, O, K]``, of the float outputs with the quantized inputs, about their means.
        ridge: Its strength, as a share of the mean of the moments' diagonal. Weaker ones fit the samples better, and
            other data worse.

    Example:
        >>> compensated_weight([[[1.0]]], [[[0.5]]], [[[1.0]]], ridge=0.0)  # inputs came out half as large
        array([[[2.]]])
    """
    w, m, c = (np.asarray(part, np.float64) for part in (weight, moments, cross))
    damped = _damped(m, ridge)
    result: NDArray[np.float64] = np.swapaxes(np.linalg.solve(damped, np.swapaxes(c + w @ (damped - m), 1, 2)), 1, 2)
    return result


def best_scale(
    weight: ArrayLike,
    scale: ArrayLike,
    moments: ArrayLike | None,
    grid: Grid,
    pairs: NDArray[np.intp] | None = None,
) -> NDArray[np.float64]:
    """Return scales ``[G, O]``, the given ones times 0.3 to 1: those whose rounding to nearest does the output least.

    Args:
        weight: ``[G, O, K]``.
        scale: ``[G, O]``: those that clip nothing.
        moments: ``[G, K, K]``; or ``None`` where the weight itself counts: inputs that have nothing to do with each
            other and are of one size.
        grid: The integers; symmetric.
        pairs: See :func:`round_layer`.
    """
    w, s = (np.asarray(part, np.float64) for part in (weight, scale))
    found: NDArray[np.float64] = s.copy()
    least = np.full(s.shape, np.inf)
    for shrink in SHRINKS:
        part = s * shrink
        nearest = _nearest(w, part, grid, pairs)
        off = nearest * part[..., None] - w
        error = np.sum(off * off, axis=2) if moments is None else output_error(off, moments)
        found, least = np.where(error < least, part, found), np.minimum(error, least)
    return found


def _damped(moments: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    mean = np.diagonal(moments, axis1=1, axis2=2).mean(axis=1)
    result: NDArray[np.float64] = (
        moments + np.eye(moments.shape[1]) * np.where(mean > 0, damping * mean, 1.0)[:, None, None]
    )
    return result


def _descend(
    integers: NDArray[np.float64],
    weight: NDArray[np.float64],
    scale: NDArray[np.float64],
    moments: NDArray[np.float64],
    grid: Grid,
    pairs: NDArray[np.intp] | None,
) -> None:
    """Set each integer in turn, in place, to what is best beside the others."""
    gradient = (integers * scale[..., None] - weight) @ moments
    for column in range(weight.shape[2]):
        before = integers[:, :, column].copy()
        step = gradient[:, :, column] / (scale * moments[:, column, column][:, None])
        beside = None if pairs is None or pairs[column] == column else integers[:, :, pairs[column]]
        integers[:, :, column] = np.clip(np.rint(before - step), *_ends(grid, beside))
        change = (integers[:, :, column] - before) * scale
        gradient += change[..., None] * moments[:, column, None, :]


def output_error(error: ArrayLike, moments: ArrayLike) -> NDArray[np.float64]:
    """Return the mean squared error ``[G, O]`` of outputs whose weight is off by ``error`` ``[G, O, K]``."""
    e, m = np.asarray(error, np.float64), np.asarray(moments, np.float64)
    result: NDArray[np.float64] = np.sum((e @ m) * e, axis=2)
    return result


def _rounded(
    weight: NDArray[np.float64],
    scale: NDArray[np.float64],
    upper: NDArray[np.float64],
    grid: Grid,
    others: NDArray[np.intp] | None,
) -> NDArray[np.float64]:
    """Return the integers, column after column.

    Args:
        weight: ``[G, O, K]``.
        scale: ``[G, O]``.
        upper: The factor of the inverse of the moments, ``[G, K, K]``.
        grid: The integers.
        others: Which column each is paired with, ``[G, K]``, or ``None``.
    """
    rest, integers = weight.copy(), np.zeros_like(weight)
    group = np.arange(len(weight))
    columns = weight.shape[2]
    for start in range(0, columns, BLOCK):
        end = min(columns, start + BLOCK)
        errors = np.empty((*weight.shape[:2], end - start))
        for column in range(start, end):
            values = rest[:, :, column]
            beside = None if others is None else integers[group, :, others[:, column]]
            integers[:, :, column] = np.clip(np.rint(values / scale), *_ends(grid, beside))
            error = (values - integers[:, :, column] * scale) / upper[:, column, column][:, None]
            rest[:, :, column:end] -= error[:, :, None] * upper[:, None, column, column:end]
            errors[:, :, column - start] = error
        rest[:, :, end:] -= errors @ upper[:, start:end, end:]
    return integers


def _ends(grid: Grid, beside: NDArray[np.float64] | None) -> tuple[Any, Any]:
    """Return the least and the greatest integer, beside those that they are paired with."""
    if beside is None:
        return grid.qmin, grid.qmax
    low = np.maximum(-PAIR_LIMIT - np.minimum(beside, 0), grid.qmin)
    return low, np.minimum(PAIR_LIMIT - np.maximum(beside, 0), grid.qmax)


def _reordered(pairs: NDArray[np.intp], order: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the places of the pairs, ``[G, K]``, where the columns stand in an order ``[G, K]``."""
    place: NDArray[np.intp] = np.argsort(order, axis=1)
    return np.take_along_axis(place, pairs[order], 1)


def _nearest(
    weight: NDArray[np.float64], scale: NDArray[np.float64], grid: Grid, pairs: NDArray[np.intp] | None
) -> NDArray[np.float64]:
    nearest: NDArray[np.float64] = np.clip(np.rint(weight / scale[..., None]), grid.qmin, grid.qmax)
    return nearest if pairs is None else within_pairs(nearest, pairs)


def _wide_enough(
    weight: NDArray[np.float64], scale: NDArray[np.float64], grid: Grid, pairs: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Return scales with which no pair of weights rounded to nearest can overflow; the given ones where none can."""
    over = overflowing(_nearest(weight, scale, grid, None), pairs)
    beside = np.where(pairs == np.arange(pairs.size), 0.0, weight[..., pairs])
    sums = np.where(weight * beside > 0, np.abs(weight + beside), 0.0).max(axis=2, initial=0.0)
    return np.where(over, np.maximum(scale, sums / (PAIR_LIMIT - 1)), scale)
