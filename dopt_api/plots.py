"""Pictures of sensitivities, trade-offs and verifications. They need the extra ``plots`` (Matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopt_api.errors import PlotError
from dopt_api.files import StrPath, staged
from dopt_api.search import Choice, Point
from dopt_api.strategy import FLOAT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dopt_api.verify import Verification

NAMED = 120
"""With more layers, the axis has numbers in place of their names."""

__all__ = ["plot_sensitivity", "plot_trade_off", "plot_verification"]


def plot_trade_off(
    points: Sequence[Point], file: StrPath, *, measured: Mapping[float, float] | None = None, cost: str = "cost"
) -> Path:
    """Draw what a network loses at each budget.

    Args:
        points: What :func:`dopt_api.search.trade_off` returned.
        file: The picture to write, its format by its name: ``.png``, ``.svg`` or ``.pdf``.
        measured: For the cost of a point, its true signal to noise ratio in dB, where it was measured.
        cost: What costs are, for the axis, such as ``"bits of weights"``.

    Returns:
        The file.

    Raises:
        PlotError: There is nothing to draw, or Matplotlib is not installed.
        OutputError: The file cannot be written.

    Example:
        After a search (see the documentation of mixed precision)::

            points = search.trade_off(choices, [0.5 * size, 0.7 * size, size])
            plot_trade_off(points, "trade_off.png", cost="bits of weights")
    """
    shown = [point for point in points if point.damage > 0]
    if not shown:
        raise PlotError("There is no point with damage to draw", expected="points of trade_off, not all of them float")
    figure = _figure(6.4, 4.4)
    axis = figure.subplots()
    ordered = sorted(shown, key=lambda point: point.cost)
    axis.plot([one.cost for one in ordered], [_db(one.damage) for one in ordered], "o-", label="predicted")
    if measured:
        axis.plot(list(measured), list(measured.values()), "s", color="#c44", label="measured")
    axis.set(xlabel=cost, ylabel="SQNR of the outputs [dB]", title="Trade-off")
    axis.grid(alpha=0.3)
    axis.legend()
    return _write(figure, file)


def plot_sensitivity(choices: Iterable[Choice], file: StrPath, *, most: int = 40) -> Path:
    """Draw the damage that each strategy does to each layer, the most damaged first.

    Args:
        choices: What a backend's ``measure_sensitivity`` returned.
        file: The picture to write, its format by its name.
        most: How many layers are drawn.

    Returns:
        The file.

    Raises:
        PlotError: There is nothing to draw, or Matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    shown = [choice for choice in choices if choice.strategy != FLOAT and choice.damage > 0]
    if not shown:
        raise PlotError("There is no damage to draw", expected="choices of layers with strategies other than 'float'")
    greatest: dict[str, float] = {}
    for choice in shown:
        greatest[choice.layer] = max(greatest.get(choice.layer, 0.0), choice.damage)
    layers = sorted(greatest, key=lambda name: -greatest[name])[:most]
    rows = {name: number for number, name in enumerate(layers)}
    figure = _figure(7.0, 1.4 + 0.24 * len(layers))
    axis = figure.subplots()
    for strategy in dict.fromkeys(choice.strategy for choice in shown):
        own = [one for one in shown if one.strategy == strategy and one.layer in rows]
        axis.plot([one.damage for one in own], [rows[one.layer] for one in own], "o", label=strategy, alpha=0.8)
    axis.set_yticks(range(len(layers)), layers, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set(xlabel="damage: share of the outputs' energy", title="Sensitivity")
    axis.grid(alpha=0.3)
    axis.legend()
    return _write(figure, file)


def plot_verification(found: Verification, file: StrPath) -> Path:
    """Draw how near to float each layer's output is, in execution order, and in how many channels sums can overflow.

    Args:
        found: What :func:`dopt_api.verify.verify` returned.
        file: The picture to write, its format by its name.

    Returns:
        The file.

    Raises:
        PlotError: There is nothing to draw, or Matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    if not found.layers:
        raise PlotError("There is no quantized layer to draw", expected="a verification of one layer or more")
    places = range(len(found.layers))
    few = len(found.layers) <= NAMED
    figure = _figure(8.4, 1.6 + 0.2 * min(len(found.layers), NAMED))
    ratio, overflow = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    shown = [
        (one.sqnr_db, place) for place, one in zip(places, found.layers, strict=True) if math.isfinite(one.sqnr_db)
    ]
    ratio.plot([db for db, _ in shown], [place for _, place in shown], "o-", label="layer")
    for db, label, color in (
        (found.sqnr_db, "outputs, as it stands", "#2a2"),
        (found.optimized_db, "outputs, optimized", "#c44"),
    ):
        if math.isfinite(db):
            ratio.axvline(db, label=f"{label}: {db:.1f} dB", color=color, linestyle="--")
    if few:
        ratio.set_yticks(places, [one.name for one in found.layers], fontsize=7)
    else:
        ratio.set(ylabel="layer, in execution order")
    ratio.invert_yaxis()
    ratio.set(xlabel="SQNR against float [dB]", title="Integer model, layer by layer")
    overflow.barh(places, [100 * one.hazard for one in found.layers], color="#c84")
    overflow.set(xlabel="channels [%]", title="16-bit sums can overflow", xlim=(0, 100))
    overflow.title.set_fontsize(9)
    for axis in (ratio, overflow):
        axis.grid(alpha=0.3)
    ratio.legend(fontsize=8)
    return _write(figure, file)


def _db(damage: float) -> float:
    return -10 * math.log10(damage)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  # an extra, and slow to import
    except ModuleNotFoundError as error:
        raise PlotError(
            "Pictures need Matplotlib, which is not installed", fix="pip install 'dopt-api[plots]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Figure, file: StrPath) -> Path:
    """Write a picture whole or not at all; the same picture has the same bytes, and an SVG texts that can be read."""
    from matplotlib import rc_context  # noqa: PLC0415  # as above

    path = Path(file)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise PlotError(
            f"Pictures cannot be written as {path.suffix or path.name!r}",
            where=str(path),
            expected=f"a name that ends in one of {', '.join(f'.{one}' for one in sorted(known))}",
        )
    options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with staged(path.parent) as aside, rc_context({"svg.fonttype": "none", "svg.hashsalt": "dopt"}):
        figure.savefig(aside / path.name, dpi=120, **options)
    return path
