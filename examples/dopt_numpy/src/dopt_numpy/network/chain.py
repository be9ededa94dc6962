"""Layers one after the other, and the network as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dopt_numpy.network.layer import Array, Layer, Parameter, Pullback

__all__ = ["Chain", "Network", "Residual"]


class Chain(Layer):
    """Named layers, one after the other; the same layer may stand at several places.

    Attributes:
        layers: The layers by name, in order; names have no dots.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        if wrong := [name for name in layers if not name or "." in name]:
            raise ValueError(f"the layer name {wrong[0]!r} is empty or has a dot")
        self.layers = dict(layers)

    def children(self) -> Mapping[str, Layer]:
        """Return the layers."""
        return self.layers

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return the result of the last layer."""
        pullbacks = []
        for layer in self.layers.values():
            x, back = layer.forward(x, training)
            pullbacks.append(back)

        def pullback(dy: Array) -> Array:
            for back in reversed(pullbacks):
                dy = back(dy)
            return dy

        return x, pullback


class Residual(Chain):
    """A chain whose input is added to its result (He et al. 2016, https://arxiv.org/abs/1512.03385)."""

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Return ``x + chain(x)``."""
        y, back = super().forward(x, training)
        return x + y, lambda dy: dy + back(dy)


class Network(Chain):
    """A whole network: a chain with names for everything inside it, and a state to keep.

    A layer's path is the names that lead to it, joined by dots. A layer at several places has the first of its paths.
    """

    def named_layers(self) -> Iterator[tuple[str, Layer]]:
        """Yield every layer inside with its path, each once, outer before inner, in execution order."""
        seen: set[int] = set()
        for path, layer in _walk(self, ""):
            if id(layer) not in seen:
                seen.add(id(layer))
                yield path, layer

    def parameters(self) -> list[Parameter]:
        """Return what is trained, each once."""
        found = {id(p): p for _, layer in self.named_layers() for p in layer.own_parameters().values()}
        return list(found.values())

    def state(self) -> dict[str, NDArray[Any]]:
        """Return copies of all arrays by name, such as ``conv1.weight``: parameters and buffers."""
        return {
            f"{path}.{name}": array.copy()
            for path, layer in self.named_layers()
            for name, array in layer.own_state().items()
        }

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite all arrays by those of :meth:`state`; all or, if something does not fit, none.

        Raises:
            ValueError: A name is missing or unknown, or an array has another shape or kind of number.
        """
        own = self.state()
        if different := sorted(own.keys() ^ state.keys()):
            kind = "misses" if different[0] in own else "has the unknown"
            raise ValueError(f"the state {kind} {different[0]!r}")
        for name, array in own.items():
            if state[name].shape != array.shape:
                raise ValueError(f"{name!r} has shape {list(state[name].shape)}, expected {list(array.shape)}")
            if not np.can_cast(state[name].dtype, array.dtype, "same_kind"):
                raise ValueError(f"{name!r} is {state[name].dtype}, expected {array.dtype}")
        for path, layer in self.named_layers():
            layer.load_own_state({name: state[f"{path}.{name}"] for name in layer.own_state()})


def _walk(layer: Layer, path: str) -> Iterator[tuple[str, Layer]]:
    for name, child in layer.children().items():
        inner = f"{path}.{name}" if path else name
        yield inner, child
        yield from _walk(child, inner)
