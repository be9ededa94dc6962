"""What ``dopt quantize`` and ``dopt tune`` leave for the report, beside the files of an export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopt_api import __version__
from dopt_api.errors import ParamsError
from dopt_api.files import StrPath, write_text
from dopt_api.quantizer.histogram import Histogram, condensed
from dopt_api.search import Choice, Point

if TYPE_CHECKING:
    from dopt_api.quantizer import Statistics
    from dopt_api.quantizer.rounding import RoundedLayer
    from dopt_api.types import BackendInfo, Plan

__all__ = [
    "QUANTIZATION",
    "TUNING",
    "digest",
    "read_quantization",
    "read_tuning",
    "tuning_beside",
    "write_quantization",
    "write_tuning",
]

QUANTIZATION = "quantization.json"
"""What ``dopt quantize`` writes beside the exported files: what rounding did, and from what it all came."""

TUNING = "tuning.json"
"""What ``dopt tune`` measured, where a report finds it."""


def write_quantization(
    folder: Path,
    plan: Plan,
    backend: BackendInfo,
    layers: Iterable[RoundedLayer],
    seen: Mapping[str, Statistics],
) -> Path:
    """Write what rounding did to each layer, what its input was like, and from what it all came.

    Args:
        folder: That of the export.
        plan: What was done.
        backend: What did it.
        layers: What rounding did.
        seen: What calibration saw, by the layer's name.

    Raises:
        OutputError: The file cannot be written.
    """
    config, found = plan.config_file, plan.model_layers
    content = {
        "config": {"name": config.name, "sha256": digest(config)},
        "versions": {
            "dopt-api": __version__,
            f"backend {backend.name}": backend.version,
            backend.framework: backend.framework_version,
        },
        "layers": [asdict(layer) for layer in layers],
        "inputs": {name: asdict(condensed(statistics)) for name, statistics in seen.items()},
        "float": [layer.name for layer in found.layers if layer.name not in plan.quantized],
        "not_quantizable": [
            {"name": layer.name, "op_type": layer.op_type, "reason": layer.reason} for layer in found.not_quantizable
        ],
    }
    return write_text(folder / QUANTIZATION, _rendered(content))


def read_quantization(file: Path) -> dict[str, Any]:
    """Return what was noted, with histograms under ``inputs``; nothing if another way led to the export.

    Raises:
        ParamsError: The file is there and is not what it should be.
    """

    def understand(content: dict[str, Any]) -> dict[str, Any]:
        for layer in content["layers"]:
            layer["name"], layer["nearest"], layer["rounded"]
        inputs = content.get("inputs", {})
        content["inputs"] = {name: _histogram(one) for name, one in inputs.items()}
        return content

    return _read(file, "dopt quantize", understand) if file.exists() else {}


def write_tuning(
    file: StrPath, config: Path, choices: Iterable[Choice], points: Iterable[Point], whole: float, cost: str
) -> Path:
    """Write what a search was made from and what it found.

    Args:
        file: The file to write.
        config: The strategy file that came of it.
        choices: The damage and the cost of each strategy for each layer.
        points: The trade-off, the choice that was made first.
        whole: What the strategy file costs with which the search began.
        cost: What costs are: ``size`` or ``bit_operations``.

    Raises:
        OutputError: The file cannot be written.
    """
    content = {
        "config": {"name": config.name, "sha256": digest(config)},
        "search": {"cost": cost, "whole": whole},
        "choices": [asdict(choice) for choice in choices],
        "points": [asdict(point) for point in points],
    }
    return write_text(file, _rendered(content))


def read_tuning(file: Path) -> dict[str, Any]:
    """Return what was written, with choices and points as such; nothing if there is no file.

    Raises:
        ParamsError: The file is there and is not what it should be.
    """

    def understand(content: dict[str, Any]) -> dict[str, Any]:
        content["choices"] = [Choice(**one) for one in content["choices"]]
        content["points"] = [Point(**one) for one in content["points"]]
        content["search"]["cost"], content["search"]["whole"], content["config"]["sha256"]
        return content

    return _read(file, "dopt tune", understand) if file.exists() else {}


def tuning_beside(config: Path) -> Path:
    """Return where ``dopt tune`` puts what it measured: beside the strategy file that it writes.

    Example:
        >>> tuning_beside(Path("mixed.json")).name
        'mixed.tuning.json'
    """
    return config.with_name(f"{config.stem}.{TUNING}")


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _histogram(content: Mapping[str, Any]) -> Histogram:
    return Histogram(float(content["low"]), float(content["width"]), tuple(int(one) for one in content["counts"]))


def _read(file: Path, writer: str, understand: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    try:
        return understand(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParamsError(
            f"The file {str(file)!r} cannot be understood: {type(error).__name__}: {error}",
            where=str(file.absolute()),
            expected=f"what {writer} wrote",
            fix=f"Remove it to have the page without it, or run {writer} again.",
        ) from error


def _rendered(content: Mapping[str, Any]) -> str:
    """Return JSON with one line for each entry of an entry: thousands of layers stay readable."""
    parts = []
    for key, value in content.items():
        pairs = isinstance(value, Mapping)
        lines = (
            [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()]
            if pairs
            else [*map(json.dumps, value)]
        )
        inside = "\n  " + ",\n  ".join(lines) + "\n " if lines else ""
        parts.append(f" {json.dumps(key)}: " + (f"{{{inside}}}" if pairs else f"[{inside}]"))
    return "{\n" + ",\n".join(parts) + "\n}\n"
