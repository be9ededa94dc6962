"""Mixed precision: the strategy of each layer under a budget, chosen exactly for a stated proxy.

The proxy: the damage of a whole model is the sum of the damages of its layers, each measured alone. That is the
diagonal of a second-order expansion of the loss (Dong et al. 2020, "HAWQ-V2"); layers that make up for each other's
errors, or add to them, are not seen, so the result is to be checked by measuring the true loss. Within the proxy the
choice is exact: a multiple-choice knapsack, solved as an integer program (Hubara et al. 2021, "Accurate post training
quantization with small calibration sets").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dopt_api.errors import SearchError

__all__ = ["Choice", "Point", "choose", "require_solver", "trade_off"]


@dataclass(frozen=True)
class Choice:
    """What one strategy would do to one layer.

    Attributes:
        layer: The layer's name.
        strategy: The strategy's name, or ``float``.
        damage: What it adds to the loss, 0 or more; the unit is the caller's.
        cost: What it takes of the budget, 0 or more: bits of the weights, multiplications times bits, or the like.
    """

    layer: str
    strategy: str
    damage: float
    cost: float


@dataclass(frozen=True)
class Point:
    """A choice for every layer.

    Attributes:
        strategies: The strategy of each layer by name, in the order in which layers were first given.
        damage: The sum of the damages.
        cost: The sum of the costs, at most the budget.
    """

    strategies: dict[str, str]
    damage: float
    cost: float


def choose(choices: Iterable[Choice], budget: float) -> Point:
    """Return the choice for every layer whose damages sum to the least, and whose costs to no more than a budget.

    Args:
        choices: For every layer one or more.
        budget: In the unit of the costs.

    Raises:
        SearchError: There is nothing to choose from, a number is negative or not finite, or even the cheapest choices
            cost more than the budget.

    Example:
        >>> point = choose([
        ...     Choice("conv", "Quant_INT8-8", 1.0, 800), Choice("conv", "Quant_INT8-4", 9.0, 400),
        ...     Choice("fc", "Quant_INT8-8", 1.0, 800), Choice("fc", "Quant_INT8-4", 2.0, 400)], budget=1300)
        >>> point.strategies
        {'conv': 'Quant_INT8-8', 'fc': 'Quant_INT8-4'}
    """
    return trade_off(choices, [budget])[0]


def trade_off(choices: Iterable[Choice], budgets: Sequence[float]) -> list[Point]:
    """Return what :func:`choose` gives for each of several budgets.

    Raises:
        SearchError: As :func:`choose`.
    """
    listed = list(choices)
    _check(listed)
    layers = {name: number for number, name in enumerate(dict.fromkeys(choice.layer for choice in listed))}
    owner = np.array([layers[choice.layer] for choice in listed])
    damage, cost = (np.array([getattr(choice, part) for choice in listed]) for part in ("damage", "cost"))
    cheapest = np.full(len(layers), np.inf)
    np.minimum.at(cheapest, owner, cost)
    points = []
    for budget in budgets:
        if not cheapest.sum() <= budget:
            raise SearchError(
                f"The budget {budget:g} cannot be kept: the cheapest strategies cost {cheapest.sum():g} together",
                expected=f"a budget of at least {cheapest.sum():g}",
                fix="Raise the budget, or offer cheaper strategies.",
            )
        taken = np.flatnonzero(_solve(owner, damage, cost, budget))
        strategies = {listed[index].layer: listed[index].strategy for index in taken}
        ordered = {name: strategies[name] for name in layers}
        points.append(Point(ordered, float(damage[taken].sum()), float(cost[taken].sum())))
    return points


def require_solver() -> None:
    """Raise if there is nothing to search with; for those who have long work before the search.

    Raises:
        SearchError: SciPy is not installed.
    """
    choose([Choice("", "", 0.0, 0.0)], 0.0)


def _solve(
    owner: NDArray[np.int_],
    damage: NDArray[np.float64],
    cost: NDArray[np.float64],
    budget: float,
) -> NDArray[np.bool_]:
    """Return which choices are taken, one for each owner."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415  # an extra, and slow to import
        from scipy.sparse import csr_array  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SearchError(
            "The search needs SciPy, which is not installed", fix="pip install 'dopt-api[search]'"
        ) from error
    one_each = csr_array((np.ones(owner.size), (owner, np.arange(owner.size))))
    unit = damage.max() or 1.0, cost.max() or 1.0  # numbers about 1 suit the solver's tolerances
    found = milp(
        damage / unit[0],
        integrality=np.ones(owner.size, np.int8),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost[None] / unit[1], -np.inf, budget / unit[1]),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise SearchError(f"The search failed: {found.message}", fix="Report it, with the choices and the budget.")
    taken: NDArray[np.bool_] = found.x > 0.5
    return taken


def _check(choices: Sequence[Choice]) -> None:
    if not choices:
        raise SearchError("There is nothing to choose from", expected="one or more strategies for each layer")
    for choice in choices:
        for part in ("damage", "cost"):
            value = getattr(choice, part)
            if not (np.isfinite(value) and value >= 0):
                raise SearchError(
                    f"The {part} of {choice.strategy!r} is {value!r}",
                    where=f"layer {choice.layer!r}",
                    expected="a finite number, 0 or more",
                )
