"""What became of a network, on one page: an HTML file that needs nothing but a browser.

It is made from an exported folder: ``quant_params.json``, the model beside it and, where ``dopt quantize`` wrote them,
``quantization.json`` and ``tuning.json`` (:mod:`~dopt_api.report.notes`). ``summary``, ``table``, ``details``,
``drawing`` and ``pictures`` each make a part of it, ``page.html.j2`` puts them together. It needs the extra ``cli``
(Jinja), and shows histograms of weights where ``onnx`` is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopt_api.errors import ExtensionError, FormatError
from dopt_api.files import StrPath, write_text
from dopt_api.graphs import as_onnx
from dopt_api.params import QuantParams, read_params
from dopt_api.report.details import details_of
from dopt_api.report.drawing import STATES, draw
from dopt_api.report.notes import QUANTIZATION, TUNING, digest, read_quantization, read_tuning
from dopt_api.report.summary import sizes, summarize
from dopt_api.report.table import COLUMNS, TEXTS, empty_columns, rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dopt_api.formats.integer_nodes import NodeKind
    from dopt_api.verify import Feed, Verification

__all__ = ["QUANTIZATION", "TUNING", "write_report"]


def write_report(
    folder: StrPath,
    file: StrPath | None = None,
    *,
    feeds: Iterable[Feed] | None = None,
    tuning: StrPath | None = None,
    facts: Iterable[tuple[str, str]] = (),
) -> Path:
    """Write the page of an export.

    Args:
        folder: Where the export is.
        file: The page; by default ``report.html`` in that folder.
        feeds: Data for :func:`dopt_api.verify.verify`, whose figures are then in the table; without, they are not.
        tuning: What ``dopt tune`` measured; by default ``tuning.json`` in that folder, where there is one.
        facts: More for the summary, such as ``("top-1 accuracy", "75.1 %")``.

    Returns:
        The file.

    Raises:
        ParamsError: A file of the folder cannot be read, or is not that of the model.
        FormatError: There are data, and the model does not run on them.
        OutputError: The page cannot be written.
    """
    import jinja2  # noqa: PLC0415  # an extra; what is in the package's other modules does without

    source = Path(folder)
    params = read_params(source / "quant_params.json")
    about = read_quantization(source / QUANTIZATION)
    measured = read_tuning(source / TUNING if tuning is None else Path(tuning))
    found = None
    if feeds is not None:
        from dopt_api.verify import verify  # noqa: PLC0415  # needs the extra verify

        found = verify(source / "quant_params.json", feeds)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = _content(source, params, about, measured, found)
    content["summary"] = [*facts, *content["summary"]]
    page = environment.get_template("page.html.j2").render(content)
    return write_text(source / "report.html" if file is None else file, page)


def _content(
    folder: Path,
    params: QuantParams,
    about: Mapping[str, Any],
    measured: Mapping[str, Any],
    found: Verification | None,
) -> dict[str, Any]:
    """Return what the template speaks of."""
    from dopt_api.report import pictures  # noqa: PLC0415  # what is drawn needs more than what is noted

    rounded = {layer["name"]: layer for layer in about.get("layers", [])}
    checks = {} if found is None else {check.name: check for check in found.layers}
    inputs = {name: check.inputs for name, check in checks.items() if check.inputs is not None}
    inputs.update(about.get("inputs", {}))  # calibration has seen more
    with tempfile.TemporaryDirectory(prefix="dopt-report-") as aside:
        graph, named = _as_onnx(folder / params.model, params, Path(aside))
        integers, nodes = _integers(graph, named), _nodes(graph, named)
        drawing = draw(graph, named, about, {node.node: node for node in nodes})
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".html"]
    config = about.get("config")
    table = rows(params, integers, rounded, checks)
    return {
        "title": params.model,
        "summary": summarize(params, integers, about, found, nodes),
        "sizes": sizes(folder / params.model, files),
        "columns": COLUMNS,
        "texts": TEXTS,
        "rows": table,
        "empty": empty_columns(table),
        "details": [
            details_of(layer, integers.get(layer.weight.tensor), inputs.get(layer.name), rounded.get(layer.name, {}))
            for layer in params.layers
        ],
        "states": STATES,
        "drawing": drawing,
        "picture": pictures.verification(found),
        "tuning": pictures.trade_off(measured),
        "edited": bool(config and measured and config["sha256"] != measured["config"]["sha256"]),
        "refused": about.get("not_quantizable", []),
        "kept": about.get("float", []),
        "versions": about.get("versions", {}),
        "files": [(file.name, f"{file.stat().st_size:,}", digest(file)) for file in files],
        "config": config,
    }


def _as_onnx(model: Path, params: QuantParams, folder: Path) -> tuple[Path, QuantParams]:
    """Return the model as ONNX with its parameters; as it is, where there is no way to that."""
    try:
        return as_onnx(model, params, folder)
    except (FormatError, ExtensionError):
        return model, params


def _integers(model: Path, params: QuantParams) -> dict[str, NDArray[Any]]:
    """Return the weights' integers by tensor, where the model is ONNX and the package there."""
    if model.suffix != ".onnx":
        return {}
    try:
        from dopt_api.formats.onnx_qdq import stored_integers  # noqa: PLC0415  # needs the extra onnx
    except ModuleNotFoundError:
        return {}
    return {name: integers for name, (integers, _) in stored_integers(model, params, "report").items()}


def _nodes(model: Path, params: QuantParams) -> tuple[NodeKind, ...]:
    """Return which nodes ONNX Runtime computes in integers; nothing where the export has no such form."""
    try:
        from dopt_api.formats.integer_nodes import nodes_of  # noqa: PLC0415  # needs the extra onnx
        from dopt_api.formats.onnx_qdq import integer_form  # noqa: PLC0415  # likewise

        return nodes_of(integer_form(model, params), params)
    except (FormatError, ModuleNotFoundError):
        return ()
