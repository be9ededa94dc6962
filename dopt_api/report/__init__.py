"""What became of a network, on one page: an HTML file that needs nothing but a browser.

It is made from an exported folder: ``quant_params.json``, the model beside it and, where ``dopt quantize`` wrote it,
``quantization.json``. It needs the extra ``cli`` (Jinja), and shows histograms of weights where ``onnx`` is installed.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from dopt_api.errors import PlotError
from dopt_api.files import StrPath, write_text
from dopt_api.params import LayerParams, QuantParams, read_params
from dopt_api.report.notes import QUANTIZATION, read_quantization

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dopt_api.verify import Feed, Verification

__all__ = ["QUANTIZATION", "write_report"]

BINS = 41
"""Bars of a histogram: enough to see its form, few enough for thousands of layers."""

COLUMNS = (
    ("layer", ""),
    ("kind", ""),
    ("strategy", ""),
    ("#", "place in execution"),
    ("from", "least value of the input's range"),
    ("to", "greatest value of the input's range"),
    ("weights", "how many"),
    ("nearest", "dB: the layer's own output with weights rounded to nearest, against float"),
    ("rounded", "dB: the same with the weights as exported"),
    ("SQNR", "dB: the layer's output against float, with all layers before it quantized"),
    ("clipped", "share of the inputs beyond the range"),
    ("overflow", "share of channels whose 16-bit sums of two products can overflow"),
)
"""The table's headings and what they mean."""


def write_report(folder: StrPath, file: StrPath | None = None, *, feeds: Iterable[Feed] | None = None) -> Path:
    """Write the page of an export.

    Args:
        folder: Where the export is.
        file: The page; by default ``report.html`` in that folder.
        feeds: Data for :func:`dopt_api.verify.verify`, whose figures are then in the table; without, they are not.

    Returns:
        The file.

    Raises:
        ParamsError: A file of the folder cannot be read, or is not that of the model.
        FormatError: There are data, and the model does not run on them.
        OutputError: The page cannot be written.
    """
    source = Path(folder)
    params = read_params(source / "quant_params.json")
    found = None
    if feeds is not None:
        from dopt_api.verify import verify  # noqa: PLC0415  # needs the extra verify

        found = verify(source / "quant_params.json", feeds)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=True
    )
    page = environment.get_template("page.html.j2").render(_content(source, params, found))
    return write_text(source / "report.html" if file is None else file, page)


def _content(folder: Path, params: QuantParams, found: Verification | None) -> dict[str, Any]:
    """Return what the template speaks of."""
    about = read_quantization(folder / QUANTIZATION)
    rounded = {layer["name"]: layer for layer in about.get("layers", [])}
    checks = {} if found is None else {check.name: check for check in found.layers}
    integers = _integers(folder / params.model, params)
    rows = []
    for place, layer in enumerate(params.layers, 1):
        values, check, rounding = integers.get(layer.weight.tensor), checks.get(layer.name), rounded.get(layer.name, {})
        figures = (
            place,
            *_ends(layer),
            None if values is None else values.size,
            _db(rounding.get("nearest")),
            _db(rounding.get("rounded")),
            None if check is None else check.sqnr_db,
            None if check is None else check.clipped,
            None if check is None else check.hazard,
        )
        rows.append(
            {
                "texts": (layer.name, _kind(layer), layer.strategy),
                "figures": [_figure(*pair) for pair in zip(COLUMNS[3:], figures, strict=True)],
                "bins": [] if values is None else _bins(values, layer),
                "reason": rounding.get("reason", ""),
                "damage": math.inf if check is None else check.sqnr_db,
            }
        )
    rows.sort(key=lambda row: row["damage"])  # the most damaged first; in execution order where nothing is known
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".html"]
    return {
        "title": params.model,
        "summary": _summary(params, integers, about, found),
        "columns": COLUMNS,
        "rows": rows,
        "picture": None if found is None else _picture(found),
        "refused": about.get("not_quantizable", []),
        "kept": about.get("float", []),
        "versions": about.get("versions", {}),
        "files": [
            (file.name, f"{file.stat().st_size:,}", hashlib.sha256(file.read_bytes()).hexdigest()) for file in files
        ],
        "config": about.get("config"),
    }


def _integers(model: Path, params: QuantParams) -> dict[str, NDArray[Any]]:
    """Return the weights' integers by tensor, where the model is ONNX and the package there."""
    if model.suffix != ".onnx":
        return {}
    try:
        from dopt_api.formats.onnx_qdq import stored_integers  # noqa: PLC0415  # needs the extra onnx
    except ModuleNotFoundError:
        return {}
    return {name: integers for name, (integers, _) in stored_integers(model, params, "report").items()}


def _kind(layer: LayerParams) -> str:
    """Return the last part of a layer's kind, where that is the name of a class."""
    return layer.op_type.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]


def _ends(layer: LayerParams) -> tuple[float | None, float | None]:
    """Return the range of a layer's input."""
    part = layer.input
    if not part.quantized:
        return None, None
    least = 0 if part.dtype.startswith("u") else -(1 << (part.bits - 1))
    low, high = ((end - part.zero_point[0]) * part.scale[0] for end in (least, least + (1 << part.bits) - 1))
    return low, high


def _db(share: float | None) -> float | None:
    return -10 * math.log10(share) if share else None


def _figure(column: tuple[str, str], value: float | None) -> dict[str, Any]:
    """Return a cell: its text, and the number to sort by."""
    if value is None or not math.isfinite(value):
        return {"text": "" if value is None else "exact", "sort": "" if value is None else 1e9}
    name, about = column
    text = f"{value:,.0f}" if name == "weights" else f"{value:.1%}" if about.startswith("share") else f"{value:.4g}"
    return {"text": text, "sort": float(value)}


def _bins(values: NDArray[Any], layer: LayerParams) -> list[int]:
    """Return how many weights lie in equal parts of the grid."""
    bits, signed = layer.weight.bits, layer.weight.dtype.startswith("int")
    least = -(1 << (bits - 1)) if signed else 0
    count = min(BINS, 1 << bits)
    counts, _ = np.histogram(values, count, (least - 0.5, least + (1 << bits) - 0.5))
    return [int(one) for one in counts]


def _summary(
    params: QuantParams, integers: Mapping[str, NDArray[Any]], about: Mapping[str, Any], found: Verification | None
) -> list[tuple[str, str]]:
    strategies = Counter(layer.strategy for layer in params.layers)
    rows = [("layers quantized", f"{len(params.layers)}")]
    rows += [(f"of them {name}", f"{count}") for name, count in strategies.most_common() if len(strategies) > 1]
    rows += [("strategy", name) for name in strategies if len(strategies) == 1]
    if "float" in about:
        rows.append(("left float by the strategy file", f"{len(about['float'])}"))
        rows.append(("not quantizable", f"{len(about.get('not_quantizable', []))}"))
    parts = {layer.weight.tensor: layer.weight.bits for layer in params.layers if layer.weight.tensor in integers}
    if parts:
        number = sum(integers[name].size for name in parts)
        size = sum(integers[name].size * bits for name, bits in parts.items()) / 8
        rows.append(("quantized weights", f"{number:,}, {size / 1e6:.2f} MB in place of {number * 4 / 1e6:.2f} MB"))
    if found is not None:
        rows.append(("outputs against float", f"{found.sqnr_db:.2f} dB, cosine {found.cosine:.5f}"))
        rows.append(("with all optimizations", f"{found.optimized_db:.2f} dB"))
        rows.append(("kernels", ", ".join(f"{count} {kind}" for kind, count in found.kernels.items())))
    return rows


def _picture(found: Verification) -> str | None:
    """Return the verification's picture as SVG, without what precedes the element; ``None`` without Matplotlib."""
    from dopt_api.plots import plot_verification  # noqa: PLC0415  # an extra

    with tempfile.TemporaryDirectory(prefix="dopt-report-") as folder:
        try:
            text = plot_verification(found, Path(folder) / "layers.svg").read_text(encoding="utf-8")
        except PlotError:
            return None
    return text[text.index("<svg") :]
