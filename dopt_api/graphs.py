"""An export's two files as ONNX, whatever graph its backend writes.

What is not ONNX is converted by the backend that wrote it: a function ``to_onnx(model_file, params, onnx_file)`` behind
an entry point of the group ``dopt.graphs``, whose name is the suffix of the model's file without its dot. It writes the
ONNX file and returns the parameters with the names and axes of that graph.
"""

from __future__ import annotations

from pathlib import Path

from dopt_api import extensions
from dopt_api.errors import ExtensionError, FormatError
from dopt_api.files import StrPath
from dopt_api.params import QuantParams, read_params

__all__ = ["as_onnx", "read_export"]


def read_export(params_file: StrPath) -> tuple[Path, QuantParams]:
    """Return the model of an export and its parameters.

    Raises:
        ParamsError: The parameter file cannot be read.
        FormatError: The model is not beside it.
    """
    params = read_params(params_file)
    model = Path(params_file).parent / params.model
    if not model.is_file():
        raise FormatError(
            f"The model {params.model!r} is not beside its parameter file",
            where=str(model.absolute()),
            expected="both files of an export in one folder",
            fix="Copy the model there, or export it again.",
        )
    return model, params


def as_onnx(model: Path, params: QuantParams, folder: Path) -> tuple[Path, QuantParams]:
    """Return an ONNX model and its parameters: as they are, or converted, in a folder.

    Args:
        model: The model of an export.
        params: Its parameters.
        folder: Where ``<model>.onnx`` is written if it is to be converted.

    Raises:
        ParamsError: The parameters are not those of the model.
        FormatError: There is no way from this model to ONNX, or a package that it needs is missing.
        ExtensionError: The distribution that converts it is broken.

    Example:
        >>> model, params = as_onnx(*read_export("out/quant_params.json"), Path("aside"))  # doctest: +SKIP
    """
    if model.suffix == ".onnx":
        return model, params
    try:
        convert, _ = extensions.load(extensions.GRAPHS, model.suffix.removeprefix("."))
    except KeyError:
        raise FormatError(
            f"There is no way from {model.name!r} to ONNX",
            where=str(model.absolute()),
            expected="a model.onnx, or a model of a backend that is installed",
            fix="Install the backend that wrote it (for a model.pb: pip install 'dopt-tf[onnx]').",
        ) from None
    except ExtensionError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        missing = error.__cause__.name
        raise FormatError(
            f"The way from {model.name!r} to ONNX needs the package {missing!r}, which is not installed",
            where=str(model.absolute()),
            fix="pip install 'dopt-tf[onnx]'" if missing in ("onnx", "tf2onnx") else f"pip install {missing}",
        ) from error
    file = folder / f"{model.stem}.onnx"
    return file, convert(model, params, file)
