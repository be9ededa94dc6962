"""The state of one quantized layer: scales, zero point, statistics; and what is done with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from dopt_api.quantizer import activation_parameters
from dopt_api.types import LayerPlan
from dopt_tf.fake_quantize import fake_quantize_input, fake_quantize_weight, learned_scale, weight_scale
from dopt_tf.layer_kinds import Layout, channelwise_shape, on_weight, samples_first
from dopt_tf.statistics import DeviceStatistics, probe

__all__ = ["SCOPE", "LayerQuantizer", "Mode", "classic_cond", "rare_cond", "restore_values"]

SCOPE = "dopt_quantizer"
"""The name scope of every variable of a quantizer."""

_log = logging.getLogger("dopt")


@dataclass(frozen=True)
class Mode:
    """What a step is, as scalar tensors.

    Attributes:
        quantizing: Whether the step takes the quantized path.
        calibrating: Whether calibration is on.
        training: Whether scales are initialised and follow.
    """

    quantizing: tf.Tensor
    calibrating: tf.Tensor
    training: tf.Tensor


class LayerQuantizer:
    """What a quantized layer knows besides its weight and bias; everything is a variable under :data:`SCOPE`.

    Attributes:
        plan: The layer's strategy and range method.
        layout: How the layer is laid out.
        input_scale: Float32 ``[]``, as calibrated.
        input_zero_point: Int32 ``[]``.
        ready: uint8 ``[]``, 1 when ``input_scale`` and ``input_zero_point`` are decided.
        input_gain: Float32 ``[]``, learned; see :func:`dopt_api.quantizer.learned_scale`.
        weight_gain: Float32 ``[C]``, likewise, on the scales that the weight's extremes give.
        statistics: What calibration has seen.
    """

    def __init__(self, plan: LayerPlan, layout: Layout, channels: int) -> None:
        self.plan, self.layout = plan, layout
        with tf.name_scope(f"{SCOPE}/{plan.name}/"):
            self.input_scale = _variable("input_scale", np.float32(1.0))
            self.input_zero_point = _variable("input_zero_point", np.int32(0))
            self.ready = _variable("ready", np.uint8(0))
            self.input_gain = _variable("input_gain", np.float32(0.0), trainable=True)
            self.weight_gain = _variable("weight_gain", np.zeros(channels, np.float32), trainable=True)
            self.statistics = DeviceStatistics()
        self._warned = False

    @property
    def variables(self) -> list[tf.Variable]:
        """Every variable of the quantizer."""
        own = [self.input_scale, self.input_zero_point, self.ready, self.input_gain, self.weight_gain]
        return own + list(self.statistics.parts.values())

    # ---- deciding the scales

    def start_calibration(self) -> list[tuple[tf.Variable, Any]]:
        """Return what is to be restored so that earlier statistics are forgotten."""
        return [(variable, None) for variable in [self.ready, *self.statistics.parts.values()]]

    def conclude(self, statistics: Mapping[str, NDArray[np.generic]]) -> list[tuple[tf.Variable, Any]]:
        """Let the core turn statistics into scale and zero point; return what is to be restored.

        Raises:
            CalibrationError: There were no data, or NaN or infinity among them.
        """
        scale, zero_point = self._decide(statistics)
        decided = [(self.input_scale, scale), (self.input_zero_point, zero_point)]
        return [*decided, (self.ready, 1), (self.input_gain, None)]

    def prepare(self, x: tf.Tensor, mode: Mode) -> tf.Tensor:
        """Return whether this step quantizes the layer, after seeing to it that the scale is decided.

        A calibration step takes the input into the statistics and stays float. A scale that is not decided is decided
        by a pending calibration (as from a checkpoint) or, in training, by this very batch.
        """
        ready = self.ready.read_value() > 0
        due = mode.quantizing & (mode.calibrating | ~ready)
        decided = rare_cond(due, lambda: self._observe_or_decide(x, mode))
        return mode.quantizing & ~mode.calibrating & (ready | decided)

    def _observe_or_decide(self, x: tf.Tensor, mode: Mode) -> tf.Tensor:
        """Do what a step has to do before the scale can be used; return whether it can."""
        parts = self.statistics.parts
        seen = parts["samples"].read_value() + parts["non_finite"].read_value() > 0

        def observe() -> tf.Tensor:
            with tf.control_dependencies([self._observe(x)]):
                return tf.constant(True)

        known = tf.cond(mode.calibrating | (mode.training & ~seen), observe, lambda: tf.identity(seen))
        return tf.cond(mode.calibrating, lambda: tf.constant(False), lambda: self._first(known))

    def _observe(self, x: tf.Tensor) -> tf.Operation:
        """Return the operation that takes a batch of inputs into the statistics."""
        return self.statistics.update(samples_first(tf.stop_gradient(x), self.layout), self.layout.input_axis)

    def _first(self, known: tf.Tensor) -> tf.Tensor:
        """Decide the scale from what was seen, once ``known`` is there; return whether it is decided."""
        with tf.control_dependencies([known]):
            values = self.statistics.read()
        decided = tf.numpy_function(
            lambda *arrays: self._decide_or_warn(dict(zip(values, arrays, strict=True))),
            list(values.values()),
            [tf.float32, tf.int32, tf.uint8],
        )
        targets = (self.input_scale, self.input_zero_point, self.ready, self.input_gain)
        updates = [
            variable.assign(tf.reshape(value, []), read_value=False)
            for variable, value in zip(targets, (*decided, 0.0), strict=True)
        ]
        with tf.control_dependencies(updates):
            return tf.reshape(decided[2] > 0, [])

    def _decide(self, values: Mapping[str, NDArray[np.generic]]) -> tuple[np.float32, int]:
        return activation_parameters(
            DeviceStatistics.to_core(values),
            self.plan.strategy.activation,
            layer=self.plan.name,
            method=self.plan.range_method,
        )

    def _decide_or_warn(self, values: Mapping[str, NDArray[np.generic]]) -> tuple[np.float32, np.int32, np.uint8]:
        if int(values["samples"]) + int(values["non_finite"]):
            scale, zero_point = self._decide(values)
            return scale, np.int32(zero_point), np.uint8(1)
        if not self._warned:
            self._warned = True
            _log.warning(
                "Layer %r has no input range yet and runs in float: calibrate it (set_calibrate_state) or train it.",
                self.plan.name,
            )
        return np.float32(1.0), np.int32(0), np.uint8(0)

    # ---- quantizing

    def quantize_input(self, x: tf.Tensor, mode: Mode) -> tf.Tensor:
        """Return the fake-quantized input, of the dtype of ``x``."""
        scale = self.learned_input_scale(mode)
        return tf.cast(fake_quantize_input(tf.cast(x, tf.float32), scale, *self._bounds()), x.dtype)

    def quantize_weight(self, weight: tf.Tensor, factor: tf.Tensor | None, mode: Mode) -> tf.Tensor:
        """Return the fake-quantized weight, of its own dtype and shape.

        Args:
            weight: The layer's weight.
            factor: The factor of the batch normalization that follows, ``[C]``, or ``None``. The folded weight is
                what is quantized; the result is divided by the factor, since the normalization runs after the layer.
            mode: What the step is.
        """
        data, folding = self._folding(weight, factor)
        scale = self._learned_weight_scale(data if folding is None else data * folding, mode)
        result = fake_quantize_weight(data, scale, folding, self.plan.strategy.weight, self.layout)
        return tf.cast(tf.reshape(result, tf.shape(weight)), weight.dtype)

    def error(self, x: tf.Tensor, weight: tf.Tensor, factor: tf.Tensor | None, mode: Mode) -> tf.Tensor:
        """Return the relative squared error of the folded weight plus, in training, of the probed inputs."""
        grid = self.plan.strategy.weight
        data, folding = self._folding(weight, factor)
        folded = data if folding is None else data * folding
        step = on_weight(self._learned_weight_scale(folded, mode), folded.shape.rank, self.layout)
        weight_error = _relative_error(folded, step, float(grid.qmin), float(grid.qmax))

        def input_error() -> tf.Tensor:
            probed = probe(samples_first(tf.cast(x, tf.float32), self.layout), self.layout.input_axis)
            return _relative_error(probed, self.learned_input_scale(mode), *self._bounds())

        return weight_error + classic_cond(mode.training, input_error, lambda: tf.constant(0.0))

    def learned_input_scale(self, mode: Mode) -> tf.Tensor:
        """Return the scale in use, ``[]``, differentiable in the gain in training."""
        return learned_scale(self.input_scale.read_value(), _following(self.input_gain, mode))

    def _learned_weight_scale(self, folded: tf.Tensor, mode: Mode) -> tf.Tensor:
        """Return the scales in use of the folded weight, ``[C]``, differentiable in the gains in training."""
        derived = weight_scale(folded, self.plan.strategy.weight, self.layout.weight_axis)
        return learned_scale(derived, _following(self.weight_gain, mode))

    def _folding(self, weight: tf.Tensor, factor: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Return the weight in its channelwise shape, float32, and the factor so that it multiplies it."""
        data = channelwise(tf.cast(weight, tf.float32), self.layout)
        if factor is None:
            return data, None
        return data, on_weight(tf.where(tf.equal(factor, 0.0), 1.0, factor), data.shape.rank, self.layout)

    def _bounds(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the ends of the input's grid, less its zero point, float32."""
        grid = self.plan.strategy.activation
        zero_point = self.input_zero_point.read_value()
        return tf.cast(grid.qmin - zero_point, tf.float32), tf.cast(grid.qmax - zero_point, tf.float32)


def channelwise(weight: Any, layout: Layout) -> Any:
    """Return a weight (tensor or array) with its output channels on one axis."""
    if not layout.merged:
        return weight
    reshape = np.reshape if isinstance(weight, np.ndarray) else tf.reshape
    return reshape(weight, channelwise_shape([int(size) for size in weight.shape], layout))


def classic_cond(predicate: tf.Tensor, true: Callable[[], tf.Tensor], false: Callable[[], tf.Tensor]) -> tf.Tensor:
    """Return ``tf.cond`` made of switches and merges, whichever kind the program uses itself.

    They cost next to nothing where a step does not take them, and gradients pass them without functions.
    """
    with _control_flow_of_functions(False):
        return tf.compat.v1.cond(predicate, true, false)


def rare_cond(predicate: tf.Tensor, true: Callable[[], tf.Tensor]) -> tf.Tensor:
    """Return ``true()`` where the predicate holds, else false; one single operation where it does not.

    It is made of a function, which a step that does not take it never looks into. Gradients do not pass.
    """
    with _control_flow_of_functions(True):
        result = tf.cond(predicate, true, lambda: tf.constant(False))
    op = result.op
    while op.type == "Identity":
        op = op.inputs[0].op
    op._set_attr("_lower_using_switch_merge", tf.compat.v1.AttrValue(b=False))
    return tf.stop_gradient(result)


def restore_values(sess: Any, values: Iterable[tuple[tf.Variable, Any]]) -> None:
    """Give variables values in a session, ``None`` for the initial one; adds nothing to the graph.

    Tensors are fed by name, since outside of a graph's context they cannot be keys.
    """
    pairs = list(values)
    feeds = {
        variable.initializer.inputs[1].name: np.asarray(value, variable.dtype.as_numpy_dtype)
        for variable, value in pairs
        if value is not None
    }
    sess.run([variable.initializer for variable, _ in pairs], feeds)


def _following(gain: tf.Variable, mode: Mode) -> tf.Tensor:
    """Return a gain that has a gradient in training only."""
    value = gain.read_value()
    return tf.where(mode.training, value, tf.stop_gradient(value))


def _relative_error(x: tf.Tensor, step: tf.Tensor, low: Any, high: Any) -> tf.Tensor:
    r"""Return :math:`\sum (\hat x - x)^2 / \sum x^2` with the integers held fixed, so that it has a gradient."""
    rounded = tf.raw_ops.Rint(x=tf.stop_gradient(x / step))
    integers = tf.raw_ops.ClipByValue(t=rounded, clip_value_min=low, clip_value_max=high)
    energy = tf.reduce_sum(tf.square(x))
    error = tf.reduce_sum(tf.square(tf.stop_gradient(integers) * step - x))
    return error / tf.where(tf.equal(energy, 0.0), 1.0, energy)


def _variable(name: str, value: Any, trainable: bool = False) -> tf.Variable:
    return tf.compat.v1.Variable(value, name=name, trainable=trainable, use_resource=True)


@contextmanager
def _control_flow_of_functions(wanted: bool) -> Iterator[None]:
    """Choose which kind of conditionals TensorFlow makes, for the time of the block."""
    switches = {True: tf.compat.v1.enable_control_flow_v2, False: tf.compat.v1.disable_control_flow_v2}
    before = tf.compat.v1.control_flow_v2_enabled()
    switches[wanted]()
    try:
        yield
    finally:
        switches[before]()
