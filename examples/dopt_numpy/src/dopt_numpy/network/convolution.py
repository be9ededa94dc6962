"""Two-dimensional convolution as a matrix product over image patches (im2col)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dopt_numpy.network.layer import Array, Weighted, he_normal

__all__ = ["Conv2D"]


class Conv2D(Weighted):
    """A convolution (cross-correlation) of ``[N, I, H, W]`` with a weight ``[O, I / groups, k, k]``.

    Attributes:
        stride: Step between patches, the same on both axes.
        padding: Rows and columns of zeros on every side.
        groups: Into how many groups the channels fall; ``I`` of them make it depthwise.

    Example:
        >>> Conv2D(3, 8, 3, padding=1)(np.zeros((2, 3, 5, 5), np.float32)).shape
        (2, 8, 5, 5)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
        rng: np.random.Generator | None = None,
    ) -> None:
        super().__init__(he_normal((outputs, inputs // groups, size, size), rng), bias)
        self.stride, self.padding, self.groups = stride, padding, groups

    def multiply(self, x: Array, weight: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """Return ``[N, O, H', W']`` with ``H' = (H + 2 padding - k) // stride + 1``."""
        samples, groups, stride, pad = len(x), self.groups, self.stride, self.padding
        outputs, own, *size = weight.shape
        if x.ndim != 4 or x.shape[1] != own * groups:
            raise ValueError(f"Conv2D got {list(x.shape)}, expected [N, {own * groups}, H, W]")
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = sliding_window_view(padded, size, (2, 3))[:, :, ::stride, ::stride]
        height, width = windows.shape[2:4]
        patches = windows.reshape(samples, groups, own, height, width, *size).transpose(0, 1, 3, 4, 2, 5, 6)
        columns = patches.reshape(samples, groups, height * width, -1)  # [N, G, positions, own k k]
        kernel = weight.reshape(groups, outputs // groups, -1)
        y = (columns @ kernel.transpose(0, 2, 1)).transpose(0, 1, 3, 2).reshape(samples, outputs, height, width)

        def back(dy: Array) -> tuple[Array, Array]:
            rows = dy.reshape(samples, groups, outputs // groups, -1)
            dweight = (rows @ columns).sum(axis=0).reshape(weight.shape)
            dcolumns = (rows.transpose(0, 1, 3, 2) @ kernel).reshape(samples, groups, height, width, own, *size)
            dpatches = dcolumns.transpose(0, 1, 4, 5, 6, 2, 3).reshape(samples, -1, *size, height, width)
            dpadded = np.zeros_like(padded)
            for i, j in np.ndindex(*size):  # the taps of the kernel
                dpadded[:, :, i : i + stride * height : stride, j : j + stride * width : stride] += dpatches[:, :, i, j]
            return dpadded[:, :, pad : pad + x.shape[2], pad : pad + x.shape[3]], dweight

        return y, back
