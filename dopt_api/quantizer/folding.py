r"""Folding batch normalization into the layer before it.

With running statistics, :math:`\gamma (y - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta` after :math:`y = W x + b` is the
layer :math:`f W x + (\beta + f (b - \mu))` with :math:`f = \gamma / \sqrt{\sigma^2 + \epsilon}` (Jacob et al. 2018,
https://arxiv.org/abs/1712.05877, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dopt_api.quantizer.affine import as_float32, broadcast

__all__ = ["BatchNorm", "fold_batch_norm"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """A batch normalization in inference, each array float of shape ``[C]``.

    A negative variance, or a zero one without epsilon, gives NaN or infinity, which
    :func:`~dopt_api.params.quantize_layer` refuses.

    Attributes:
        gamma: Scale, or ``None`` for 1.
        beta: Shift, or ``None`` for 0.
        mean: Running mean.
        variance: Running variance.
        epsilon: What is added to the variance.
    """

    gamma: NDArray[np.floating[Any]] | None
    beta: NDArray[np.floating[Any]] | None
    mean: NDArray[np.floating[Any]]
    variance: NDArray[np.floating[Any]]
    epsilon: float

    @property
    def factor(self) -> Float32:
        """The factor ``gamma / sqrt(variance + epsilon)``, float64 rounded once to float32, ``[C]``."""
        gamma = 1.0 if self.gamma is None else self.gamma.astype(np.float64)
        with np.errstate(all="ignore"):
            factor = gamma / np.sqrt(self.variance.astype(np.float64) + self.epsilon)
            return np.asarray(factor, np.float32)


def fold_batch_norm(
    weight: NDArray[np.floating[Any]], bias: NDArray[np.floating[Any]] | None, norm: BatchNorm, *, axis: int
) -> tuple[Float32, Float32]:
    """Return weight and bias of the layer that computes layer and normalization at once.

    Args:
        weight: The layer's weight, any shape, taken as float32.
        bias: The layer's bias ``[C]``, or ``None``.
        norm: The normalization, over the same ``C`` channels.
        axis: The axis of ``weight`` with the output channels. If it has fewer than ``C``, the weight is that of a
            grouped transposed convolution: the groups stand one after the other on axis 0.

    Returns:
        Folded weight, the shape of ``weight``, a float32 product; and bias ``[C]``, computed in float64.

    Example:
        >>> norm = BatchNorm(np.array([2.0]), np.array([1.0]), np.array([3.0]), np.array([4.0]), 0.0)
        >>> weight, bias = fold_batch_norm(np.array([[5.0, 6.0]]), None, norm, axis=0)
        >>> weight.tolist(), bias.tolist()
        ([[5.0, 6.0]], [-2.0])
    """
    factor = norm.factor
    with np.errstate(all="ignore"):
        folded = as_float32(weight) * _on_weight(factor, weight.shape, axis)
        shift = (0.0 if bias is None else bias.astype(np.float64)) - norm.mean.astype(np.float64)
        beta = 0.0 if norm.beta is None else norm.beta.astype(np.float64)
        return np.asarray(folded, np.float32), np.asarray(beta + shift * factor.astype(np.float64), np.float32)


def _on_weight(factor: Float32, shape: tuple[int, ...], axis: int) -> Float32:
    groups = factor.size // shape[axis]
    if groups <= 1:
        return broadcast(factor, len(shape), axis)
    rows = np.repeat(factor.reshape(groups, shape[axis]), shape[0] // groups, axis=0)
    return rows.reshape(rows.shape + (1,) * (len(shape) - 2))
