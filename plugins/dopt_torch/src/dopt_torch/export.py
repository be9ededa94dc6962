"""The deployable files: a float ONNX graph, folded, with its weights on their grid; and the parameter file."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dopt_api.errors import CalibrationError, DoptError, ModelError
from dopt_api.files import staged
from dopt_api.params import FloatLayer, QuantizedLayer, QuantParams, fold, layer_params, quantize_layer, render_params
from dopt_api.quantizer import BatchNorm
from dopt_api.types import ExportResult, Plan
from dopt_torch.checkpoint import load_checkpoint, load_into
from dopt_torch.fake_quantize import positive
from dopt_torch.find_layers import Structure, evaluating, example_inputs
from dopt_torch.layer_kinds import kind_of
from dopt_torch.onnx_graph import MARK, GraphEditor, mark_value
from dopt_torch.optimize import optimize
from dopt_torch.quantized_layer import norm_factor, original_class, shadowed_weight

__all__ = ["OPSET", "export"]

OPSET = 15
"""The ONNX operator set of the written graphs: the newest that torch 1.11 writes."""


def export(
    model: nn.Module,
    plan: Plan,
    checkpoint: Path,
    output_dir: Path,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
) -> ExportResult:
    """Write ``model.onnx`` and ``quant_params.json``, both or neither.

    Args:
        model: The float model, built anew; unchanged.
        plan: The checked strategy file.
        checkpoint: The quantized model's state dict, saved by ``torch.save``.
        output_dir: An existing folder.
        output_names: Names of the outputs; by default ``output``, or ``output_0``, ``output_1`` ...
        dynamic_batch: Leave the first axis of inputs and outputs open.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable, unsafe, or does not fit.
        CalibrationError: A quantized layer was neither calibrated nor trained.
        ModelError: The model does not run on its input shapes, or has an operation without ONNX counterpart.
        OutputError: The folder does not exist or cannot be written.
    """
    with staged(output_dir) as aside:
        deployed = optimize(model, plan).cpu()
        load_into(deployed, load_checkpoint(checkpoint), checkpoint)
        layers = _quantize(deployed, plan)
        _fold(deployed, layers, plan.model_layers.structure)
        graph = GraphEditor(_to_onnx(deployed.float(), plan, layers, output_names, dynamic_batch))
        params = []
        for index, layer in enumerate(layers):
            place = graph.settle(index, layer.path, layer.result.weight, layer.result.bias, layer.result.axis)
            params.append(layer_params(layer.result, **asdict(place)))
        onnx.save_model(graph.finish(), str(aside / "model.onnx"))
        text = render_params(QuantParams("model.onnx", tuple(params)))
        (aside / "quant_params.json").write_text(text, encoding="utf-8", newline="\n")
    return ExportResult(output_dir / "model.onnx", output_dir / "quant_params.json")


@dataclass(eq=False)
class _Layer:
    path: str
    module: nn.Module
    result: QuantizedLayer


def _quantize(model: nn.Module, plan: Plan) -> list[_Layer]:
    """Let the core quantize each layer, in execution order.

    Raises:
        CalibrationError: Layers were neither calibrated nor trained.
    """
    structure: Structure = plan.model_layers.structure
    missing, result = [], []
    for name, layer_plan in plan.quantized.items():
        path = structure.paths[name]
        module = model.get_submodule(path)
        quantizer: Any = module.dopt_quantizer
        if not quantizer.is_ready():
            missing.append(name)
            continue
        learned = quantizer.learned_weight_scale(norm_factor(module)) if quantizer.weight_learned else None
        float_layer = _float_layer(module, model.get_submodule(norm) if (norm := structure.norms.get(path)) else None)
        quantized = quantize_layer(
            float_layer,
            layer_plan,
            np.float32(positive(quantizer.input_scale).detach().numpy()),
            int(quantizer.input_zero_point),
            None if learned is None else learned.detach().numpy(),
        )
        result.append(_Layer(path, module, quantized))
    if missing:
        more = f" and {len(missing) - 1} other layers were" if len(missing) > 1 else " was"
        raise CalibrationError(
            f"Layer {missing[0]!r}{more} neither calibrated nor trained",
            where=f"layer {missing[0]!r}",
            expected="a checkpoint saved after calibration or retraining",
            fix="set_calibrate_state(quant_model, True), run the calibration set through it, "
            "set_calibrate_state(quant_model, False), then save the checkpoint.",
        )
    return result


def _float_layer(module: Any, norm: Any) -> FloatLayer:
    """Return the arrays of a layer and of the batch normalization after it, if any."""
    kind = kind_of(module)
    if kind is None:
        raise ModelError(f"{type(module).__name__} is no layer that can be quantized")
    return FloatLayer(
        _array(module.weight),
        None if module.bias is None else _array(module.bias),
        None
        if norm is None
        else BatchNorm(
            None if norm.weight is None else _array(norm.weight),
            None if norm.bias is None else _array(norm.bias),
            _array(norm.running_mean),
            _array(norm.running_var),
            float(norm.eps),
        ),
        kind.weight_axis,
    )


def _array(tensor: Any) -> NDArray[np.floating]:
    array: NDArray[np.floating] = tensor.detach().cpu().double().numpy()
    return array if tensor.dtype == torch.float64 else array.astype(np.float32)


def _fold(model: nn.Module, layers: list[_Layer], structure: Structure) -> None:
    """Put folded (and for quantized layers, quantized) weights in place; take out the batch normalizations."""
    done = {layer.path: (layer.result.weight, layer.result.bias) for layer in layers}
    for path, norm_path in structure.norms.items():
        if path not in done:
            done[path] = fold(_float_layer(model.get_submodule(path), model.get_submodule(norm_path)))
        parent, _, name = norm_path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    for path, (weight, bias) in done.items():
        module = model.get_submodule(path)
        module.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(torch.from_numpy(bias), requires_grad=False)


def _to_onnx(
    model: nn.Module, plan: Plan, layers: list[_Layer], output_names: Sequence[str] | None, dynamic_batch: bool
) -> onnx.ModelProto:
    """Run torch's TorchScript exporter with the weight of every quantized layer marked by its index."""
    structure: Structure = plan.model_layers.structure
    if output_names is None and structure.outputs is not None:
        count = structure.outputs
        output_names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    inputs = [spec.name for spec in plan.inputs]
    options: dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    if dynamic_batch:
        options["dynamic_axes"] = {name: {0: "batch"} for name in [*inputs, *(output_names or [])]}
    written = io.BytesIO()
    try:
        with evaluating(model), _marked(layers), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's remarks on its own deprecation and on tracing
            torch.onnx.export(
                model,
                example_inputs(model, plan.inputs),
                written,  # type: ignore[arg-type]  # the TorchScript exporter writes to buffers too
                opset_version=OPSET,
                input_names=inputs,
                output_names=None if output_names is None else list(output_names),
                **options,
            )
    except DoptError:
        raise
    except Exception as error:  # the exporter and the user's model raise many kinds
        raise ModelError(
            f"The model cannot be written as ONNX: {type(error).__name__}: {' '.join(str(error).split())[:400]}",
            where=f"input_shape {', '.join(f'{spec.name}:{list(spec.shape)}' for spec in plan.inputs)}",
            expected=f"a model that runs on these shapes and whose operations exist in ONNX opset {OPSET}",
            fix="Try torch.onnx.export on the float model alone to see the cause.",
        ) from error
    return onnx.load_model_from_string(written.getvalue())


class _Mark(torch.autograd.Function):
    """The identity for torch, and for ONNX a node that names a layer."""

    @staticmethod
    def forward(_ctx: Any, weight: Tensor, _index: int) -> Tensor:
        return weight.clone()

    @staticmethod
    def symbolic(g: Any, weight: Any, index: int) -> Any:
        return g.op(MARK, weight, alpha_f=mark_value(index))


@contextmanager
def _marked(layers: list[_Layer]) -> Iterator[None]:
    """Let the layers compute as float layers, with marked weights, for the time of the block."""
    classes = [type(layer.module) for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.module.__dict__["dopt_index"] = index
            layer.module.__class__ = _marked_class(original_class(layer.module))
        yield
    finally:
        for layer, kind in zip(layers, classes, strict=True):
            layer.module.__class__ = kind


def _marked_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        marked = _Mark.apply(self._parameters["weight"], self.__dict__["dopt_index"])
        with shadowed_weight(self, marked):
            return original.forward(self, *args, **kwargs)

    return type(original.__name__, (original,), {"forward": forward})
