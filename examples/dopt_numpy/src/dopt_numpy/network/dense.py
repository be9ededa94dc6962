"""The fully connected layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dopt_numpy.network.layer import Array, Weighted, he_normal

__all__ = ["Dense"]


class Dense(Weighted):
    """``x [N, I]`` times the transpose of a weight ``[O, I]``, plus a bias.

    Example:
        >>> Dense(4, 2)(np.zeros((3, 4), np.float32)).shape
        (3, 2)
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rng: np.random.Generator | None = None) -> None:
        super().__init__(he_normal((outputs, inputs), rng), bias)

    def multiply(self, x: Array, weight: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """Return ``x @ weight.T``, ``[N, O]``."""
        if x.ndim != 2 or x.shape[1] != weight.shape[1]:
            raise ValueError(f"Dense got {list(x.shape)}, expected [N, {weight.shape[1]}]")
        return x @ weight.T, lambda dy: (dy @ weight, dy.T @ x)
