"""From a float graph to a quantized one, in place, and its calibration mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from dopt_api.errors import CalibrationError, ModelError, most_of
from dopt_api.types import LayerPlan, Plan
from dopt_tf.find_layers import Layer, Norm, Structure, graph_of, output_readers, quantization_of
from dopt_tf.inference_graph import in_gradients, is_training_node, source_of
from dopt_tf.quantizer import (
    SCOPE,
    ActivationQuantizer,
    LayerQuantizer,
    Mode,
    OutputQuantizer,
    Preparation,
    channelwise,
    classic_cond,
    replaced,
    restore_values,
)

__all__ = ["Quantization", "get_quant_loss", "optimize", "quantized", "raw_session", "set_calibrate_state", "start"]

_REWRITTEN_BY_GRADIENTS = ("If", "StatelessIf", "While", "StatelessWhile", "Case", "StatelessCase")


@dataclass(eq=False)
class _Site:
    """Where a layer was rewritten: its quantizer, and the tensors that came in before."""

    quantizer: LayerQuantizer
    active: tf.Tensor
    given: tf.Tensor
    weight: tf.Tensor
    factor: Callable[[], tf.Tensor | None]
    output: OutputQuantizer | None = None

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        """Those of the input and, where it is recorded, of the output."""
        return [self.quantizer, *([] if self.output is None else [self.output])]


@dataclass(eq=False)
class Quantization:
    """What is kept of a quantized graph.

    Attributes:
        mode: What a step is.
        calibrating: The variable that says whether calibration is on; it belongs to the session, not to checkpoints.
        sites: The quantized layers by name.
        structure: What is known of the float graph.
        initialized: Which of :attr:`variables` a session has initialised, booleans ``[V]``.
        loss: The quantization loss, once it was asked for.
    """

    mode: Mode
    calibrating: tf.Variable
    sites: dict[str, _Site]
    structure: Structure
    initialized: tf.Tensor | None = None
    loss: tf.Tensor | None = None

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of all quantizers, and the one that says whether calibration is on."""
        return [self.calibrating, *(v for site in self.sites.values() for q in site.quantizers for v in q.variables)]


def optimize(sess: Any, plan: Plan, is_train_flag: Any, quant_flag: Any) -> Any:
    """Rewrite the graph of a session in place, so that the layers of ``plan`` are quantized; return the session.

    Args:
        sess: The session that holds the float graph; it must not have run anything yet.
        plan: The checked strategy file.
        is_train_flag: Scalar boolean tensor, or a Python value: whether scales follow training.
        quant_flag: Scalar integer tensor, or a Python value: 0 for the float path, positive for the quantized one.

    Raises:
        ModelError: The graph is finalized, has gradients already, or has run; or a flag is no scalar of the graph.
    """
    graph = graph_of(sess)
    _refuse_finished(graph)
    structure: Structure = plan.model_layers.structure
    functions = any(op.type in _REWRITTEN_BY_GRADIENTS for op in graph.get_operations())
    with graph.as_default(), tf.control_dependencies(None), graph.name_scope(f"{SCOPE}/"):
        quantizing = _flag(graph, quant_flag, "quant_flag", tf.int32) > 0
        training = _flag(graph, is_train_flag, "is_train_flag", tf.bool)
        calibrating = tf.compat.v1.Variable(
            False,
            name="calibrating",
            trainable=False,
            use_resource=True,
            collections=[tf.compat.v1.GraphKeys.LOCAL_VARIABLES],
        )
        known = tf.raw_ops.VarIsInitializedOp(resource=calibrating.handle)  # a session may restore without it
        on = classic_cond(known, calibrating.read_value, lambda: tf.constant(False))
        quantization = Quantization(Mode(quantizing, on, training), calibrating, {}, structure)
        preparation = Preparation()
        for name, layer_plan in plan.quantized.items():
            op = graph.get_operation_by_name(name)
            layer = structure.layers[name]
            weight = op.inputs[layer.layout.weight]
            channels = channelwise(weight, layer.layout).shape[layer.layout.weight_axis]
            quantizer = LayerQuantizer(layer_plan, layer.layout, int(channels))
            site = _rewrite(graph, op, layer, quantizer, quantization.mode, preparation, structure)
            quantization.sites[name] = site
            if layer_plan.output:
                site.output = _rewrite_output(graph, op, layer, layer_plan, quantization.mode, preparation, structure)
        known_ones = [tf.raw_ops.VarIsInitializedOp(resource=variable.handle) for variable in quantization.variables]
        quantization.initialized = tf.stack(known_ones)
    graph.dopt_quantization = quantization
    if not functions:
        start(sess)
    return sess


def start(sess: Any) -> None:
    """Give the quantizers' variables their initial values in a session that has none for them yet.

    :func:`optimize` does this itself, except in graphs with conditionals or loops of functions: gradients that are
    built later rewrite those, which a session that has run anything does not notice. There it is done by the first
    call that runs the session anyway.

    Raises:
        ModelError: The session ran before the graph was rewritten.
    """
    quantization = quantization_of(graph_of(sess))
    if quantization is None:
        return
    raw = raw_session(sess)
    initialized = raw.run(quantization.initialized)
    pairs = zip(quantization.variables, initialized, strict=True)
    restore_values(raw, [(variable, None) for variable, known in pairs if not known])
    _check_effect(raw, graph_of(sess), quantization)


def set_calibrate_state(sess: Any, calibration_mode: bool) -> None:
    """Switch calibration on or off in a session.

    While it is on, steps with a positive ``quant_flag`` compute in float and collect statistics.
    Feed the graph's own training flag as for inference: batch normalization then behaves as deployed.

    Args:
        sess: The session whose graph was quantized.
        calibration_mode: On or off.

    Raises:
        ModelError: The graph is not a quantized one.
        CalibrationError: On switching off: layers saw no data, or NaN or infinity; the others are calibrated.
    """
    quantization = quantized(sess)
    start(sess)
    raw = raw_session(sess)
    known = raw.run(quantization.mode.calibrating)
    if calibration_mode == bool(known):
        return
    quantizers = [quantizer for site in quantization.sites.values() for quantizer in site.quantizers]
    if calibration_mode:
        forgotten = [pair for quantizer in quantizers for pair in quantizer.start_calibration()]
        restore_values(raw, [*forgotten, (quantization.calibrating, True)])
        return
    seen = raw.run([quantizer.statistics.parts for quantizer in quantizers])
    decided: list[tuple[tf.Variable, Any]] = [(quantization.calibrating, False)]
    failures: list[CalibrationError] = []
    for quantizer, statistics in zip(quantizers, seen, strict=True):
        try:
            decided += quantizer.conclude(statistics)
        except CalibrationError as error:  # noqa: PERF203  # each layer fails or not by itself
            failures.append(error)
    restore_values(raw, decided)
    if failures:
        raise most_of(failures)


def get_quant_loss(sess: Any) -> tf.Tensor:
    """Return the quantization loss, a differentiable float32 scalar of the graph; 0 on the float path.

    It is the mean over the quantized layers of the relative squared error of the weight plus, where ``is_train_flag``
    holds, that of the probed elements of the input; see :mod:`dopt_api.quantizer.training`.

    Args:
        sess: The session whose graph was quantized.

    Raises:
        ModelError: The graph is not a quantized one, or is finalized.
    """
    quantization = quantized(sess)
    if quantization.loss is None:
        graph = graph_of(sess)
        _refuse_final(graph)
        with graph.as_default(), tf.control_dependencies(None), graph.name_scope(f"{SCOPE}/loss/"):
            mode = quantization.mode
            errors = [
                classic_cond(site.active, _error_of(site, mode), lambda: tf.constant(0.0))
                for site in quantization.sites.values()
            ]
            quantization.loss = tf.add_n(errors) / len(errors) if errors else tf.constant(0.0)
    return quantization.loss


def raw_session(sess: Any) -> Any:
    """Return the plain session inside a monitored one."""
    return sess._tf_sess() if hasattr(sess, "_tf_sess") else sess


def _rewrite(
    graph: tf.Graph,
    op: tf.Operation,
    layer: Layer,
    quantizer: LayerQuantizer,
    mode: Mode,
    preparation: Preparation,
    structure: Structure,
) -> _Site:
    """Let one operation take a quantized input and weight, where a step says so."""
    given, weight = op.inputs[layer.layout.input], op.inputs[layer.layout.weight]
    given.set_shape([None] * weight.shape.rank)  # the kinds of layers take inputs of the weight's rank
    with graph.name_scope(f"{SCOPE}/{op.name}/"), graph.device(op.device):

        def factor() -> tf.Tensor | None:
            return _factor(graph, layer.norm, structure)

        active = quantizer.prepare(given, mode, preparation)
        x = given if quantizer.weight_only else replaced(given, active, lambda x: quantizer.quantize(x, mode))
        w = replaced(weight, active, lambda weight: quantizer.quantize_weight(weight, factor(), mode))
    x.set_shape(given.shape)
    w.set_shape(weight.shape)
    if x is not given:
        op._update_input(layer.layout.input, x)
    op._update_input(layer.layout.weight, w)
    return _Site(quantizer, active, given, weight, factor)


def _rewrite_output(
    graph: tf.Graph,
    op: tf.Operation,
    layer: Layer,
    plan: LayerPlan,
    mode: Mode,
    preparation: Preparation,
    structure: Structure,
) -> OutputQuantizer:
    """Let all that reads the output of a layer, behind its bias and normalization, read a quantized one.

    Raises:
        ModelError: Nothing reads it, or only what stands inside a branch or a function.
    """
    readers, rectifier = output_readers(structure.graph, layer)
    tensors = [tensor for node, index in readers if (tensor := _input_of(graph, node.name, index)) is not None]
    if not tensors:
        raise ModelError(
            f"The output of layer {plan.name!r} cannot be recorded: nothing in the graph reads it",
            where=f"operation {layer.last!r}",
            expected="an operation that takes the output, outside of branches and functions",
            fix="Let the graph end in tf.identity(output, name='...') and run that, or remove 'output' from the file.",
        )
    given = tensors[0]
    if given.shape.rank is None:
        given.set_shape([None] * len(op.inputs[layer.layout.weight].shape))
    consumers = given.consumers()
    with graph.name_scope(f"{SCOPE}/{op.name}/dopt_output/"), graph.device(op.device):
        quantizer = OutputQuantizer(plan, layer.layout, rectifier)
        active = quantizer.prepare(given, mode, preparation)
        made = replaced(given, active, lambda y: quantizer.quantize(y, mode))
    made.set_shape(given.shape)
    for consumer in consumers:
        for index, tensor in enumerate(consumer.inputs):
            if tensor is given:
                consumer._update_input(index, made)
    return quantizer


def _input_of(graph: tf.Graph, name: str, index: int) -> tf.Tensor | None:
    """Return what an operation takes, or ``None`` if there is none of that name: it stands inside a function."""
    try:
        return graph.get_operation_by_name(name).inputs[index]
    except KeyError:
        return None


def _error_of(site: _Site, mode: Mode) -> Any:
    return lambda: site.quantizer.error(site.given, site.weight, site.factor(), mode)


def _factor(graph: tf.Graph, norm: Norm | None, structure: Structure) -> tf.Tensor | None:
    """Return what folding multiplies a layer's weight by, as the core does: ``[C]`` float32 without a gradient."""
    if norm is None:
        return None
    variance = _read(graph, norm.variance, structure)
    root = tf.sqrt(tf.cast(variance, tf.float64) + norm.epsilon)
    gamma = tf.ones_like(root) if norm.gamma is None else tf.cast(_read(graph, norm.gamma, structure), tf.float64)
    return tf.stop_gradient(tf.cast(tf.reshape(gamma / root, [-1]), tf.float32))


def _read(graph: tf.Graph, tensor: str, structure: Structure) -> tf.Tensor:
    """Return the value of the variable or constant that a tensor of the graph in inference is read from."""
    node = source_of(structure.graph, tensor)
    if node is None:
        raise ModelError(
            f"The tensor {tensor!r} is read from no variable", expected="a batch normalization of variables"
        )
    source = graph.get_operation_by_name(node.name).outputs[0]
    if node.op == "VarHandleOp":
        return tf.raw_ops.ReadVariableOp(resource=source, dtype=tf.as_dtype(node.attr["dtype"].type))
    return tf.identity(source)


def _flag(graph: tf.Graph, value: Any, name: str, dtype: tf.DType) -> tf.Tensor:
    """Return a flag as a scalar tensor of the graph.

    Raises:
        ModelError: It is no scalar, no number, or of another graph.
    """
    expected = f"a scalar {dtype.name} tensor of the session's graph, or a Python value"
    if isinstance(value, (bool, int, np.bool_, np.integer)):
        return tf.constant(value, dtype)
    if isinstance(value, tf.Variable):
        value = value.read_value()
    if not tf.is_tensor(value) or value.dtype not in (tf.bool, tf.int32, tf.int64, tf.uint8, tf.int8, tf.int16):
        raise ModelError(f"The {name} is {value!r}", where=name, expected=expected)
    if value.graph is not graph:
        raise ModelError(f"The {name} {value.name!r} belongs to another graph", where=name, expected=expected)
    if value.shape.rank not in (None, 0):
        raise ModelError(f"The {name} {value.name!r} has the shape {value.shape}", where=name, expected=expected)
    return tf.cast(tf.ensure_shape(value, []), dtype)  # a placeholder made without a shape says nothing of its rank


def _refuse_final(graph: tf.Graph) -> None:
    if graph.finalized:
        raise ModelError(
            "The graph is finalized and cannot be changed",
            expected="a graph that is still being built",
            fix="Call it before tf.compat.v1.train.MonitoredTrainingSession is made or graph.finalize() is called.",
        )


def _refuse_finished(graph: tf.Graph) -> None:
    """Raise if the graph can no longer be rewritten.

    Raises:
        ModelError: It is finalized, or gradients or training operations were already built on it.
    """
    _refuse_final(graph)
    for op in graph.get_operations():
        applies = is_training_node(op.node_def) and op.type.startswith(("Apply", "ResourceApply", "SparseApply"))
        if in_gradients(op.name) or applies or op.type.endswith("Grad") or "BackpropFilter" in op.type:
            raise ModelError(
                "Gradients were already built on this graph, and would not pass through the quantization",
                where=f"operation {op.name!r} ({op.type})",
                expected="a graph without gradients",
                fix="Call optimize_model before the optimizer's minimize() or tf.gradients().",
            )


def _check_effect(sess: Any, graph: tf.Graph, quantization: Quantization) -> None:
    """Check that the session takes the rewritten graph: one that has run keeps the operations as they were.

    The new inputs of one layer are fed with zeros; its output must then be zero without any other feed.

    Raises:
        ModelError: The session has run before.
    """
    for name in quantization.sites:
        op, layout = graph.get_operation_by_name(name), quantization.structure.layers[name].layout
        given, weight = op.inputs[layout.input], op.inputs[layout.weight]
        if len(op.inputs) > 2 or not weight.shape.is_fully_defined() or given.shape[layout.input_axis] is None:
            continue
        reach = max([1, *weight.shape.as_list()])
        sizes = [1 if axis == 0 else reach if size is None else size for axis, size in enumerate(given.shape.as_list())]
        feeds = {
            given.name: np.zeros(sizes, given.dtype.as_numpy_dtype),
            weight.name: np.ones(weight.shape, weight.dtype.as_numpy_dtype),
        }
        try:
            fresh = not np.any(sess.run(op.outputs[0], feeds))
        except tf.errors.InvalidArgumentError:
            fresh = False
        except tf.errors.FailedPreconditionError:
            fresh = False
        except (tf.errors.UnimplementedError, ValueError):
            continue  # this kind cannot be tried here (a data format that this device lacks, say)
        if not fresh:
            raise ModelError(
                "The session has already run this graph and would go on with the operations as they were",
                where=f"operation {name!r}",
                expected="a session that has run nothing yet",
                fix="Build the graph anew in a new session, and call optimize_model before anything is run or loaded.",
            )
        return


def quantized(sess: Any) -> Quantization:
    """Return what is kept of a session's quantized graph.

    Raises:
        ModelError: It is not a quantized one.
    """
    found: Quantization | None = quantization_of(graph_of(sess))
    if found is None:
        raise ModelError(
            "The graph of this session is not a quantized one",
            expected="the session that was given to optimize_model, or another of the same graph",
            fix="Call optimize_model(sess, config_file, is_train_flag, quant_flag) first.",
        )
    return found
