"""Small networks in ONNX with their parameter files, as an export writes them, and what they compute."""

import json

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from dopt_api.params import (
    BiasParams,
    FloatLayer,
    LayerParams,
    QuantParams,
    TensorParams,
    layer_params,
    quantize_layer,
    render_params,
)
from dopt_api.quantizer import dequantize
from dopt_api.strategy import get_strategy
from dopt_api.types import LayerPlan

CONV = "Conv"


def entry(number, scale, zero_point, weight_scale, bias_scale, strategy="Quant_INT8-8", others=()):
    grids = get_strategy(strategy)
    return LayerParams(
        name=f"layer{number}",
        node=f"conv{number}",
        op_type=CONV,
        strategy=strategy,
        input=TensorParams(f"x{number}", grids.activation.dtype, grids.activation.bits, (scale,), (zero_point,), None),
        weight=TensorParams(
            f"w{number}", grids.weight.dtype, grids.weight.bits, tuple(weight_scale), (0,) * len(weight_scale), 0
        ),
        bias=None if bias_scale is None else BiasParams(f"b{number}", "int32", tuple(bias_scale)),
        other_calls=tuple(others),
    )


def network(folder, strategies=("Quant_INT8-8", "Quant_INT8-8"), seed=0, bias=True):
    """Write a chain of convolutions with weights on their grids, and return it: integers, scales and biases."""
    generator = np.random.default_rng(seed)
    nodes, tensors, layers, facts = [], [], [], []
    for number, strategy in enumerate(strategies):
        grids = get_strategy(strategy)
        integers = generator.integers(grids.weight.qmin, grids.weight.qmax + 1, (4, 3 if not number else 4, 3, 3))
        steps = generator.uniform(0.001, 0.01, 4).astype(np.float32)
        scale, zero_point = np.float32(generator.uniform(0.01, 0.05)), int(generator.integers(0, grids.activation.qmax))
        bias_steps = steps * scale
        biases = (generator.integers(-1000, 1000, 4) * bias_steps).astype(np.float32) if bias else None
        weight = dequantize(integers, steps, np.zeros(4, np.int32), axis=0)
        tensors += [numpy_helper.from_array(weight, f"w{number}")]
        tensors += [numpy_helper.from_array(biases, f"b{number}")] if bias else []
        given = [f"x{number}", f"w{number}", *([f"b{number}"] if bias else [])]
        nodes.append(helper.make_node("Conv", given, [f"x{number + 1}"], name=f"conv{number}", pads=[1, 1, 1, 1]))
        wide = [float(step) for step in bias_steps] if bias else None
        layers.append(entry(number, float(scale), zero_point, [float(step) for step in steps], wide, strategy))
        facts.append((weight, biases, scale, zero_point, grids.activation))
    ends = [("x0", 3), (f"x{len(strategies)}", 4)]
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, c, None, None]) for name, c in ends]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, str(folder / "model.onnx"))
    (folder / "quant_params.json").write_text(render_params(QuantParams("model.onnx", tuple(layers))))
    return facts


def linear(folder, strategy, transposed, seed=0):
    """Write a linear layer of 64 inputs by a strategy of weights alone, and return its weight on the grid and bias."""
    generator = np.random.default_rng(seed)
    plan = LayerPlan("fc", "Linear", get_strategy(strategy))
    weight, bias = generator.standard_normal((6, 64)), generator.standard_normal(6)
    layer = quantize_layer(FloatLayer(weight, bias, None, 0), plan, None)
    entry = layer_params(
        layer, calls=[("fc", "x")], weight_tensor="w", weight_axis=int(not transposed), bias_tensor="b"
    )
    stored = layer.weight if transposed else layer.weight.T
    tensors = [numpy_helper.from_array(np.ascontiguousarray(stored), "w"), numpy_helper.from_array(layer.bias, "b")]
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="fc", transB=int(transposed))
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, n]) for name, n in (("x", 64), ("y", 6))]
    graph = helper.make_graph([node], "g", shapes[:1], shapes[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, str(folder / "model.onnx"))
    (folder / "quant_params.json").write_text(render_params(QuantParams("model.onnx", (entry,))))
    return layer


def convolve(x, weight, bias):
    """Float64 convolution, exact for what is on grids of so few steps."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    y = np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.float64))
    return y if bias is None else y + bias[:, None, None]


def edit(folder, change):
    file = folder / "quant_params.json"
    content = json.loads(file.read_text())
    change(content["layers"][0])
    file.write_text(json.dumps(content))


def run(file, x, optimized=False):
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # or weights alone are not alone
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]
