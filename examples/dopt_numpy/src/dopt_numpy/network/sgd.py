"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dopt_numpy.network.layer import Parameter

__all__ = ["SGD"]


class SGD:
    """Gradient descent with momentum (Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html)."""

    def __init__(self, parameters: Sequence[Parameter], rate: float, *, momentum: float = 0.9) -> None:
        self.parameters, self.rate, self.momentum = list(parameters), rate, momentum
        self._velocity = [np.zeros_like(parameter.value) for parameter in self.parameters]

    def step(self) -> None:
        """Move each parameter along its velocity and set its gradient to 0."""
        for parameter, velocity in zip(self.parameters, self._velocity, strict=True):
            velocity[...] = self.momentum * velocity - self.rate * parameter.gradient
            parameter.value += velocity
            parameter.gradient[...] = 0
