"""The page's plots, drawn by Matplotlib as SVG; without it the page has none."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopt_api.errors import PlotError
from dopt_api.plots import plot_sensitivity, plot_trade_off, plot_verification

if TYPE_CHECKING:
    from dopt_api.verify import Verification

__all__ = ["trade_off", "verification"]


def verification(found: Verification | None) -> str | None:
    """Return the picture of a verification as an SVG element, or ``None``."""
    return None if found is None else _drawn(lambda file: plot_verification(found, file))


def trade_off(tuning: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return pictures of sensitivities and of the trade-off with what they show, for what ``dopt tune`` wrote."""
    if not tuning:
        return []
    cost = {"size": "bits of weights", "bit_operations": "multiplications times bits"}
    unit = cost.get(tuning["search"]["cost"], tuning["search"]["cost"])
    found = [
        ("Sensitivity of each layer alone", _drawn(lambda file: plot_sensitivity(tuning["choices"], file))),
        ("Trade-off of damage and cost", _drawn(lambda file: plot_trade_off(tuning["points"], file, cost=unit))),
    ]
    return [(name, picture) for name, picture in found if picture is not None]


def _drawn(draw: Callable[[Path], Path]) -> str | None:
    """Return an SVG without what precedes the element."""
    with tempfile.TemporaryDirectory(prefix="dopt-report-") as folder:
        try:
            text = draw(Path(folder) / "picture.svg").read_text(encoding="utf-8")
        except PlotError:
            return None
    return text[text.index("<svg") :]
