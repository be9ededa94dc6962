"""The backend as the conformance suite sees it: ``pytest --pyargs dopt_conformance --dopt-backend numpy``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

import dopt_api
from dopt_api.params import FloatLayer
from dopt_api.quantizer import (
    Grid,
    Statistics,
    fake_quantize,
    fake_quantize_gradients,
    gain_gradient,
    learned_scale,
)
from dopt_api.strategy import Strategy
from dopt_api.types import LayerPlan
from dopt_conformance import Batch, Harness, WrittenGraph
from dopt_conformance.way import BATCH
from dopt_numpy.checkpoint import load_checkpoint, load_into, save_checkpoint
from dopt_numpy.network import (
    SGD,
    Array,
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    MaxPool2D,
    Network,
    Pullback,
    ReLU,
    Residual,
    Scale,
    Weighted,
)
from dopt_numpy.quantized_layer import QuantizedLayer, QuantizedNetwork, folding_of
from dopt_numpy.quantizer import LayerQuantizer

__all__ = ["NumpyHarness"]

Float32 = NDArray[np.float32]

GRIDS = Strategy("", Grid(8), Grid(8, signed=True, symmetric=True, narrow=True, per_channel=True))


def _convolutions() -> Network:
    """Return convolutions with batch normalization, one of them depthwise, and a linear layer."""
    return Network(
        {
            "conv1": Conv2D(3, 8, 3, padding=1, bias=False),
            "bn1": BatchNorm(8),
            "relu1": ReLU(),
            "conv2": Conv2D(8, 8, 3, stride=2, groups=8),
            "bn2": BatchNorm(8),
            "relu2": ReLU(),
            "pool": MaxPool2D(2),
            "flatten": Flatten(),
            "fc": Dense(8, 5),
        }
    )


def _dense() -> Network:
    """Return three linear layers, the last without a bias."""
    layers = {"a": Dense(10, 16), "relu1": ReLU(), "b": Dense(16, 12), "relu2": ReLU(), "c": Dense(12, 5, bias=False)}
    return Network(layers)


def _residual() -> Network:
    """Return a block with a layer that stays float, and a batch normalization that cannot be folded."""
    return Network(
        {
            "stem": Conv2D(3, 6, 1),
            "block": Residual({"conv": Conv2D(6, 6, 3, padding=1), "relu": ReLU(), "scale": Scale(6)}),
            "after": BatchNorm(6),
            "head": Conv2D(6, 4, 3, bias=False),
            "average": GlobalAveragePool(),
        }
    )


MODELS: dict[str, Callable[[], Network]] = {"convolutions": _convolutions, "dense": _dense, "residual": _residual}

SHAPES = {"convolutions": (3, 6, 6), "dense": (10,), "residual": (3, 6, 6)}
"""Of one sample."""

LAYERS: dict[str, dict[str, str | None]] = {
    "convolutions": {"conv1/Conv2D": "bn1", "conv2/Conv2D": "bn2", "fc/Dense": None},
    "dense": {"a/Dense": None, "b/Dense": None, "c/Dense": None},
    "residual": {"stem/Conv2D": None, "block.conv/Conv2D": None, "head/Conv2D": None},
}
"""The layers that can be quantized, each with the path of the batch normalization that is folded into it."""


class NumpyHarness(Harness):
    """Small networks, and files that ONNX Runtime runs."""

    backend = "numpy"

    # ---- models

    def models(self) -> tuple[str, ...]:
        """Return the names."""
        return tuple(MODELS)

    def build(self, name: str) -> Network:
        """Return a network with weights like those of a trained one."""
        network = MODELS[name]()
        rng = np.random.default_rng(7)
        state = network.state()
        for key, array in state.items():
            if key.endswith(("variance", "gamma", "factor")):
                array[...] = rng.uniform(0.5, 2.0, array.shape)
            else:
                spread = np.sqrt(2 / array[0].size) if array.ndim > 1 else 0.3
                array[...] = rng.normal(0, spread, array.shape)
        network.load_state(state)
        return network

    def input_shape(self, name: str) -> str:
        """Return the shape of the suite's batches."""
        return "x:" + ",".join(map(str, (BATCH, *SHAPES[name])))

    def batch(self, name: str, size: int, seed: int) -> Batch:
        """Return normally distributed samples."""
        return {"x": np.random.default_rng(seed).normal(0, 1, (size, *SHAPES[name])).astype(np.float32)}

    def not_quantizable(self, name: str) -> tuple[str, ...]:
        """Return the one layer that multiplies and stays float."""
        return ("block.scale/Scale",) if name == "residual" else ()

    def float_layers(self, name: str) -> Mapping[str, FloatLayer]:
        """Return the arrays of the layers."""
        inside = dict(self.build(name).named_layers())
        return {
            layer: _float_layer(inside[_path(layer)], inside.get(norm or "")) for layer, norm in LAYERS[name].items()
        }

    def activations(self, name: str, batch: Batch) -> Mapping[str, Float32]:
        """Return what the layers are called with."""
        network, seen = self.build(name), dict[str, Float32]()
        inside = dict(network.named_layers())
        for layer in LAYERS[name]:
            _watch(inside[_path(layer)], layer, seen)
        network(batch["x"])
        return seen

    # ---- going the way

    def run(self, model: Network, batch: Batch, *, quantized: bool = True, training: bool = False) -> list[Float32]:
        """Run a network."""
        return [model.forward(batch["x"], training)[0]]

    def weights(self, model: Network) -> Mapping[str, NDArray[Any]]:
        """Return the state without that of the quantizers."""
        return {key: array for key, array in model.state().items() if ".dopt_quantizer." not in key}

    def save(self, model: Network, folder: Path) -> Path:
        """Save the state."""
        return save_checkpoint(model, folder / "model.npz")

    def load(self, model: Network, checkpoint: Path) -> None:
        """Load the state of a network of the same kind."""
        state = load_checkpoint(checkpoint)
        if isinstance(model, QuantizedNetwork):
            load_into(model, state, checkpoint)
        else:
            model.load_state(state)

    def load_float(self, model: Network, checkpoint: Path) -> None:
        """Load the state of a float network into a quantized one."""
        model.load_state(load_checkpoint(checkpoint))

    # ---- what was exported

    def run_file(self, file: Path, batch: Batch, output_names: Sequence[str] | None) -> list[Float32]:
        """Run a graph as it stands, without optimizations."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        outputs: list[Float32] = session.run(output_names, dict(batch))
        return outputs

    def read_file(self, file: Path) -> WrittenGraph:
        """Return the names and the initializers."""
        graph = onnx.load(str(file)).graph
        return WrittenGraph(
            nodes=frozenset(node.name for node in graph.node),
            edges=frozenset(
                [value.name for value in graph.input] + [edge for node in graph.node for edge in node.output]
            ),
            constants={tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer},
        )

    # ---- kernels: the backend calls those of the core

    def fake_quantize(
        self, x: Float32, scale: Float32, zero_point: NDArray[np.int32], grid: Grid, axis: int | None
    ) -> Float32:
        """Return the core's."""
        return fake_quantize(x, scale, zero_point, grid, axis=axis)

    def fake_quantize_gradients(
        self,
        upstream: Float32,
        x: Float32,
        scale: Float32,
        zero_point: NDArray[np.int32],
        grid: Grid,
        axis: int | None,
    ) -> tuple[Float32, NDArray[np.floating[Any]]]:
        """Return the core's."""
        return fake_quantize_gradients(upstream, x, scale, zero_point, grid, axis=axis)

    def learned_scale(self, scale: Float32, gain: Float32) -> Float32:
        """Return the core's."""
        return learned_scale(scale, gain)

    def gain_gradient(self, upstream: Float32, scale: Float32, gain: Float32) -> Float32:
        """Return the core's."""
        return gain_gradient(upstream, scale, gain).astype(np.float32)

    def weight_scale(self, weight: Float32, grid: Grid, axis: int) -> Float32:
        """Return the scales of a layer with this weight."""
        plan = LayerPlan("layer", "Dense", Strategy("", GRIDS.activation, grid))
        channels_first = np.moveaxis(weight, axis, 0)
        return LayerQuantizer(plan, channels_first).fold(channels_first, None).base

    def collect(self, batches: Sequence[Float32], channel_axis: int) -> Statistics:
        """Calibrate a layer that takes any shape."""
        quantizer = LayerQuantizer(LayerPlan("layer", "Dense", GRIDS), np.zeros((1, 1), np.float32))
        layer = QuantizedLayer(_Passing(np.zeros((1, 1), np.float32), bias=False), None, quantizer)
        quantizer.start_calibration()
        for batch in batches:
            layer(np.moveaxis(batch, channel_axis, 1))  # networks of this framework are channels first
        return quantizer.statistics

    # ---- capabilities

    def train_step(self, model: Network, batch: Batch, *, quant_loss: bool = False) -> float:
        """Descend the squared distance of the output from 1, or the quantization loss."""
        y, pullback = model.forward(batch["x"], training=True)
        value, gradient = float(np.square(y - 1).mean()), 2 * (y - 1) / y.size
        if quant_loss:
            loss = dopt_api.get_quant_loss(model, backend=self.backend)
            loss.backward()
            value, gradient = float(loss), np.zeros_like(y)
        pullback(gradient)
        SGD(model.parameters(), 0.01, momentum=0.0).step()
        return value

    def quant_loss(self, model: Network, batch: Batch) -> float:
        """Return the loss after a pass."""
        model(batch["x"])
        return float(dopt_api.get_quant_loss(model, backend=self.backend))


class _Passing(Weighted):
    """A layer that returns what it takes."""

    def multiply(self, x: Array, weight: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        return x, lambda dy: (dy, np.zeros_like(weight))


def _path(layer: str) -> str:
    return layer.partition("/")[0]


def _float_layer(layer: Layer, norm: Layer | None) -> FloatLayer:
    if not isinstance(layer, Weighted):
        raise TypeError(f"{type(layer).__name__} has no weight")
    bias = None if layer.bias is None else layer.bias.value
    return FloatLayer(layer.weight.value, bias, folding_of(norm) if isinstance(norm, BatchNorm) else None, 0)


def _watch(layer: Layer, name: str, seen: dict[str, Float32]) -> None:
    """Keep what a layer is called with."""
    forward = layer.forward

    def watched(x: Array, training: bool = False) -> tuple[Array, Pullback]:
        seen[name] = x
        return forward(x, training)

    vars(layer)["forward"] = watched
