"""The loss of a classifier."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dopt_numpy.network.layer import Array

__all__ = ["cross_entropy"]


def cross_entropy(logits: Array, labels: ArrayLike) -> tuple[float, Array]:
    """Return the mean of ``-log softmax(logits)[label]`` and its gradient with respect to the logits.

    Args:
        logits: ``[N, classes]``.
        labels: Class numbers ``[N]``.

    Example:
        >>> value, gradient = cross_entropy(np.zeros((1, 2), np.float32), [0])
        >>> round(value, 6), gradient.tolist()
        (0.693147, [[-0.5, 0.5]])
    """
    rows = np.arange(len(logits))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient = np.exp(log_probability)
    gradient[rows, np.asarray(labels)] -= 1
    return float(-log_probability[rows, np.asarray(labels)].mean()), gradient / len(logits)
