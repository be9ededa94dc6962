"""Strategies: which integer grids the activations and the weights of a layer get.

``Quant_INT<a>-<w>`` has ``a``-bit activations and ``w``-bit weights. ``float`` is no strategy: it leaves a layer alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dopt_api.errors import StrategyError, closest
from dopt_api.quantizer.grid import Grid

__all__ = ["FLOAT", "STRATEGIES", "Strategy", "find_strategy"]

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


STRATEGIES: dict[str, Strategy] = {
    "Quant_INT8-8": Strategy(
        "Quant_INT8-8",
        activation=Grid(8),
        weight=Grid(8, signed=True, symmetric=True, narrow=True, per_channel=True),
    ),
}
"""The strategies by name. ``Quant_INT8-8``: uint8 asymmetric activations, int8 symmetric weights per output channel."""


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
    """
    allowed = [FLOAT, *supported]
    if name == FLOAT:
        return None
    if not isinstance(name, str) or name not in STRATEGIES:
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
    return STRATEGIES[name]
