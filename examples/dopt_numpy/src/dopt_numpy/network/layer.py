"""What every layer is: a function of one array, with its gradient, its parameters and its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Layer", "Parameter", "Pullback", "Weighted", "channelwise"]

Array = NDArray[np.floating[Any]]

Pullback = Callable[[Array], Array]
"""Takes the loss's gradient with respect to a result, adds to the parameters', and returns that of the input."""


class Parameter:
    """An array that is trained.

    Attributes:
        value: The array.
        gradient: The sum of the gradients since the last step, of the same shape and dtype.
    """

    def __init__(self, value: Array) -> None:
        self.value = value
        self.gradient = np.zeros_like(value)

    def accumulate(self, gradient: NDArray[Any]) -> None:
        """Add to the gradient; what lies beyond its dtype's precision is rounded."""
        self.gradient += np.asarray(gradient, self.gradient.dtype).reshape(self.gradient.shape)


class Layer:
    """A function of one array ``[N, ...]``."""

    def __call__(self, x: Array) -> Array:
        """Return the result for ``x``, in inference."""
        return self.forward(x)[0]

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return the result for ``x`` and the function that carries gradients back."""
        raise NotImplementedError

    def children(self) -> Mapping[str, Layer]:
        """Return the layers inside this one, by name."""
        return {}

    def own_parameters(self) -> Mapping[str, Parameter]:
        """Return the parameters of this layer itself."""
        return {}

    def own_buffers(self) -> Mapping[str, NDArray[Any]]:
        """Return the arrays of this layer itself that are kept but not trained."""
        return {}

    def own_state(self) -> dict[str, NDArray[Any]]:
        """Return what a checkpoint holds of this layer itself."""
        return {**{name: p.value for name, p in self.own_parameters().items()}, **self.own_buffers()}

    def load_own_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite the arrays in place by those of ``state``, which has the same names and shapes."""
        for name, array in Layer.own_state(self).items():
            array[...] = state[name]


class Weighted(Layer):
    """A layer that multiplies by a weight and adds a bias.

    Attributes:
        weight: Output channels on axis 0.
        bias: ``[C]``, or ``None``.
    """

    def __init__(self, weight: Array, bias: bool) -> None:
        self.weight = Parameter(weight)
        self.bias = Parameter(np.zeros(len(weight), weight.dtype)) if bias else None

    def multiply(self, x: Array, weight: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """Return the product of ``x`` and ``weight``, and the function to the gradients of both."""
        raise NotImplementedError

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return ``multiply(x, weight) + bias``."""
        del training
        y, back = self.forward_with(x, self.weight.value)

        def pullback(dy: Array) -> Array:
            dx, dweight = back(dy)
            self.weight.accumulate(dweight)
            return dx

        return y, pullback

    def forward_with(self, x: Array, weight: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """Return what the layer computes with another weight, and the function to the gradients of both."""
        y, back = self.multiply(x, weight)
        bias = self.bias
        if bias is None:
            return y, back

        def pullback(dy: Array) -> tuple[Array, Array]:
            bias.accumulate(dy.sum(axis=(0, *range(2, dy.ndim))))
            return back(dy)

        return y + channelwise(bias.value, y.ndim), pullback

    def own_parameters(self) -> Mapping[str, Parameter]:
        """Return weight and bias."""
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}


def channelwise(values: Array, ndim: int) -> Array:
    """Shape ``[C]`` to stand on axis 1 of an array of ``ndim`` dimensions."""
    return values.reshape(-1, *(1,) * (ndim - 2))


def he_normal(shape: tuple[int, ...], rng: np.random.Generator | None) -> NDArray[np.float32]:
    """Return a weight of variance ``2 / fan_in`` (He et al. 2015, https://arxiv.org/abs/1502.01852), float32."""
    rng = np.random.default_rng() if rng is None else rng
    deviation = math.sqrt(2 / math.prod(shape[1:]))
    return (deviation * rng.standard_normal(shape)).astype(np.float32)
