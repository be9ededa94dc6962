"""The state of one quantized layer: scales, zero point, statistics; and what is done with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from dopt_api.quantizer import Statistics, activation_parameters
from dopt_api.types import LayerPlan
from dopt_tf.fake_quantize import learned_fake_quantize, learned_scale, weight_scale
from dopt_tf.layer_kinds import Layout, channelwise_shape, on_weight, samples_first
from dopt_tf.statistics import DeviceStatistics, arrangement, merge, probe, rectified

__all__ = [
    "SCOPE",
    "ActivationQuantizer",
    "LayerQuantizer",
    "Mode",
    "OutputQuantizer",
    "Preparation",
    "classic_cond",
    "replaced",
    "restore_values",
]

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


class ActivationQuantizer:
    """The state of one activation of a quantized layer; everything is a variable under :data:`SCOPE`.

    Attributes:
        role: ``input`` or ``output``.
        plan: The layer's strategy and range method.
        layout: How the layer is laid out.
        scale: Float32 ``[]``, as calibrated.
        zero_point: Int32 ``[]``.
        ready: uint8 ``[]``, 1 when ``scale`` and ``zero_point`` are decided.
        gain: Float32 ``[]``, learned; see :func:`dopt_api.quantizer.learned_scale`.
        statistics: What calibration has seen.
    """

    role = "input"

    def __init__(self, plan: LayerPlan, layout: Layout) -> None:
        """Make the variables, in the name scope that is open."""
        self.plan, self.layout = plan, layout
        self.scale = _variable(f"{self.role}_scale", np.float32(1.0))
        self.zero_point = _variable(f"{self.role}_zero_point", np.int32(0))
        self.ready = _variable("ready", np.uint8(0))
        self.gain = _variable(f"{self.role}_gain", np.float32(0.0), trainable=True)
        self._warned = False

    @property
    def channel_axis(self) -> int:
        """The axis of a batch with the channels, samples first."""
        return self.layout.input_axis

    def batch(self, x: tf.Tensor) -> tf.Tensor:
        """Return the tensor whose range is looked for, samples first."""
        return samples_first(x, self.layout)

    @property
    def decided(self) -> list[tf.Variable]:
        """The variables that are set when the scale is decided."""
        return [self.scale, self.zero_point, self.ready, self.gain]

    @property
    def variables(self) -> list[tf.Variable]:
        """Every variable of the quantizer."""
        return [*self.decided, *self.statistics.parts.values()]

    # ---- deciding the scale

    def start_calibration(self) -> list[tuple[tf.Variable, Any]]:
        """Return what is to be restored so that earlier statistics are forgotten."""
        return [(variable, None) for variable in [self.ready, *self.statistics.parts.values()]]

    def conclude(self, statistics: Mapping[str, NDArray[np.generic]]) -> list[tuple[tf.Variable, Any]]:
        """Let the core turn statistics into scale and zero point; return what is to be restored.

        Raises:
            CalibrationError: There were no data, or NaN or infinity among them.
        """
        scale, zero_point = self._decide(statistics)
        decided = [(self.scale, scale), (self.zero_point, zero_point)]
        return [*decided, (self.ready, 1), (self.gain, None)]

    def prepare(self, x: tf.Tensor, mode: Mode, preparation: Preparation) -> tf.Tensor:
        """Return whether this step quantizes the layer, after seeing to it that the scale is decided.

        A calibration step takes the activation into the statistics and stays float. A scale that is not decided is
        decided by a pending calibration (as from a checkpoint) or, in training, by this very batch.
        """
        ready = self.ready.read_value() > 0
        due = mode.quantizing & (mode.calibrating | ~ready)
        data = self.batch(tf.stop_gradient(x))
        decided = preparation.run(self, due, data, rectified(x) or rectified(data), mode)
        return mode.quantizing & ~mode.calibrating & (ready | decided)

    def decide_or_warn(self, values: Mapping[str, NDArray[np.generic]]) -> tuple[np.float32, np.int32, np.uint8]:
        """Return scale, zero point and whether they are decided, from the statistics of a step, if they saw data."""
        if int(values["samples"]) + int(values["non_finite"]):
            scale, zero_point = self._decide(values)
            return scale, np.int32(zero_point), np.uint8(1)
        if not self._warned:
            self._warned = True
            _log.warning(
                "Layer %r has no %s range yet and runs in float: calibrate it (set_calibrate_state) or train it.",
                self.plan.name,
                self.role,
            )
        return np.float32(1.0), np.int32(0), np.uint8(0)

    def _decide(self, values: Mapping[str, NDArray[np.generic]]) -> tuple[np.float32, int]:
        return activation_parameters(
            DeviceStatistics.to_core(values),
            self.plan.input_grid,
            layer=self.plan.name,
            method=self.plan.range_method,
            role=self.role,
        )

    # ---- quantizing

    def quantize(self, x: tf.Tensor, mode: Mode) -> tf.Tensor:
        """Return the fake-quantized activation, of the dtype of ``x``."""
        scale = self.learned_activation_scale(mode)
        return tf.cast(learned_fake_quantize(tf.cast(x, tf.float32), scale, *self._bounds()), x.dtype)

    def learned_activation_scale(self, mode: Mode) -> tf.Tensor:
        """Return the scale in use, ``[]``, differentiable in the gain in training."""
        return learned_scale(self.scale.read_value(), _following(self.gain, mode))

    def _bounds(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the ends of the grid, less its zero point, float32."""
        grid = self.plan.input_grid
        zero_point = self.zero_point.read_value()
        return tf.cast(grid.qmin - zero_point, tf.float32), tf.cast(grid.qmax - zero_point, tf.float32)


class LayerQuantizer(ActivationQuantizer):
    """What a quantized layer knows besides its weight and bias: all about its input, and the gains of its weight.

    Attributes:
        weight_gain: Float32 ``[C]``, like ``gain``, on the scales that the weight's extremes give.
    """

    def __init__(self, plan: LayerPlan, layout: Layout, channels: int) -> None:
        with tf.name_scope(f"{SCOPE}/{plan.name}/"):
            super().__init__(plan, layout)
            self.weight_gain = _variable("weight_gain", np.zeros(channels, np.float32), trainable=True)
            self.statistics = DeviceStatistics()

    @property
    def weight_only(self) -> bool:
        """Whether the strategy leaves the input float; then there is nothing to calibrate."""
        return self.plan.strategy.activation is None

    @property
    def variables(self) -> list[tf.Variable]:
        """Every variable of the quantizer."""
        return [*self.decided, self.weight_gain, *self.statistics.parts.values()]

    # ---- deciding the scales

    def conclude(self, statistics: Mapping[str, NDArray[np.generic]]) -> list[tuple[tf.Variable, Any]]:
        """Let the core turn statistics into scale and zero point, unless the input stays float.

        Raises:
            CalibrationError: There were no data, or NaN or infinity among them.
        """
        return [] if self.weight_only else super().conclude(statistics)

    def prepare(self, x: tf.Tensor, mode: Mode, preparation: Preparation) -> tf.Tensor:
        """Return whether this step quantizes the layer, after seeing to it that the scale is decided."""
        if self.weight_only:
            return mode.quantizing & ~mode.calibrating
        return super().prepare(x, mode, preparation)

    # ---- quantizing

    def quantize_weight(self, weight: tf.Tensor, factor: tf.Tensor | None, mode: Mode) -> tf.Tensor:
        """Return the fake-quantized weight, of its own dtype and shape.

        Args:
            weight: The layer's weight.
            factor: The factor of the batch normalization that follows, ``[C]``, or ``None``. The folded weight is
                what is quantized; the result is divided by the factor, since the normalization runs after the layer.
            mode: What the step is.
        """
        grid = self.plan.strategy.weight
        folded, folding, step = self._folded(weight, factor, mode)
        result = learned_fake_quantize(folded, step, grid.qmin, grid.qmax)
        return tf.cast(tf.reshape(result if folding is None else result / folding, tf.shape(weight)), weight.dtype)

    def error(self, x: tf.Tensor, weight: tf.Tensor, factor: tf.Tensor | None, mode: Mode) -> tf.Tensor:
        """Return the relative squared error of the folded weight plus, in training, of the probed inputs."""
        grid = self.plan.strategy.weight
        folded, _, step = self._folded(weight, factor, mode)
        weight_error = _relative_error(folded, step, float(grid.qmin), float(grid.qmax))

        def input_error() -> tf.Tensor:
            probed = probe(samples_first(tf.cast(x, tf.float32), self.layout), self.layout.input_axis)
            return _relative_error(probed, self.learned_activation_scale(mode), *self._bounds())

        if self.weight_only:
            return weight_error
        return weight_error + classic_cond(mode.training, input_error, lambda: tf.constant(0.0))

    def _folded(
        self, weight: tf.Tensor, factor: tf.Tensor | None, mode: Mode
    ) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor]:
        """Return the folded weight in its channelwise shape, float32, what folding multiplied it by, and its scales.

        The scales are differentiable in the gains in training; they and the factor have the rank of the weight.
        """
        data = channelwise(tf.cast(weight, tf.float32), self.layout)
        if factor is not None:
            factor = tf.where(tf.equal(factor, 0.0), 1.0, factor)
        derived = weight_scale(data, self.plan.strategy.weight, self.layout.weight_axis, factor)
        scale = learned_scale(derived, _following(self.weight_gain, mode))
        step = on_weight(scale, data.shape.rank, self.layout)
        if factor is None:
            return data, None, step
        folding = on_weight(factor, data.shape.rank, self.layout)
        return data * folding, folding, step


class OutputQuantizer(ActivationQuantizer):
    """The state of a layer's output, where it is recorded.

    Attributes:
        rectifier: ``Relu`` or ``Relu6``, if it alone reads the output, or ``None``: then what is recorded and quantized
            is what the rectifier makes of it, which the rectifier itself leaves as it is.
    """

    role = "output"

    def __init__(self, plan: LayerPlan, layout: Layout, rectifier: str | None) -> None:
        with tf.name_scope(f"{SCOPE}/{plan.name}/dopt_output/"):
            super().__init__(plan, layout)
            self.statistics = DeviceStatistics()
        self.rectifier = rectifier

    @property
    def channel_axis(self) -> int:
        """The axis of a batch with the channels, samples first."""
        return self.layout.output_axis or 1

    def seen_as(self, y: tf.Tensor) -> tf.Tensor:
        """Return what the rectifier makes of the output."""
        made = {None: tf.identity, "Relu": tf.nn.relu, "Relu6": tf.nn.relu6}
        return made[self.rectifier](y)

    def batch(self, x: tf.Tensor) -> tf.Tensor:
        """Return the tensor whose range is looked for, samples first."""
        seen = self.seen_as(x)
        return seen if self.layout.output_axis else tf.transpose(seen)

    def quantize(self, x: tf.Tensor, mode: Mode) -> tf.Tensor:
        """Return the fake-quantized output, of the dtype of ``x``."""
        return super().quantize(self.seen_as(x), mode)


class Preparation:
    """What a step does for a layer before its scale can be used: one function for all layers.

    TensorFlow prepares a function when it first runs; one for each layer would cost seconds.
    """

    def __init__(self) -> None:
        """Start without layers."""
        self._quantizers: list[ActivationQuantizer] = []
        self._empty = {name: np.asarray(part) for name, part in Statistics().arrays().items()}
        self._branches: dict[tf.DType, list[Any]] = {}

    def _functions(self, dtype: tf.DType) -> list[Any]:
        """Return what is done where it is due and where it is not, for inputs of a dtype."""
        integer, flag, resource = (tf.TensorSpec([], kind) for kind in (tf.int32, tf.bool, tf.resource))
        batch = [tf.TensorSpec(None, dtype), tf.TensorSpec([4], tf.int32), tf.TensorSpec([None], tf.int32)]
        signature = [integer, flag, flag, flag, *batch, *[resource] * (len(self._empty) + 4)]
        return [
            tf.function(function, input_signature=signature, autograph=False).get_concrete_function()
            for function in (self._observe_or_decide, self._stay_undecided)
        ]

    def run(
        self, quantizer: ActivationQuantizer, due: tf.Tensor, x: tf.Tensor, not_negative: bool, mode: Mode
    ) -> tf.Tensor:
        """Return whether the scale is decided after a step; false where nothing is ``due``. Gradients do not pass."""
        index = len(self._quantizers)
        self._quantizers.append(quantizer)
        handles = [variable.handle for variable in (*quantizer.statistics.parts.values(), *quantizer.decided)]
        arranged = arrangement(x, quantizer.channel_axis)
        if x.dtype not in self._branches:
            self._branches[x.dtype] = self._functions(x.dtype)
        taken, not_taken = self._branches[x.dtype]
        taken.add_to_graph(due.graph)
        not_taken.add_to_graph(due.graph)
        (result,) = tf.raw_ops.If(
            cond=due,
            input=[
                tf.constant(index),
                mode.calibrating,
                mode.training,
                tf.constant(not_negative),
                x,
                *arranged,
                *handles,
            ],
            Tout=[tf.bool],
            then_branch=taken,
            else_branch=not_taken,
        )
        return tf.reshape(result, [])

    @staticmethod
    def _stay_undecided(*inputs: tf.Tensor) -> tf.Tensor:  # noqa: ARG004  # both branches take the same
        return tf.constant(False)

    def _observe_or_decide(
        self,
        index: tf.Tensor,
        calibrating: tf.Tensor,
        training: tf.Tensor,
        not_negative: tf.Tensor,
        x: tf.Tensor,
        shape: tf.Tensor,
        positions: tf.Tensor,
        *handles: tf.Tensor,
    ) -> tf.Tensor:
        """Do what a step has to do before the scale can be used; return whether it can."""
        parts = dict(zip(self._empty, handles[: len(self._empty)], strict=True))
        values = self._read(parts)
        seen = values["samples"] + values["non_finite"] > 0

        def observe() -> tf.Tensor:
            for name, value in merge(values, tf.reshape(x, shape), positions, not_negative).items():
                tf.raw_ops.AssignVariableOp(resource=parts[name], value=value)
            return tf.constant(True)

        def decide() -> tf.Tensor:
            return self._decide(index, self._read(parts), handles[len(self._empty) :])

        tf.cond(calibrating | (training & ~seen), observe, lambda: tf.constant(False))
        return tf.cond(calibrating, lambda: tf.constant(False), decide)

    def _read(self, parts: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {
            name: tf.ensure_shape(tf.raw_ops.ReadVariableOp(resource=handle, dtype=model.dtype), model.shape)
            for (name, handle), model in zip(parts.items(), self._empty.values(), strict=True)
        }

    def _decide(self, index: tf.Tensor, values: Mapping[str, tf.Tensor], targets: Sequence[tf.Tensor]) -> tf.Tensor:
        """Decide the scale from what was seen; return whether it is decided."""
        decided = tf.numpy_function(
            lambda index, *arrays: self._quantizers[index].decide_or_warn(dict(zip(values, arrays, strict=True))),
            [index, *values.values()],
            [tf.float32, tf.int32, tf.uint8],
        )
        for target, value in zip(targets, (*decided, tf.constant(0.0)), strict=True):
            tf.raw_ops.AssignVariableOp(resource=target, value=tf.reshape(value, []))
        return tf.reshape(decided[2] > 0, [])


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
    functions = tf.compat.v1.control_flow_v2_enabled()
    tf.compat.v1.disable_control_flow_v2()
    try:
        return tf.compat.v1.cond(predicate, true, false)
    finally:
        if functions:
            tf.compat.v1.enable_control_flow_v2()


def replaced(x: tf.Tensor, predicate: tf.Tensor, replace: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Return ``replace(x)`` where the predicate holds, else ``x``.

    One switch has both ways, so that no gradient of the size of ``x`` is filled with zeros for the way not taken.
    """
    kept, taken = tf.raw_ops.Switch(data=x, pred=predicate)
    with tf.control_dependencies([taken]):
        return tf.raw_ops.Merge(inputs=[kept, replace(taken)]).output


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
