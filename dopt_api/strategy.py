"""Strategies: which integer grids the activations and the weights of a layer get.

``Quant_INT<a>-<w>`` has ``a``-bit activations and ``w``-bit weights. ``Quant_FLOAT-<w>`` has integer weights
alone, with ``A`` behind the bits if they are asymmetric, and ``-G<n>`` if ``n`` of them share a scale. ``float`` is no
strategy: it leaves a layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dopt_api import extensions
from dopt_api.errors import ExtensionError, StrategyError, closest
from dopt_api.quantizer.grid import Grid

__all__ = ["FLOAT", "INTEGER_STRATEGIES", "STRATEGIES", "Strategy", "find_strategy", "get_strategy", "strategy_names"]

FLOAT = "float"
"""What a strategy file says of a layer that is not quantized."""


@dataclass(frozen=True)
class Strategy:
    """The grids of one quantized layer.

    Attributes:
        name: As written in the strategy file.
        activation: Grid of the layer's input, one scale per tensor; ``None`` leaves the input float.
        weight: Grid of the layer's weight; symmetric and in whole channels unless the input is float.

    Example:
        >>> STRATEGIES["Quant_INT8-8"].weight.dtype
        'int8'
    """

    name: str
    activation: Grid | None
    weight: Grid

    def unfit(self, *, weight_only: bool, row: int) -> str:
        """Return why a layer cannot have this strategy, or nothing if it can.

        Args:
            weight_only: Whether the backend can leave the layer's input float.
            row: How many weights an output channel has, where they can have groups and zero points; otherwise 0.

        Example:
            >>> STRATEGIES["Quant_FLOAT-4-G32"].unfit(weight_only=True, row=100)
            'gives 32 weights a scale, and an output channel has 100'
        """
        if self.activation is None and not weight_only:
            return "leaves inputs float, which its backend does not do here"
        group = self.weight.group
        if not row and (group is not None or not self.weight.symmetric):
            return "has groups or zero points of weights, which this layer cannot have"
        if group is not None and row % group:
            return f"gives {group} weights a scale, and an output channel has {row}"
        return ""


def _of_bits(activation: int, weight: int) -> Strategy:
    """Return the strategy of asymmetric unsigned activations and symmetric weights per output channel."""
    return Strategy(
        f"Quant_INT{activation}-{weight}",
        activation=Grid(activation),
        weight=Grid(weight, signed=True, symmetric=True, narrow=True, per_channel=True),
    )


def _weights_alone(bits: int, group: int | None = None, *, symmetric: bool = True) -> Strategy:
    """Return the strategy of float activations and integer weights."""
    return Strategy(
        f"Quant_FLOAT-{bits}{'' if symmetric else 'A'}{'' if group is None else f'-G{group}'}",
        activation=None,
        weight=Grid(bits, signed=symmetric, symmetric=symmetric, narrow=symmetric, per_channel=True, group=group),
    )


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        _of_bits(8, 8),
        _of_bits(8, 7),
        _of_bits(8, 4),
        _of_bits(16, 8),
        _of_bits(4, 4),
        _weights_alone(8),
        _weights_alone(4),
        _weights_alone(4, 32),
        _weights_alone(4, 32, symmetric=False),
    )
}
"""The strategies by name. ``Quant_INT8-8``: uint8 asymmetric activations, int8 symmetric weights per output channel.

``Quant_INT8-7`` keeps the sums of two products within 16 bits, for processors whose kernels add in 16 bits.
"""

INTEGER_STRATEGIES: tuple[str, ...] = tuple(name for name, one in STRATEGIES.items() if one.activation is not None)
"""Names of the toolkit's strategies whose layers run in integers: activations and weights."""


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
        else "has asymmetric or grouped weights beside integer activations, which no backend does"
        if found.activation is not None and not (found.weight.symmetric and found.weight.group is None)
        else "has activations per channel, which no backend has"
        if found.activation is not None and found.activation.per_channel
        else ""
    )
    if wrong:
        raise ExtensionError(
            f"The strategy {name!r} {wrong}",
            where=origin,
            expected="a dopt_api.strategy.Strategy of that name: activations per tensor; weights symmetric and in "
            "whole channels, unless activations are float",
            fix="Tell the author of the distribution.",
        )
    strategy: Strategy = found
    return strategy


def find_strategy(
    name: object,
    *,
    layer: str,
    op_type: str,
    supported: Iterable[str],
    where: str,
    unfit: Callable[[Strategy], str] | None = None,
) -> Strategy | None:
    """Return the strategy called ``name``, or ``None`` for ``"float"``.

    Args:
        name: What the strategy file says.
        layer: The layer's name, for the message.
        op_type: The layer's kind, for the message.
        supported: The strategies that the layer can have.
        where: File and line, for the message.
        unfit: Says why the layer cannot have a strategy, if it cannot; without, nothing is known of the layer.

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
    found = get_strategy(name)
    reason = "" if unfit is None else unfit(found)
    if reason or name not in allowed:
        raise StrategyError(
            f"Layer {layer!r} asks for the strategy {name!r}, which {reason or f'{op_type} does not support'}",
            where=where,
            expected=f"one of {', '.join(map(repr, allowed))}",
            fix="Set 'quant_strategy' to one of these.",
        )
    return found
