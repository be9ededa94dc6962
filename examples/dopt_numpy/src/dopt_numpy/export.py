"""The deployable files: a float ONNX graph, folded, with its weights on their grid; and the parameter file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from dopt_api.errors import ConfigError, never_calibrated
from dopt_api.files import staged
from dopt_api.params import FloatLayer, QuantizedLayer, QuantParams, fold, layer_params, quantize_layer, render_params
from dopt_api.types import ExportResult, Plan
from dopt_numpy.checkpoint import load_checkpoint, load_into
from dopt_numpy.find_layers import Structure
from dopt_numpy.layer_kinds import WEIGHT_AXIS
from dopt_numpy.network import BatchNorm, Network, Weighted
from dopt_numpy.onnx_graph import GraphWriter
from dopt_numpy.optimize import optimize
from dopt_numpy.quantized_layer import QuantizedLayer as SimulatedLayer
from dopt_numpy.quantized_layer import QuantizedNetwork, folding_of

__all__ = ["export"]


def export(
    model: Network,
    plan: Plan,
    checkpoint: Path,
    output_dir: Path,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
) -> ExportResult:
    """Write ``model.onnx`` and ``quant_params.json``, both or neither.

    Args:
        model: The float network, built anew; unchanged.
        plan: The checked strategy file.
        checkpoint: The quantized network's state, saved by :func:`~dopt_numpy.checkpoint.save_checkpoint`.
        output_dir: An existing folder.
        output_names: The name of the output, by default ``output``.
        dynamic_batch: Leave the first axis of input and output open.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable, or does not fit.
        CalibrationError: A quantized layer was neither calibrated nor trained.
        ConfigError: The output names do not fit.
        ModelError: A layer has no ONNX counterpart.
        OutputError: The folder does not exist or cannot be written.
    """
    structure: Structure = plan.model_layers.structure
    name = _output_name(output_names)
    with staged(output_dir) as aside:
        deployed = optimize(model, plan)
        load_into(deployed, load_checkpoint(checkpoint), checkpoint)
        quantized = _quantize(deployed, plan)
        inside = dict(deployed.named_layers())
        weights = {path: (layer.weight, layer.bias) for path, layer in quantized.items()}
        for path, norm_path in structure.norms.items():
            if path not in weights:
                weights[path] = fold(_float_layer(inside[path], inside[norm_path]))
        graph = GraphWriter(deployed, weights, {id(inside[path]) for path in structure.norms.values()})
        written = graph.write(plan.inputs[0], name, structure.output_shape, dynamic_batch)
        entries = [
            layer_params(
                layer,
                calls=graph.calls[path],
                weight_tensor=f"{path}.weight",
                weight_axis=WEIGHT_AXIS,
                bias_tensor=None if layer.bias is None else f"{path}.bias",
            )
            for path, layer in quantized.items()
        ]
        onnx.save_model(written, str(aside / "model.onnx"))
        text = render_params(QuantParams("model.onnx", tuple(entries)))
        (aside / "quant_params.json").write_text(text, encoding="utf-8", newline="\n")
    return ExportResult(output_dir / "model.onnx", output_dir / "quant_params.json")


def _output_name(names: Sequence[str] | None) -> str:
    if names is None:
        return "output"
    if isinstance(names, str) or len(names) != 1 or not names[0]:
        raise ConfigError(f"The output names are {names!r}", expected="a list of one name: the model has one output")
    return names[0]


def _quantize(deployed: QuantizedNetwork, plan: Plan) -> dict[str, QuantizedLayer]:
    """Let the core quantize each layer, by path in execution order.

    Raises:
        CalibrationError: Layers were neither calibrated nor trained.
    """
    structure: Structure = plan.model_layers.structure
    simulated = deployed.quantized_layers
    missing, result = [], {}
    for name, layer_plan in plan.quantized.items():
        path = structure.paths[name]
        layer = simulated[path]
        quantizer = layer.quantizer
        if not quantizer.is_ready():
            missing.append(name)
            continue
        result[path] = quantize_layer(
            _float_layer(layer.layer, layer.norm),
            layer_plan,
            None if quantizer.weight_only else np.float32(quantizer.learned_input_scale),
            int(quantizer.input_zero_point),
            quantizer.weight_gain.value,
        )
    if missing:
        raise never_calibrated(missing)
    return result


def _float_layer(layer: object, norm: object) -> FloatLayer:
    """Return the arrays of a layer and of the batch normalization after it, if any."""
    own = layer.layer if isinstance(layer, SimulatedLayer) else layer
    if not isinstance(own, Weighted):
        raise TypeError(f"{type(own).__name__} has no weight")
    return FloatLayer(
        own.weight.value,
        None if own.bias is None else own.bias.value,
        folding_of(norm) if isinstance(norm, BatchNorm) else None,
        WEIGHT_AXIS,
    )
