"""The five calls of the contract, for any framework: dispatched on the model's own type or on ``backend``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopt_api import config, manager
from dopt_api.errors import ConfigError, ModelError
from dopt_api.files import StrPath, staged
from dopt_api.formats import convert, get_format
from dopt_api.types import ExportResult, ModelLayers, Plan

if TYPE_CHECKING:
    from dopt_api.manager import Backend, BackendStatus

__all__ = ["backends", "check", "export", "generate_config", "get_quant_loss", "optimize", "set_calibrate_state"]

_log = logging.getLogger("dopt")


def backends() -> list[BackendStatus]:
    """Return the installed backends, those that do not load with the reason. No framework is imported."""
    return manager.statuses()


def generate_config(
    model: Any,
    input_shape: str | None = None,
    dst_path: StrPath = "./config_gen.json",
    *,
    backend: str | None = None,
) -> Path:
    """Write the strategy file of a float model, every layer ``float``.

    Args:
        model: The float model; unchanged.
        input_shape: Shapes of the model as deployed, ``"input1:1,3,224,224;input2:1,10"``, where the backend needs it.
        dst_path: The file to write.
        backend: The backend's name; by default the one of the model's type.

    Returns:
        The path of the file.

    Raises:
        ModelError: The model has no layer that can be quantized, or cannot be handled.
        ConfigError: ``input_shape`` cannot be understood.
        OutputError: The file cannot be written.
    """
    chosen = manager.select(model, backend)
    found = _find_layers(chosen, model, input_shape)
    return config.write(dst_path, found, input_shape)


def optimize(
    model: Any,
    config_file: StrPath,
    *,
    is_train_flag: Any = None,
    quant_flag: Any = None,
    backend: str | None = None,
) -> Any:
    """Return the model with fake quantization in the layers that the strategy file chooses.

    Args:
        model: The float model.
        config_file: The edited strategy file.
        is_train_flag: For session graphs: whether scales follow training.
        quant_flag: For session graphs: 0 for the float path, positive for the quantized one.
        backend: The backend's name; by default the one of the model's type.

    Raises:
        ConfigError: The file cannot be read or does not fit the model.
        ModelError: The model is already quantized, or cannot be handled.
    """
    chosen = manager.select(model, backend)
    plan = _plan(chosen, model, config_file)
    if not plan.quantized:
        _log.warning("Every layer in %s is 'float': nothing will be quantized.", config_file)
    return chosen.optimize(model, plan, is_train_flag, quant_flag)


def set_calibrate_state(model: Any, calibration_mode: bool, *, backend: str | None = None) -> None:
    """Switch calibration on (forward passes collect statistics in float) or off (ranges become scales).

    Args:
        model: What :func:`optimize` returned.
        calibration_mode: On or off.
        backend: The backend's name; by default the one of the model's type.

    Raises:
        CalibrationError: On switching off: a layer saw no data, or saw NaN or infinity.
        ModelError: The model is not a quantized one, or the mode is neither ``True`` nor ``False``.
    """
    if calibration_mode not in (True, False):
        raise ModelError(f"The calibration mode is {calibration_mode!r}", expected="True or False")
    manager.select(model, backend).set_calibrate_state(model, bool(calibration_mode))


def get_quant_loss(model: Any, *, backend: str | None = None) -> Any:
    """Return the quantization loss of a quantized model, a differentiable dimensionless scalar.

    Args:
        model: What :func:`optimize` returned.
        backend: The backend's name; by default the one of the model's type.

    Raises:
        ModelError: The model is not a quantized one.
    """
    return manager.select(model, backend).get_quant_loss(model)


def export(
    model: Any,
    config_file: StrPath,
    checkpoint: StrPath,
    output_dir: StrPath = ".",
    *,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = False,
    formats: Sequence[str] = (),
    backend: str | None = None,
) -> ExportResult:
    """Write the deployable float graph and ``quant_params.json``, and other forms of them: all files or none.

    Args:
        model: The float model, built anew; unchanged.
        config_file: The strategy file that was given to :func:`optimize`.
        checkpoint: What was saved after calibration or retraining; nothing in it is executed.
        output_dir: An existing folder.
        output_names: Names of the graph's outputs.
        dynamic_batch: Leave the batch size of the graph open.
        formats: Names of formats to write as well, such as ``"onnx_qdq"``; see :mod:`dopt_api.formats`.
        backend: The backend's name; by default the one of the model's type.

    Returns:
        The paths of the files.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable, or does not fit.
        CalibrationError: A quantized layer was neither calibrated nor trained.
        FormatError: A format does not exist, needs a package, or is not for this model or strategy.
        OutputError: The folder does not exist or cannot be written.
    """
    for name in formats:
        get_format(name)  # what cannot be written is said before the work
    chosen = manager.select(model, backend)
    plan = _plan(chosen, model, config_file)
    folder = Path(output_dir)
    if not formats:
        return chosen.export(model, plan, Path(checkpoint), folder, output_names, dynamic_batch)
    with staged(folder) as aside:
        made = chosen.export(model, plan, Path(checkpoint), aside, output_names, dynamic_batch)
        others = [file.name for name in formats for file in convert(made.params, name, aside)]
    places = tuple(folder / name for name in others)
    return ExportResult(folder / made.model.name, folder / made.params.name, places)


def check(model: Any, config_file: StrPath, *, backend: str | None = None) -> Plan:
    """Check a strategy file against the model that it is for, and return what is to be done.

    Args:
        model: The float model; unchanged.
        config_file: The strategy file.
        backend: The backend's name; by default the one of the model's type.

    Raises:
        ConfigError: The file is broken, or not that of the model.
        StrategyError: A strategy is unknown or not supported for the kind of layer.
    """
    return _plan(manager.select(model, backend), model, config_file)


def _plan(backend: Backend, model: Any, config_file: StrPath) -> Plan:
    file = config.read(config_file)
    plan = config.check(file, _find_layers(backend, model, file.input_shape))
    recorded = [layer.name for layer in plan.quantized.values() if layer.output]
    if recorded and not backend.info.capabilities.recorded_outputs:
        raise ConfigError(
            f"The backend {backend.info.name!r} does not record the outputs of layers",
            where=file.where("layer_strategy", recorded[0]),
            expected=f"no 'output' of layer {recorded[0]!r}",
            fix="Remove 'output' from the file.",
        )
    return plan


def _find_layers(backend: Backend, model: Any, input_shape: str | None) -> ModelLayers:
    found = backend.find_layers(model, input_shape)
    for note in found.notes:
        _log.warning("%s", note)
    if not found.layers:
        refused = "; ".join(f"{layer.name}: {layer.reason}" for layer in found.not_quantizable[:5])
        raise ModelError(
            "The model has no layer that can be quantized" + (f" ({refused})" if refused else ""),
            expected="a model with convolution or linear layers",
        )
    return found
