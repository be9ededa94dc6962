"""The deployable files: a frozen float graph, folded, with its weights on their grid; and the parameter file."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_from_session_graph

from dopt_api.errors import ConfigError, ModelError, closest, never_calibrated
from dopt_api.files import staged
from dopt_api.params import (
    FloatLayer,
    LayerParams,
    QuantizedLayer,
    QuantParams,
    fold,
    layer_params,
    quantize_layer,
    render_params,
)
from dopt_api.quantizer import BatchNorm, Statistics, activation_parameters, learned_scale
from dopt_api.types import ExportResult, LayerPlan, Plan
from dopt_tf.checkpoint import Checkpoint
from dopt_tf.find_layers import Layer, Structure, graph_of, output_readers
from dopt_tf.inference_graph import InferenceGraph, NodeDef, split
from dopt_tf.quantizer import SCOPE, channelwise

__all__ = ["OUTPUT", "export"]

OUTPUT = "_dopt_output"
"""The attribute of a node that is an output of the frozen graph although other nodes take from it.

TensorFlow ignores attributes that begin with an underscore. What no node takes is an output anyway.
"""


def export(
    sess: Any,
    plan: Plan,
    checkpoint: Path,
    output_dir: Path,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
) -> ExportResult:
    """Write ``model.pb`` and ``quant_params.json``, both or neither.

    Args:
        sess: The session of the float graph, built anew; neither the graph nor its variables are touched.
        plan: The checked strategy file.
        checkpoint: What ``tf.compat.v1.train.Saver`` wrote from the quantized session.
        output_dir: An existing folder.
        output_names: Names of the output nodes.
        dynamic_batch: Not supported: a graph's placeholders say which sizes are open.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable, or does not fit.
        CalibrationError: A quantized layer was neither calibrated nor trained.
        ConfigError: The graph has no such output.
        ModelError: The graph cannot be frozen.
        OutputError: The folder does not exist or cannot be written.
    """
    if dynamic_batch:
        raise ConfigError(
            "dynamic_batch is not for TensorFlow graphs",
            where="dynamic_batch",
            expected="placeholders whose batch size is None, which stay so",
            fix="Build the graph with tf.compat.v1.placeholder(tf.float32, [None, ...]).",
        )
    graph, structure = graph_of(sess), plan.model_layers.structure
    inference: InferenceGraph = structure.graph
    outputs = _outputs(inference, output_names)
    with staged(output_dir) as aside:
        state = Checkpoint(checkpoint)
        state.check_layers(plan.quantized)
        inference.keep(outputs)
        with _loaded(graph, inference, state) as loaded:
            layers = _layers(loaded, structure, plan, state, outputs)
            params = [entry for layer in layers if (entry := _settle(inference, layer)) is not None]
            inference.keep(outputs)
            frozen = _freeze(loaded, inference, outputs)
        _mark_outputs(frozen, outputs)
        (aside / "model.pb").write_bytes(frozen.SerializeToString(deterministic=True))
        text = render_params(QuantParams("model.pb", tuple(params)))
        (aside / "quant_params.json").write_text(text, encoding="utf-8", newline="\n")
    return ExportResult(output_dir / "model.pb", output_dir / "quant_params.json")


@dataclass(eq=False)
class _Deployed:
    """A layer whose weight the export replaces: because it is quantized, or folded, or both."""

    place: Layer
    source: FloatLayer
    shape: tuple[int, ...]
    quantized: QuantizedLayer | None
    output: str

    @property
    def weight(self) -> NDArray[np.float32]:
        return fold(self.source)[0] if self.quantized is None else self.quantized.weight

    @property
    def bias(self) -> NDArray[np.float32] | None:
        return fold(self.source)[1] if self.quantized is None else self.quantized.bias


def _outputs(inference: InferenceGraph, names: Sequence[str] | None) -> list[str]:
    """Return the names of the output nodes.

    Raises:
        ConfigError: There are none, or the graph has no such node in inference.
    """
    if names is None or isinstance(names, str) or not list(names):
        found = [node.name for node in inference.nodes.values() if not inference.users(node.name) and node.input]
        raise ConfigError(
            f"The output names are {names!r}",
            where="output_name_list",
            expected="a list of the names of the output nodes, such as ['logits']",
            fix=f"Nodes that nothing takes anything from: {', '.join(map(repr, found[-5:]))}." if found else "",
        )
    outputs = []
    for name in names:
        node, index = split(str(name))
        if node not in inference.nodes or index > 0:
            raise ConfigError(
                f"The graph has no output {name!r}" + (" in inference" if index <= 0 else ""),
                where="output_name_list",
                expected="the name of a node of the graph, whose first output is taken",
                fix=closest(node, inference.nodes),
            )
        outputs.append(node)
    if len(set(outputs)) != len(outputs):
        raise ConfigError(f"The output names {list(names)} repeat a node", where="output_name_list")
    return outputs


@contextmanager
def _loaded(graph: tf.Graph, inference: InferenceGraph, state: Checkpoint) -> Iterator[Any]:
    """Open a session of the graph in inference, with the variables of the checkpoint.

    Raises:
        CheckpointError: A variable is not in the checkpoint, or has another shape.
        ModelError: The graph in inference cannot be built.
    """
    with graph.as_default():
        known = {variable.op.name: variable for variable in tf.compat.v1.global_variables()}
    aside = tf.Graph()
    with aside.as_default(), tf.device("cpu"):
        try:
            tf.import_graph_def(inference.graph_def(), name="")
        except ValueError as error:
            raise ModelError(
                f"The graph cannot be built for inference: {error}",
                expected="conditionals and loops that do not depend on training",
                fix="Build the graph for inference (training=False) for the export.",
            ) from error
        session = tf.compat.v1.Session(graph=aside, config=tf.compat.v1.ConfigProto(allow_soft_placement=True))
        with session:
            for node in inference.nodes.values():
                if node.op in ("VarHandleOp", "VariableV2", "Variable"):
                    value = state.value_of(known[node.name]) if node.name in known else state.get(node.name)
                    _assign(session, aside.get_operation_by_name(node.name).outputs[0], node, value, inference.nodes)
            yield session


def _assign(
    session: Any, variable: tf.Tensor, node: NodeDef, value: NDArray[np.generic], known: Container[str]
) -> None:
    if node.op != "VarHandleOp":
        given = tf.compat.v1.placeholder(variable.dtype.base_dtype, value.shape)
        session.run(tf.raw_ops.Assign(ref=variable, value=given, validate_shape=False).op, {given: value})
    else:
        given = tf.compat.v1.placeholder(tf.as_dtype(node.attr["dtype"].type), value.shape)
        session.run(tf.raw_ops.AssignVariableOp(resource=variable, value=given), {given: value})
        read = f"{node.name}/Read/ReadVariableOp"  # by which the freezing knows a variable's value
        if read not in known:
            tf.raw_ops.ReadVariableOp(resource=variable, dtype=given.dtype, name=read)


def _layers(session: Any, structure: Structure, plan: Plan, state: Checkpoint, outputs: list[str]) -> list[_Deployed]:
    """Let the core quantize each layer, in the order of the graph, and add those that are folded only.

    Raises:
        CalibrationError: Layers were neither calibrated nor trained.
    """
    missing, result = [], []
    for name, found in structure.layers.items():
        layer_plan = plan.quantized.get(name)
        place = found.without(outputs)
        if name not in structure.graph.nodes or (layer_plan is None and place.norm is None):
            continue
        source, shape = _float_layer(session, place)
        if layer_plan is None:
            result.append(_Deployed(place, source, shape, None, ""))
            continue
        parameters = _parameters(state, layer_plan, "input")
        output = _parameters(state, layer_plan, "output") if layer_plan.output else (None, 0)
        if parameters is None or output is None:
            missing.append(name)
            continue
        gain = state.get(f"{SCOPE}/{name}/weight_gain")
        quantized = quantize_layer(source, layer_plan, *parameters, gain, *output)
        result.append(_Deployed(place, source, shape, quantized, _output_edge(structure, found)))
    if missing:
        raise never_calibrated(missing)
    return result


def _output_edge(structure: Structure, layer: Layer) -> str:
    """Return the edge after which a layer's output is quantized, if it is."""
    readers, rectifier = output_readers(structure.graph, layer)
    return f"{layer.last if rectifier is None else readers[0][0].name}:0"


def _parameters(state: Checkpoint, plan: LayerPlan, role: str) -> tuple[np.float32 | None, int] | None:
    """Return scale and zero point of an input or output; a pending calibration is concluded. ``None`` without either.

    An output that the checkpoint does not have was not recorded.
    """
    if plan.strategy.activation is None:
        return None, 0
    prefix = f"{SCOPE}/{plan.name}" + ("" if role == "input" else "/dopt_output")
    if role == "output" and f"{prefix}/ready" not in state:
        return None
    if int(state.get(f"{prefix}/ready")):
        scale = learned_scale(state.get(f"{prefix}/{role}_scale"), state.get(f"{prefix}/{role}_gain"))
        return np.float32(scale), int(state.get(f"{prefix}/{role}_zero_point"))
    parts = {name: state.get(f"{prefix}/statistics/{name}") for name in Statistics().arrays()}
    statistics = Statistics.from_arrays(parts)
    if not int(statistics.samples) + int(statistics.non_finite):
        return None
    return activation_parameters(statistics, plan.input_grid, layer=plan.name, method=plan.range_method, role=role)


def _float_layer(session: Any, layer: Layer) -> tuple[FloatLayer, tuple[int, ...]]:
    """Return the arrays of a layer and of the batch normalization after it, if any; and the weight's own shape."""
    norm = layer.norm
    names = {"weight": layer.weight, "bias": layer.bias}
    if norm is not None:
        names |= {"gamma": norm.gamma, "beta": norm.beta, "mean": norm.mean, "variance": norm.variance}
    tensors = {
        key: session.graph.get_tensor_by_name("{}:{}".format(*split(name))) for key, name in names.items() if name
    }
    arrays = {key: np.asarray(value) for key, value in session.run(tensors).items()}
    flat: dict[str, Any] = {key: value.reshape(-1) for key, value in arrays.items()}
    normalization = None
    if norm is not None:
        normalization = BatchNorm(flat.get("gamma"), flat.get("beta"), flat["mean"], flat["variance"], norm.epsilon)
    weight = arrays["weight"]
    source = FloatLayer(channelwise(weight, layer.layout), flat.get("bias"), normalization, layer.layout.weight_axis)
    return source, weight.shape


def _settle(inference: InferenceGraph, layer: _Deployed) -> LayerParams | None:
    """Put a layer's new weight and bias into the graph; return the entry of a quantized one."""
    place, layout = layer.place, layer.place.layout
    node = inference.copy(place.name)
    dtype = node.attr["T"].type
    given = layer.weight if not layout.merged or layer.shape[-1] > 1 else layer.weight.reshape(layer.shape)
    weight = inference.add_constant(f"{place.name}/weight", given)
    shaped = weight if given.shape == layer.shape else inference.add_reshape(f"{weight}/shaped", weight, layer.shape)
    node.input[layout.weight] = inference.add_cast(f"{shaped}/cast", shaped, dtype)
    bias = None
    if layer.bias is not None and place.last != place.name:
        bias = inference.add_constant(f"{place.name}/bias", layer.bias)
        added = NodeDef(name=place.last, op="BiasAdd")
        added.input.extend([place.name, inference.add_cast(f"{bias}/cast", bias, dtype)])
        added.attr["T"].type = dtype
        added.attr["data_format"].s = b"NHWC" if layout.output_axis == -1 else b"NCHW"
        inference.nodes[place.last] = added
    if layer.quantized is None:
        return None
    edge = "{}:{}".format(*split(node.input[layout.input]))
    return layer_params(
        layer.quantized,
        calls=[(place.name, edge)],
        weight_tensor=f"{weight}:0",
        weight_axis=layout.weight_axis,
        bias_tensor=None if bias is None else f"{bias}:0",
        outputs=[layer.output],
    )


def _freeze(session: Any, inference: InferenceGraph, outputs: list[str]) -> tf.compat.v1.GraphDef:
    """Return the graph with its variables as constants.

    Raises:
        ModelError: A variable is used in a way that cannot be frozen.
    """
    try:
        frozen = convert_variables_to_constants_from_session_graph(session, inference.graph_def(), outputs)
    except (ValueError, KeyError, tf.errors.OpError) as error:
        raise ModelError(
            f"The graph cannot be frozen: {' '.join(str(error).split())[:400]}",
            expected="variables that are read by operations of the graph",
            fix="Try tf.compat.v1.graph_util.convert_variables_to_constants on the float graph alone to see the cause.",
        ) from error
    left = [node.name for node in frozen.node if node.op in ("VarHandleOp", "VariableV2", "Variable")]
    if left:
        raise ModelError(f"The variable {left[0]!r} cannot be frozen", expected="variables that the graph reads")
    return frozen


def _mark_outputs(frozen: tf.compat.v1.GraphDef, outputs: Sequence[str]) -> None:
    """Mark the outputs that other nodes take from, which a frozen graph does not tell from inner nodes."""
    used = {split(name)[0] for node in frozen.node for name in node.input}
    for node in frozen.node:
        if node.name in used and node.name in outputs:
            node.attr[OUTPUT].b = True
