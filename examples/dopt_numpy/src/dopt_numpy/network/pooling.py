"""What takes positions together: pooling and flattening."""

from __future__ import annotations

import numpy as np

from dopt_numpy.network.layer import Array, Layer, Pullback

__all__ = ["Flatten", "GlobalAveragePool", "MaxPool2D"]


class MaxPool2D(Layer):
    """The greatest value of each square of ``size`` by ``size``; rows and columns that fill no square are left out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return ``[N, C, H // size, W // size]``; the gradient is shared evenly among equal maxima."""
        del training
        size = self.size
        samples, channels, height, width = x.shape[0], x.shape[1], x.shape[2] // size, x.shape[3] // size
        kept = x[:, :, : height * size, : width * size]
        squares = kept.reshape(samples, channels, height, size, width, size)
        y = squares.max(axis=(3, 5), keepdims=True)

        def pullback(dy: Array) -> Array:
            first = squares == y
            share = dy.reshape(y.shape) / first.sum(axis=(3, 5), keepdims=True).astype(dy.dtype)
            dx = np.zeros_like(x)
            dx[:, :, : height * size, : width * size] = (first * share).reshape(kept.shape)
            return dx

        return y[:, :, :, 0, :, 0], pullback


class GlobalAveragePool(Layer):
    """The mean of each channel: ``[N, C, H, W]`` to ``[N, C, 1, 1]``."""

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return the means."""
        del training
        shape, count = x.shape, x.shape[2] * x.shape[3]
        return x.mean(axis=(2, 3), keepdims=True), lambda dy: np.broadcast_to(dy / count, shape).astype(dy.dtype)


class Flatten(Layer):
    """``[N, ...]`` to ``[N, F]``."""

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return the same elements."""
        del training
        return x.reshape(len(x), -1), lambda dy: dy.reshape(x.shape)
