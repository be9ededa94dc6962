"""Batch normalization (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dopt_numpy.network.layer import Array, Layer, Parameter, Pullback, channelwise

__all__ = ["BatchNorm"]


class BatchNorm(Layer):
    """Normalization of each channel (axis 1), by the batch in training and by running statistics in inference.

    Attributes:
        gamma: Scale ``[C]``.
        beta: Shift ``[C]``.
        mean: Running mean ``[C]``.
        variance: Running variance ``[C]``, of the unbiased estimates.
        epsilon: What is added to the variance.
        momentum: The weight of a new batch in the running statistics.
    """

    def __init__(self, channels: int, *, epsilon: float = 1e-5, momentum: float = 0.1) -> None:
        self.gamma = Parameter(np.ones(channels, np.float32))
        self.beta = Parameter(np.zeros(channels, np.float32))
        self.mean = np.zeros(channels, np.float32)
        self.variance = np.ones(channels, np.float32)
        self.epsilon, self.momentum = epsilon, momentum

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return ``gamma (x - mean) / sqrt(variance + epsilon) + beta``."""
        axes, count = (0, *range(2, x.ndim)), x.size // x.shape[1]
        mean, variance = (x.mean(axis=axes), x.var(axis=axes)) if training else (self.mean, self.variance)
        if training:
            self.mean += self.momentum * (mean - self.mean)
            self.variance += self.momentum * (variance * (count / max(count - 1, 1)) - self.variance)
        inverse = channelwise(1 / np.sqrt(variance + self.epsilon), x.ndim).astype(x.dtype)
        normal = (x - channelwise(mean, x.ndim)) * inverse
        gamma = channelwise(self.gamma.value, x.ndim)

        def pullback(dy: Array) -> Array:
            self.gamma.accumulate((dy * normal).sum(axis=axes))
            self.beta.accumulate(dy.sum(axis=axes))
            dnormal = dy * gamma
            if training:  # mean and variance depend on x too
                along = normal * (dnormal * normal).mean(axis=axes, keepdims=True)
                dnormal = dnormal - dnormal.mean(axis=axes, keepdims=True) - along
            return dnormal * inverse

        return normal * gamma + channelwise(self.beta.value, x.ndim), pullback

    def own_parameters(self) -> Mapping[str, Parameter]:
        """Return gamma and beta."""
        return {"gamma": self.gamma, "beta": self.beta}

    def own_buffers(self) -> Mapping[str, NDArray[Any]]:
        """Return the running statistics."""
        return {"mean": self.mean, "variance": self.variance}
