"""The deployable files: a float ONNX graph, folded, with its weights on their grid; and the parameter file."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dopt_api.errors import ConfigError, DoptError, ModelError, never_calibrated
from dopt_api.files import staged
from dopt_api.params import FloatLayer, QuantizedLayer, QuantParams, fold, layer_params, quantize_layer, render_params
from dopt_api.quantizer import BatchNorm, learned_scale
from dopt_api.types import ExportResult, Plan
from dopt_torch.activation import ActivationQuantizer
from dopt_torch.checkpoint import load_checkpoint, load_into
from dopt_torch.find_layers import Structure, evaluating, example_inputs, tensors_of
from dopt_torch.layer_kinds import kind_of
from dopt_torch.onnx_graph import MARK, GraphEditor, mark_value
from dopt_torch.optimize import optimize
from dopt_torch.quantized_layer import norm_of, original_class, shadowed, with_input

__all__ = ["OPSET", "export"]

_log = logging.getLogger("dopt")

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
        ConfigError: The output names do not fit.
        ModelError: The model does not run on its input shapes, or has an operation without ONNX counterpart.
        OutputError: The folder does not exist or cannot be written.
    """
    names = _output_names(plan, output_names)
    with torch.inference_mode(False), staged(output_dir) as aside:
        deployed = optimize(model, plan).cpu()
        load_into(deployed, load_checkpoint(checkpoint), checkpoint)
        layers = _layers(deployed, plan)
        inputs = _float_inputs(deployed, plan)
        _spell_out_padding(deployed.float())
        _substitute(deployed, layers, plan, inputs)
        graph = GraphEditor(_to_onnx(deployed, plan, inputs, names, dynamic_batch))
        params = []
        for index, layer in enumerate(layers):
            smoothed = layer.module._parameters["dopt_smoothing"] is not None
            place = graph.settle(
                index,
                layer.path,
                layer.weight,
                layer.bias,
                layer.source.axis,
                smoothed=smoothed,
                recorded=layer.recorded,
                rectified=layer.path in plan.model_layers.structure.rectifiers,
            )
            if layer.quantized is None:
                continue
            if place is None:
                _log.warning(
                    "Layer %r is not in the exported files: no output of the model depends on it.",
                    layer.quantized.plan.name,
                )
                continue
            params.append(layer_params(layer.quantized, **asdict(place)))
        onnx.save_model(graph.finish(), str(aside / "model.onnx"))
        text = render_params(QuantParams("model.onnx", tuple(params)))
        (aside / "quant_params.json").write_text(text, encoding="utf-8", newline="\n")
    return ExportResult(output_dir / "model.onnx", output_dir / "quant_params.json")


@dataclass(eq=False)
class _Layer:
    """A layer whose weight the export replaces: because it is quantized, or folded, or both."""

    path: str
    module: nn.Module
    source: FloatLayer
    quantized: QuantizedLayer | None

    @property
    def recorded(self) -> bool:
        return self.quantized is not None and self.quantized.plan.output

    @property
    def weight(self) -> NDArray[np.float32]:
        return fold(self.source)[0] if self.quantized is None else self.quantized.weight

    @property
    def bias(self) -> NDArray[np.float32] | None:
        return fold(self.source)[1] if self.quantized is None else self.quantized.bias


def _output_names(plan: Plan, names: Sequence[str] | None) -> list[str] | None:
    """Return the names of the graph's outputs, or ``None`` where their number is not known.

    Raises:
        ConfigError: The names asked for are not as many as the outputs, or not unique.
    """
    structure: Structure = plan.model_layers.structure
    count, inputs = structure.outputs, [spec.name for spec in plan.inputs]
    if names is None:
        return None if count is None else ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    if len({*names, *inputs}) != len(names) + len(inputs) or count not in (None, len(names)):
        raise ConfigError(
            f"The output names {list(names)} do not fit",
            where="output_names",
            expected=f"{'as many as the model has outputs' if count is None else count} different names, "
            f"none of them that of an input ({', '.join(inputs)})",
        )
    return list(names)


def _layers(model: nn.Module, plan: Plan) -> list[_Layer]:
    """Let the core quantize each layer, in execution order, and add those that are folded only.

    Raises:
        CalibrationError: Layers were neither calibrated nor trained.
    """
    structure: Structure = plan.model_layers.structure
    missing, result = [], []
    for name, layer_plan in plan.quantized.items():
        path = structure.paths[name]
        module = model.get_submodule(path)
        quantizer: Any = module.dopt_quantizer
        output: Any = module.dopt_output
        if not quantizer.is_ready() or not (output is None or output.is_ready()):
            missing.append(name)
            continue
        source = _float_layer(module, norm_of(module))
        source = replace(source, weight=_array(quantizer.smooth_weight(module.weight)))
        quantized = quantize_layer(
            source,
            layer_plan,
            None if quantizer.weight_only else _scale_of(quantizer),
            int(quantizer.input_zero_point),
            quantizer.weight_gain.detach().numpy(),
            None if output is None else _scale_of(output),
            0 if output is None else int(output.zero_point),
        )
        result.append(_Layer(path, module, source, quantized))
    if missing:
        raise never_calibrated(missing)
    done = {layer.path for layer in result}
    for path, norm_path in structure.norms.items():
        if path not in done:
            module = model.get_submodule(path)
            result.append(_Layer(path, module, _float_layer(module, model.get_submodule(norm_path)), None))
    return result


def _scale_of(quantizer: ActivationQuantizer) -> np.float32:
    return np.float32(learned_scale(quantizer.scale.numpy(), quantizer.gain.detach().numpy()))


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


def _array(tensor: Tensor) -> NDArray[np.floating]:
    array: NDArray[np.floating] = tensor.detach().cpu().double().numpy()
    return array if tensor.dtype == torch.float64 else array.astype(np.float32)


def _float_inputs(model: nn.Module, plan: Plan) -> tuple[Tensor, ...]:
    """Return example inputs for the model once it is float32: its own floating type goes with it."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return tuple(t.float() if t.dtype == own else t for t in example_inputs(model, plan.inputs))


def _substitute(model: nn.Module, layers: list[_Layer], plan: Plan, inputs: tuple[Tensor, ...]) -> None:
    """Let the layers compute with folded weights, on their grid, and take out the batch normalizations.

    The weights stand beside the layers' own parameters, which other parts of the model may use.

    Raises:
        ModelError: Folding changes what the model computes.
    """
    structure: Structure = plan.model_layers.structure
    for layer in layers:
        if layer.quantized is not None:
            layer.module.__class__ = original_class(layer.module)
    wanted = _run(model, inputs) if structure.norms else []
    for index, layer in enumerate(layers):
        weight, bias = fold(layer.source)
        layer.module.__dict__["dopt_index"] = index
        layer.module.register_parameter("dopt_smoothing", _smoothing(layer.module))
        layer.module.register_parameter("dopt_weight", _fixed(weight))
        layer.module.register_parameter("dopt_bias", None if bias is None else _fixed(bias))
        layer.module.__class__ = _substitute_class(type(layer.module))
    norms = {model.get_submodule(path) for path in structure.norms.values()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in norms:
                parent._modules[name] = nn.Identity()
    if structure.norms:
        _compare(wanted, _run(model, inputs))
    for layer in layers:
        if layer.quantized is not None:
            layer.module.dopt_weight = _fixed(layer.quantized.weight)


def _spell_out_padding(model: nn.Module) -> None:
    """Give the paddings ``"same"`` and ``"valid"`` as numbers: torch 1.11 cannot export the words."""
    for layer in model.modules():
        if kind_of(layer) is None or not isinstance(getattr(layer, "padding", None), str):
            continue
        pads: Any = layer._reversed_padding_repeated_twice  # before and after, the last dimension first
        before, after = tuple(pads[0::2][::-1]), tuple(pads[1::2][::-1])
        if before == after:
            layer.padding = before  # type: ignore[assignment]  # a convolution's, which mypy does not know
        elif layer.padding_mode == "zeros":
            layer.padding_mode = "constant"  # type: ignore[assignment]  # likewise: then its forward pads first


def _smoothing(layer: nn.Module) -> nn.Parameter | None:
    """Return the layer's smoothing factors so that they multiply a batch of inputs, or ``None``."""
    kind, quantizer = kind_of(layer), getattr(layer, "dopt_quantizer", None)
    if kind is None or quantizer is None or not quantizer.smoothing.dim():
        return None
    shape = (-1, *(1,) * (kind.input_dims - 2)) if kind.input_dims else (-1,)
    return nn.Parameter(quantizer.smoothing.view(shape), requires_grad=False)


def _fixed(values: NDArray[np.float32]) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(values), requires_grad=False)


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return [t.double() for t in tensors_of(model(*inputs)) if t.is_floating_point()]


def _compare(wanted: list[Tensor], found: list[Tensor]) -> None:
    """Check that folding is right for this model: what a run does not show, such as a second use, shows here."""
    for one, other in zip(wanted, found, strict=True):
        greatest = float(one.abs().max()) if one.numel() else 0.0
        change = float((one - other).abs().max()) if one.numel() else 0.0
        if change > 0.01 * greatest + 1e-6:
            raise ModelError(
                f"Folding batch normalization changes what the model computes, by {change:.3g} where the output's "
                f"greatest magnitude is {greatest:.3g}",
                expected="layers whose output goes to their batch normalization alone",
                fix="Look for code that uses a layer's output or weight beside its batch normalization in a way that "
                "cannot be seen from Python (scripted functions), or that makes the model random in evaluation mode.",
            )


def _to_onnx(
    model: nn.Module, plan: Plan, inputs: tuple[Tensor, ...], output_names: list[str] | None, dynamic_batch: bool
) -> onnx.ModelProto:
    """Run torch's TorchScript exporter on the model, whose replaced weights are marked."""
    input_names = [spec.name for spec in plan.inputs]
    options: dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    if dynamic_batch:
        options["dynamic_axes"] = {name: {0: "batch"} for name in [*input_names, *(output_names or [])]}
    written = io.BytesIO()
    try:
        with evaluating(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's remarks on its own deprecation and on tracing
            torch.onnx.export(
                model,
                inputs,
                written,  # type: ignore[arg-type]  # the TorchScript exporter writes to buffers too
                opset_version=OPSET,
                input_names=input_names,
                output_names=output_names,
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


def _substitute_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weight, bias = self._parameters["dopt_weight"], self._parameters["dopt_bias"]
        smoothing = self._parameters["dopt_smoothing"]
        if smoothing is not None:
            args, kwargs = with_input(original, args, kwargs, lambda x: x * smoothing)
        tensors = {"weight": _Mark.apply(weight, self.__dict__["dopt_index"])}
        if bias is not None:
            tensors["bias"] = bias
        with shadowed(self, **tensors):
            return original.forward(self, *args, **kwargs)

    return type(original.__name__, (original,), {"forward": forward})
