"""The calls of the vendor's tool, under its names: a script written for it changes its ``sys.path`` line at most.

Example:
    Calibration, from a float model to a deployable one::

        generate_config_file(model, "x:1,3,224,224", "config.json")    # then edit the file
        quant_model = optimize_model(model, "config.json")
        set_calibrate_state(quant_model, True)
        for batch in calibration_set:
            quant_model(batch)
        set_calibrate_state(quant_model, False)
        torch.save(quant_model.state_dict(), "quant.pth")
        generate_final_model(build_model(), "config.json", "quant.pth", "out")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import dopt_api

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dopt_api.files import StrPath
    from dopt_api.types import ExportResult

__all__ = ["generate_config_file", "generate_final_model", "get_quant_loss", "optimize_model", "set_calibrate_state"]


def generate_config_file(model: nn.Module, input_shape: str, dst_path: StrPath = "./config_gen.json") -> Path:
    """Write the strategy file of a float model, every layer ``float``.

    Args:
        model: The float model, not wrapped by a distributed API; unchanged.
        input_shape: Shapes of the model as deployed, batch first: ``"input1:1,3,224,224;input2:1,10"``. Inputs are
            floats unless a third part names their dtype: ``"ids:1,128:int64"``.
        dst_path: The JSON file to write.

    Returns:
        The path of the file.

    Raises:
        ModelError: The model is wrapped, or has no layer that can be quantized.
        ConfigError: ``input_shape`` cannot be understood.
        OutputError: The file cannot be written.
    """
    return dopt_api.generate_config(model, input_shape, dst_path, backend="torch")


def optimize_model(model: nn.Module, config_path: StrPath) -> nn.Module:
    """Return a quantized copy of a float model; ``model`` itself is unchanged.

    Build the optimizer on the returned model's parameters, and wrap that model for distributed training.

    Args:
        model: The float model, not wrapped by a distributed API.
        config_path: The edited strategy file.

    Raises:
        ConfigError: The file cannot be read or does not fit the model.
        ModelError: The model is wrapped or already quantized.
    """
    quantized: nn.Module = dopt_api.optimize(model, config_path, backend="torch")
    return quantized


def set_calibrate_state(quant_model: nn.Module, calibration_mode: bool) -> None:
    """Switch calibration (training-free quantization) on or off.

    While it is on, forward passes run in float and in evaluation mode, and collect statistics.

    Args:
        quant_model: What :func:`optimize_model` returned.
        calibration_mode: On or off.

    Raises:
        CalibrationError: On switching off: a layer saw no data, or saw NaN or infinity.
    """
    dopt_api.set_calibrate_state(quant_model, calibration_mode, backend="torch")


def get_quant_loss(quant_model: nn.Module) -> Tensor:
    """Return the quantization loss, a differentiable dimensionless scalar; call it after the forward pass.

    Add it to the task's loss with a small weight (about 1:20); simple tasks do without.

    Args:
        quant_model: What :func:`optimize_model` returned.
    """
    loss: Tensor = dopt_api.get_quant_loss(quant_model, backend="torch")
    return loss


def generate_final_model(
    model: nn.Module,
    config_file: StrPath,
    pth_file: StrPath,
    output_dir: StrPath = "./",
    *,
    dynamic_batch: bool = False,
) -> ExportResult:
    """Write ``model.onnx`` (float, folded, weights on their grid) and ``quant_params.json``, both or neither.

    Args:
        model: The float model, built anew; unchanged.
        config_file: The strategy file that was given to :func:`optimize_model`.
        pth_file: The quantized model's state dict, saved after calibration or retraining; nothing in it is executed.
        output_dir: An existing folder.
        dynamic_batch: Leave the batch size of the graph open.

    Returns:
        The paths of the two files.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable, unsafe, or does not fit.
        CalibrationError: A quantized layer was neither calibrated nor trained.
        OutputError: The folder does not exist or cannot be written.
    """
    return dopt_api.export(model, config_file, pth_file, output_dir, dynamic_batch=dynamic_batch, backend="torch")
