"""The benchmarks' report: figures with their targets, as JSON and as a table."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

__all__ = [
    "Figure",
    "IncompleteReportError",
    "Samples",
    "check_complete",
    "environment",
    "figures_json",
    "show",
    "write_json",
]

Samples = dict[str, list[float]]
"""What was measured, by name: seconds, or megabytes."""


class IncompleteReportError(Exception):
    """A report lacks a figure, or a figure is no finite number."""


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: Its name in the report.
        unit: ``x`` for a ratio, ``s``, or ``ms``.
        value: The median over the rounds, unless ``name`` says otherwise.
        low: First quartile of the rounds.
        high: Third quartile of the rounds.
        target: The most it may be, or ``None`` if it is only reported.
        aim: What would be better still, or ``None``.
        samples: The measurements behind it.
    """

    name: str
    unit: str
    value: float
    low: float
    high: float
    target: float | None = None
    aim: float | None = None
    samples: Samples = field(default_factory=dict)

    @classmethod
    def of_rounds(
        cls,
        name: str,
        unit: str,
        rounds: Sequence[float],
        samples: Samples,
        *,
        target: float | None = None,
        aim: float | None = None,
    ) -> Figure:
        """Return the figure of repeated rounds: their median and quartiles."""
        low, value, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else [*rounds] * 3
        return cls(name, unit, value, low, high, target, aim, samples)

    @property
    def verdict(self) -> str:
        """``ok`` or ``missed``; empty without a target."""
        if self.target is None:
            return ""
        return "ok" if self.value <= self.target else "missed"


def environment(threads: int) -> dict[str, Any]:
    """Describe the machine and the versions that a report was made with."""
    packages = ("dopt-api", "dopt-torch", "torch", "numpy", "onnx", "onnxruntime", "pluggy")
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average": list(load),
        "threads": threads,
        "allocator": {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "LD_PRELOAD"))},
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def check_complete(figures: Iterable[Figure], wanted: Iterable[str]) -> None:
    """Check that every wanted figure is there and every number in the figures is finite.

    Raises:
        IncompleteReportError: The report lacks a figure, or has one that is no number.
    """
    present = {figure.name: figure for figure in figures}
    missing = [name for name in wanted if name not in present]
    if missing:
        raise IncompleteReportError(f"The report lacks {', '.join(missing)}")
    for figure in present.values():
        numbers = [figure.value, figure.low, figure.high, *(x for list_ in figure.samples.values() for x in list_)]
        if not figure.samples or not all(map(math.isfinite, numbers)):
            raise IncompleteReportError(f"The figure {figure.name!r} is incomplete: {figure}")


def figures_json(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """Return the figures as JSON has them, each with its verdict."""
    return [{**asdict(figure), "verdict": figure.verdict} for figure in figures]


def show(title: str, figures: Iterable[Figure], console: Console) -> None:
    """Print the figures as a table."""
    table = Table("figure", title=title)
    for column in ("median", "quartiles", "target", "aim"):
        table.add_column(column, justify="right")
    table.add_column("")
    for figure in figures:
        unit = f" {figure.unit}"
        table.add_row(
            figure.name,
            f"{figure.value:.3f}{unit}",
            f"{figure.low:.3f} - {figure.high:.3f}",
            "" if figure.target is None else f"<= {figure.target:g}{unit}",
            "" if figure.aim is None else f"{figure.aim:g}{unit}",
            {"ok": "[green]ok[/]", "missed": "[red]missed[/]"}.get(figure.verdict, ""),
        )
    console.print(table)


def write_json(report: dict[str, Any], output: Path | None) -> None:
    """Write a report to a file, or print it if there is none."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
