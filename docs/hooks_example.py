"""The backend that the page about the hooks is made of: of a toy framework whose models are chains of matrices."""

import json

import numpy as np

from dopt_api.errors import CalibrationError, CheckpointError, ModelError
from dopt_api.files import staged
from dopt_api.hookspec import hookimpl
from dopt_api.params import FloatLayer, QuantParams, layer_params, quantize_layer, render_params
from dopt_api.quantizer import (
    Statistics,
    activation_parameters,
    channel_maximum,
    fake_quantize,
    relative_squared_error,
    scale_zero_point,
)
from dopt_api.types import BackendInfo, Capabilities, ExportResult, LayerInfo, ModelLayers


class Network:
    """The float model: ``x [N, in]`` times one matrix ``[out, in]`` after the other."""

    def __init__(self, weights):
        self.weights = {name: np.asarray(weight, np.float32) for name, weight in weights.items()}

    def __call__(self, x):
        for weight in self.weights.values():
            x = x @ weight.T
        return x


class QuantizedNetwork(Network):
    """The same with fake quantization in the layers of a plan."""

    def __init__(self, network, plan):
        super().__init__(network.weights)
        self.plan, self.statistics, self.inputs = plan, None, {}

    def __call__(self, x):
        for name, weight in self.weights.items():
            layer = self.plan.quantized.get(name)
            if layer is not None and self.statistics is not None:  # calibration: in float
                self.statistics[name].update(x)
            elif layer is not None:
                x = fake_quantize(x, *self.inputs[name], layer.strategy.activation)
                weight = fake_quantize(weight, *weight_scale(weight, layer), layer.strategy.weight, axis=0)
            x = x @ weight.T
        return x


def weight_scale(weight, layer):
    extreme = channel_maximum(weight, axis=0)
    return scale_zero_point(-extreme, extreme, layer.strategy.weight)


@hookimpl
def dopt_describe_backend():
    return BackendInfo(
        name="mine",
        framework="numpy",
        framework_version=np.__version__,
        version="0.1.0",
        model_types=("mine.Network", "mine.QuantizedNetwork"),
        hook_api_version="1.1",
        capabilities=Capabilities(quant_loss=True),
    )


@hookimpl
def dopt_find_layers(model):
    if isinstance(model, QuantizedNetwork):
        raise ModelError("The model is already quantized", fix="Pass the float model.")
    return ModelLayers(tuple(LayerInfo(name, "Matrix") for name in model.weights))


@hookimpl
def dopt_optimize(model, plan):
    return QuantizedNetwork(model, plan)


@hookimpl
def dopt_set_calibrate_state(model, calibration_mode):
    if calibration_mode and model.statistics is None:
        model.statistics = {name: Statistics() for name in model.plan.quantized}
    elif not calibration_mode and model.statistics is not None:
        model.inputs = {
            name: activation_parameters(
                model.statistics[name], layer.strategy.activation, layer=name, method=layer.range_method
            )
            for name, layer in model.plan.quantized.items()
        }
        model.statistics = None


@hookimpl
def dopt_get_quant_loss(model):
    errors = [
        relative_squared_error(
            model.weights[name], *weight_scale(model.weights[name], layer), layer.strategy.weight, axis=0
        )
        for name, layer in model.plan.quantized.items()
    ]
    return sum(errors) / max(len(errors), 1)


@hookimpl
def dopt_export(model, plan, checkpoint, output_dir):
    try:
        inputs = json.loads(checkpoint.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The checkpoint cannot be read: {error}", where=str(checkpoint)) from error
    weights, entries = dict(model.weights), []
    for name, layer in plan.quantized.items():
        if name not in inputs:
            raise CalibrationError(f"Layer {name!r} was not calibrated", fix="Calibrate, then save again.")
        scale, zero_point = inputs[name]
        done = quantize_layer(FloatLayer(weights[name], None, None, 0), layer, np.float32(scale), zero_point)
        weights[name] = done.weight
        entries.append(
            layer_params(done, calls=[(name, f"{name}.input")], weight_tensor=name, weight_axis=0, bias_tensor=None)
        )
    with staged(output_dir) as aside:
        graph = {name: weight.tolist() for name, weight in weights.items()}
        (aside / "model.json").write_text(json.dumps(graph), encoding="utf-8")
        params = render_params(QuantParams("model.json", tuple(entries)))
        (aside / "quant_params.json").write_text(params, encoding="utf-8", newline="\n")
    return ExportResult(output_dir / "model.json", output_dir / "quant_params.json")
