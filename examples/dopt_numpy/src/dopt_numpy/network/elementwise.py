"""What works on each element alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dopt_numpy.network.layer import Array, Layer, Parameter, Pullback, channelwise

__all__ = ["ReLU", "Scale"]


class ReLU(Layer):
    """The greater of ``x`` and 0."""

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return the result; NaN stays NaN."""
        del training
        positive = x > 0
        return np.maximum(x, 0), lambda dy: np.where(positive, dy, 0).astype(dy.dtype)


class Scale(Layer):
    """One learned factor a channel (LayerScale, Touvron et al. 2021, https://arxiv.org/abs/2103.17239).

    Attributes:
        factor: ``[C]``, 1 at first.
    """

    def __init__(self, channels: int) -> None:
        self.factor = Parameter(np.ones(channels, np.float32))

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return ``x * factor`` on axis 1."""
        del training
        factor = channelwise(self.factor.value, x.ndim)

        def pullback(dy: Array) -> Array:
            self.factor.accumulate((dy * x).sum(axis=(0, *range(2, x.ndim))))
            return dy * factor

        return x * factor, pullback

    def own_parameters(self) -> Mapping[str, Parameter]:
        """Return the factor."""
        return {"factor": self.factor}
