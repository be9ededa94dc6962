"""Strategies: which integer grids the activations and the weights of a layer get.

``Quant_INT<a>-<w>`` has ``a``-bit activations and ``w``-bit weights. ``float`` is no strategy: it leaves a layer alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dopt_api import extensions
from dopt_api.errors import ExtensionError, StrategyError, closest
from dopt_api.quantizer.grid import Grid

__all__ = ["FLOAT", "STRATEGIES", "Strategy", "find_strategy", "get_strategy", "strategy_names"]

FLOAT = "float"
"""What a strategy file says of a layer that is not quantized."""


@dataclass(frozen=True)
class Strategy:
    """The grids of one quantized layer.

    Attributes:
        name: As written in the strategy file.
        activation: Grid of the layer's input, one scale per tensor.
        weight: Grid of the layer's weight.

    Example:
        >>> STRATEGIES["Quant_INT8-8"].weight.dtype
        'int8'
    """

    name: str
    activation: Grid
    weight: Grid


def _of_bits(activation: int, weight: int) -> Strategy:
    """Return the strategy of asymmetric unsigned activations and symmetric weights per output channel."""
    return Strategy(
        f"Quant_INT{activation}-{weight}",
        activation=Grid(activation),
        weight=Grid(weight, signed=True, symmetric=True, narrow=True, per_channel=True),
    )


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (_of_bits(8, 8), _of_bits(8, 7), _of_bits(8, 4), _of_bits(16, 8), _of_bits(4, 4))
}
"""The strategies by name. ``Quant_INT8-8``: uint8 asymmetric activations, int8 symmetric weights per output channel.

``Quant_INT8-7`` keeps the sums of two products within 16 bits, for processors whose kernels add in 16 bits.
"""


def strategy_names() -> tuple[str, ...]:
    """Return the names of all strategies, those that installed distributions add last."""
    return extensions.names(extensions.STRATEGIES, STRATEGIES)


def get_strategy(name: str) -> Strategy:
    """Return the strategy called ``name``.

    Raises:
        KeyError: There is none.
        ExtensionError: The distribution that adds it is broken.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    found, origin = extensions.load(extensions.STRATEGIES, name)
    wrong = (
        f"is {found!r}, not a Strategy"
        if not isinstance(found, Strategy)
        else f"is called {found.name!r} by itself"
        if found.name != name
        else "quantizes weights asymmetrically, which no backend does"
        if not found.weight.symmetric
        else "has activations per channel, which no backend has"
        if found.activation.per_channel
        else ""
    )
    if wrong:
        raise ExtensionError(
            f"The strategy {name!r} {wrong}",
            where=origin,
            expected="a dopt_api.strategy.Strategy of that name: activations per tensor, symmetric weights",
            fix="Tell the author of the distribution.",
        )
    strategy: Strategy = found
    return strategy


def find_strategy(name: object, *, layer: str, op_type: str, supported: Iterable[str], where: str) -> Strategy | None:
    """Return the strategy called ``name``, or ``None`` for ``"float"``.

    Args:
        name: What the strategy file says.
        layer: The layer's name, for the message.
        op_type: The layer's kind, for the message.
        supported: The strategies that kind of layer can have.
        where: File and line, for the message.

    Raises:
        StrategyError: The strategy is unknown, or not supported for the kind of layer.
        ExtensionError: The distribution that adds it is broken.
    """
    allowed = [FLOAT, *supported]
    if name == FLOAT:
        return None
    if not isinstance(name, str) or name not in strategy_names():
        raise StrategyError(
            f"Layer {layer!r} asks for the strategy {name!r}, which does not exist",
            where=where,
            expected=f"one of {', '.join(map(repr, allowed))}",
            fix=closest(str(name), allowed) or "Set 'quant_strategy' to one of these.",
        )
    if name not in allowed:
        raise StrategyError(
            f"Layer {layer!r} asks for the strategy {name!r}, which {op_type} does not support",
            where=where,
            expected=f"one of {', '.join(map(repr, allowed))}",
            fix="Set 'quant_strategy' to one of these.",
        )
    return get_strategy(name)
