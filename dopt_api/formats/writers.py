"""Finding a format, and writing in it: all files or none."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from dopt_api import extensions
from dopt_api.errors import ExtensionError, FormatError, closest
from dopt_api.files import StrPath, staged
from dopt_api.graphs import as_onnx, read_export
from dopt_api.params import QuantParams

__all__ = ["FORMATS", "Writer", "convert", "format_names", "get_format"]

Writer = Callable[[Path, QuantParams, Path], None]
"""Writes files into a folder, from the model's file and its parameters."""

FORMATS = {
    "onnx_qdq": "dopt_api.formats.onnx_qdq",
    "aimet_encodings": "dopt_api.formats.aimet_encodings",
    "amct_record": "dopt_api.formats.amct_record",
    "csv": "dopt_api.formats.table",
    "safetensors": "dopt_api.formats.integers",
}
"""The modules of the toolkit's own formats; each has its writer under the name ``write``."""

EXTRAS = {"onnx_qdq": "onnx", "safetensors": "safetensors"}
"""What is to be installed for those that need more than the core."""

OF_ONNX = frozenset({"onnx_qdq", "aimet_encodings", "safetensors"})
"""Those that are written from ONNX graphs; other graphs are converted for them (:mod:`dopt_api.graphs`)."""

BESIDE_ONNX = frozenset({"aimet_encodings"})
"""Those of them that speak of a graph which they do not hold: one that had to be converted is written beside them."""


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, those that installed distributions add last."""
    return extensions.names(extensions.FORMATS, FORMATS)


def get_format(name: str) -> Writer:
    """Return the writer of a format.

    Raises:
        FormatError: There is no such format, or what it needs is not installed.
        ExtensionError: The distribution that adds it is broken.
    """
    if name in FORMATS:
        try:
            module = import_module(FORMATS[name])
        except ModuleNotFoundError as error:
            raise FormatError(
                f"The format {name!r} needs the package {error.name!r}, which is not installed",
                fix=f"pip install 'dopt-api[{EXTRAS[name]}]'",
            ) from error
        own: Writer = module.write
        return own
    try:
        found, origin = extensions.load(extensions.FORMATS, name)
    except KeyError:
        raise FormatError(
            f"There is no format {name!r}",
            expected=f"one of {', '.join(map(repr, format_names()))}",
            fix=closest(name, format_names()) or "Install the distribution that adds it, or use one of these.",
        ) from None
    if not callable(found):
        raise ExtensionError(
            f"The format {name!r} is {found!r}",
            where=origin,
            expected="a function that takes the model's file, the parameters and a folder",
            fix="Tell the author of the distribution.",
        )
    writer: Writer = found
    return writer


def convert(params_file: StrPath, format_name: str, output_dir: StrPath) -> list[Path]:
    """Write an exported model in a runtime's own form.

    Args:
        params_file: The ``quant_params.json`` of an export; the model stands beside it.
        format_name: One of :func:`format_names`.
        output_dir: An existing folder. All files appear in it, or none.

    Returns:
        The files, in alphabetical order.

    Raises:
        ParamsError: The parameter file cannot be read, or is not that of the model.
        FormatError: There is no such format, it is not for this kind of model or strategy, or a package is missing.
        ExtensionError: The distribution that adds the format is broken.
        OutputError: The folder does not exist or cannot be written.
    """
    (model, params), write = read_export(params_file), get_format(format_name)
    with staged(output_dir) as aside, tempfile.TemporaryDirectory(prefix="dopt-onnx-") as folder:
        if format_name in OF_ONNX:
            given, (model, params) = model, as_onnx(model, params, Path(folder))
            if model != given and format_name in BESIDE_ONNX:
                shutil.copy(model, aside)
        write(model, params, aside)
        names = sorted(file.name for file in aside.iterdir())
    return [Path(output_dir) / name for name in names]
