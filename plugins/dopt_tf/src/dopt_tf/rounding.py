"""Rounding the weights of a calibrated graph so that its outputs, and not its weights, have the least error."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from dopt_api.quantizer import extremes, learned_scale, scale_zero_point
from dopt_api.quantizer.rounding import Moments, RoundedLayer, round_layer
from dopt_api.quantizer.short_sums import partners
from dopt_tf.find_layers import Layer
from dopt_tf.layer_kinds import channelwise_shape
from dopt_tf.quantizer import restore_values
from dopt_tf.running import Array, Feed, Runner, given, require_calibrated

__all__ = ["RoundedLayer", "round_weights"]

Progress = Callable[[list["_Rounding"]], Iterable["_Rounding"]]

AT_ONCE = 8
"""Of how many layers the float inputs are fetched together: more are faster, and hold more in memory."""


def round_weights(
    sess: Any,
    feeds: Iterable[Feed],
    *,
    positions: int = 128,
    damping: float = 0.3,
    short_sums: bool = False,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress = iter,
) -> list[RoundedLayer]:
    """Round the weights of a calibrated graph, layer by layer, and correct their biases; variables are changed.

    Layer after layer, in the order of the graph, the quantized inputs of a layer are sampled, with all layers before it
    rounded already, and :func:`dopt_api.quantizer.rounding.round_layer` rounds the weight that best gives the *float*
    graph's outputs on these inputs; the bias (or the running mean of the batch normalization that is folded in) takes
    up the difference to the float output's mean. The weights then lie on their grids: exporting a checkpoint saved
    afterwards gives just these integers. Where it fails, the variables are as they were.

    Some 32 to 64 samples are enough. Time is about a forward pass over them for each layer; memory holds the float
    outputs at the sampled positions, and the inputs of a few layers for one feed. Convolutions in two dimensions,
    depthwise ones, and matrix products are rounded; other layers are listed with the reason.

    Args:
        sess: The session whose graph was quantized, calibrated.
        feeds: What ``sess.run`` is fed with for inference, one for each batch, the model's own training flag included.
            ``quant_flag`` and ``is_train_flag`` need not be there: both paths are run, as inference.
        positions: How many positions of each sample's output are looked at.
        damping: See :func:`~dopt_api.quantizer.rounding.round_weight`.
        short_sums: For kernels that add two products in 16 bits, as on processors with AVX2 and without VNNI: in the
            channels in which such a sum can overflow, the weights are rounded to a range in which none can.
        seed: Of the positions.
        seconds: After that time, layers that are left stay rounded to nearest, and are listed with that reason.
        progress: Wraps the list of layers to show progress, such as ``tqdm.tqdm``.

    Returns:
        What was done, for each quantized layer in the order of the graph.

    Raises:
        ModelError: The graph is not a quantized one.
        CalibrationError: A layer was never calibrated, or there are no feeds.
    """
    end = None if seconds is None else time.monotonic() + seconds
    runner, data = Runner(sess), given(feeds)
    require_calibrated(runner)
    roundings = _roundings(runner, positions, seed)
    with _kept_on_failure(runner, roundings):
        open_ones = [rounding for rounding in roundings if not rounding.reason]
        for first in range(0, len(open_ones), AT_ONCE):
            _sample_float(runner, open_ones[first : first + AT_ONCE], data)
        for rounding in progress(roundings):
            if end is not None and time.monotonic() > end:
                rounding.reason = rounding.reason or "no time was left for it"
            if not rounding.reason:
                _sample_quantized(runner, rounding, data)
            rounding.conclude(runner, damping, short_sums)
    return [rounding.result for rounding in roundings]


@dataclass(eq=False)
class _Rounding:
    """One layer that is rounded."""

    layer: Layer
    op: tf.Operation
    site: Any
    sampler: _Sampler
    weight: tf.Variable | None = None
    mean: tf.Variable | None = None
    bias: tf.Variable | None = None
    reason: str = ""
    moments: Moments = field(default_factory=Moments)
    outputs: list[Array] = field(default_factory=list)
    result: RoundedLayer = field(default_factory=lambda: RoundedLayer(""))

    @property
    def changed(self) -> list[tf.Variable]:
        """The variables that rounding may change."""
        found = [self.weight, self.mean, self.bias, self.site.quantizer.weight_gain]
        return [variable for variable in found if variable is not None]

    def rows(self, weight: Array) -> Array:
        """Return a weight as ``[G, O, K]``: groups, output channels of a group, and what each sums over."""
        return self.sampler.rows(weight)

    def conclude(self, runner: Runner, damping: float, short_sums: bool) -> None:
        """Round the weight and correct the bias."""
        name = self.site.quantizer.plan.name
        if not self.reason and not self.moments.count:
            self.reason = "no feed reached it"
        if self.reason or self.weight is None:
            self.result = RoundedLayer(name, reason=self.reason)
            return
        quantizer, grid = self.site.quantizer, self.site.quantizer.plan.strategy.weight
        weight, gain = runner.values([self.weight, quantizer.weight_gain])
        factor = runner.norm_factor(self.layer)
        rows = self.rows(weight.astype(np.float32))
        on = np.ones((*rows.shape[:2], 1), np.float32) if factor is None else factor.reshape(*rows.shape[:2], 1)
        folded = rows * on
        flat = folded.reshape(-1, rows.shape[2])
        derived, _ = scale_zero_point(*extremes(flat, 0), grid)
        scale = learned_scale(derived, gain).reshape(rows.shape[:2])
        pairs = self.sampler.pairs(weight.shape) if short_sums and quantizer.plan.input_grid.bits == 8 else None
        found = round_layer(folded, scale, self.moments, grid, factor=on, damping=damping, pairs=pairs)
        changes = [
            (self.weight, self.sampler.back(found.weight, weight.shape)),
            (quantizer.weight_gain, found.gain),
        ]
        taker, sign = (self.bias, 1.0) if self.bias is not None else (self.mean, -1.0)
        if taker is not None:
            (before,) = runner.values([taker])
            changes.append((taker, before + sign * found.shift.reshape(before.shape)))
        restore_values(runner.session, changes)
        self.result = RoundedLayer(name, found.nearest, found.rounded)


class _Sampler:
    """Takes the patches of a layer's input from random positions of its output, the same in each pass."""

    def __init__(self, op: tf.Operation, layer: Layer, positions: int, seed: int) -> None:
        self.op, self.layer, self.positions, self.seed = op, layer, positions, seed
        self.channels_first = op.type != "MatMul" and op.get_attr("data_format").startswith(b"NC")
        self.restart()

    def restart(self) -> None:
        """Begin the positions anew."""
        self.generator = np.random.default_rng(self.seed)

    def rows(self, weight: Array) -> Array:
        """Return a weight as ``[G, O, K]``."""
        if self.op.type == "MatMul":
            rows: Array = np.moveaxis(weight, self.layer.layout.weight_axis, 0)[None]
            return rows
        height, width, inputs, outputs = weight.shape
        if self.op.type == "DepthwiseConv2dNative":
            return np.reshape(weight.transpose(2, 3, 0, 1), (inputs, outputs, height * width))
        groups = self._groups(inputs)
        return np.reshape(weight.transpose(3, 0, 1, 2), (groups, outputs // groups, height * width * inputs))

    def back(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """Return the weight of the shape that :meth:`rows` was given."""
        if self.op.type == "MatMul":
            return np.moveaxis(rows[0], 0, self.layer.layout.weight_axis)
        height, width, inputs, outputs = shape
        if self.op.type == "DepthwiseConv2dNative":
            return np.transpose(np.reshape(rows, (inputs, outputs, height, width)), (2, 3, 0, 1))
        return np.transpose(np.reshape(rows, (outputs, height, width, inputs)), (1, 2, 3, 0))

    def pairs(self, shape: tuple[int, ...]) -> NDArray[np.intp] | None:
        """Return which weights of a row short sums pair."""
        if self.op.type == "MatMul":
            return partners(1, 1, math.prod(shape) // shape[self.layer.layout.weight_axis], 1, channels_last=True)
        height, width, inputs, outputs = shape
        if self.op.type == "DepthwiseConv2dNative":
            return partners(inputs, outputs, 1, height * width, channels_last=True)
        groups = self._groups(inputs)
        return partners(groups, outputs // groups, inputs, height * width, channels_last=True)

    def patches(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Return ``[N, G, K]`` of a batch of inputs.

        Args:
            x: What the operation takes.
            shape: Of its weight.
        """
        if self.op.type == "MatMul":
            return np.expand_dims(x, 1)
        if self.channels_first:
            x = x.transpose(0, 2, 3, 1)
        padded, (stride, dilation) = self._padded(x, shape[:2])
        counts = [(padded.shape[1 + i] - dilation[i] * (shape[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
        drawn = (len(x), min(self.positions, counts[0] * counts[1]))
        top, left = (self.generator.integers(0, count, drawn) * stride[i] for i, count in enumerate(counts))
        sample = np.arange(len(x))[:, None]
        windows = [
            padded[sample, top + i * dilation[0], left + j * dilation[1]].reshape(-1, x.shape[3])
            for i in range(shape[0])
            for j in range(shape[1])
        ]
        found = np.stack(windows, 1)  # [N, positions of the window, channels]
        if self.op.type == "DepthwiseConv2dNative":
            return np.transpose(found, (0, 2, 1))
        groups = self._groups(shape[2], x.shape[3])
        parts = np.reshape(found, (len(found), found.shape[1], groups, shape[2]))
        return np.reshape(np.transpose(parts, (0, 2, 1, 3)), (len(found), groups, -1))

    def _groups(self, inputs: int, channels: int | None = None) -> int:
        known = self.op.inputs[0].shape[1 if self.channels_first else 3] if channels is None else channels
        return 1 if known is None else int(known) // inputs

    def _padded(self, x: Array, window: tuple[int, ...]) -> tuple[Array, tuple[Sequence[int], Sequence[int]]]:
        """Return the input with the zeros that the operation puts around it, its strides and its dilations."""
        spatial = slice(2, 4) if self.channels_first else slice(1, 3)
        stride, dilation = self.op.get_attr("strides")[spatial], self.op.get_attr("dilations")[spatial]
        kind = self.op.get_attr("padding")
        if kind == b"EXPLICIT":
            given = self.op.get_attr("explicit_paddings")
            sides = np.reshape(given, (4, 2))[spatial].tolist()
        elif kind == b"SAME":
            sides = []
            for size, step, reach in zip(x.shape[1:3], stride, _reach(window, dilation), strict=True):
                total = max((-(-size // step) - 1) * step + reach - size, 0)
                sides.append([total // 2, total - total // 2])
        else:
            sides = [[0, 0], [0, 0]]
        return np.pad(x, [(0, 0), *sides, (0, 0)]), (stride, dilation)


def _reach(window: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [step * (size - 1) + 1 for size, step in zip(window, dilation, strict=True)]


def _roundings(runner: Runner, positions: int, seed: int) -> list[_Rounding]:
    """Return what is to be rounded, in the order of the graph."""
    layers = runner.quantization.structure.layers
    found = []
    for number, (name, site) in enumerate(runner.quantization.sites.items()):
        layer, op = layers[name], runner.graph.get_operation_by_name(name)
        sampler = _Sampler(op, layer, positions, seed + number)
        rounding = _Rounding(layer, op, site, sampler, runner.variable(layer.weight))
        rounding.mean = runner.variable(layer.norm.mean) if layer.norm is not None else None
        rounding.bias = runner.variable(layer.bias)
        rounding.reason = _reason(rounding, runner)
        found.append(rounding)
    owners = Counter(one.weight.op.name for one in found if one.weight is not None)
    for rounding in found:
        if rounding.weight is not None and owners[rounding.weight.op.name] > 1:
            rounding.reason = rounding.reason or "its weight is another layer's too"
        rounding.result = RoundedLayer(rounding.site.quantizer.plan.name, reason=rounding.reason)
    return found


def _reason(rounding: _Rounding, runner: Runner) -> str:
    """Return why a layer is not rounded, or nothing."""
    op, layer, grid = rounding.op, rounding.layer, rounding.site.quantizer.plan.strategy.weight
    if op.type not in ("Conv2D", "DepthwiseConv2dNative", "MatMul"):
        return f"{op.type} is not rounded by this method"
    if grid.group is not None or not grid.symmetric:
        return "weights in groups or with zero points are not rounded by this method"
    if op.type == "MatMul" and (layer.layout.weight != 1 or layer.layout.samples_last):
        return "a product whose activation is transposed or second is not rounded by this method"
    if rounding.weight is None or rounding.weight.shape != rounding.site.weight.shape:
        return "its weight is not just what a variable holds"
    if not runner.has_variable_norm(layer):
        return "its batch normalization is not one of variables"
    shape = channelwise_shape(rounding.weight.shape.as_list(), layer.layout)
    for part in (rounding.bias, rounding.mean):
        if part is not None and part.shape.num_elements() != shape[layer.layout.weight_axis]:
            return "its bias is not one number for each output channel"
    return ""


def _sample_float(runner: Runner, roundings: list[_Rounding], data: list[dict[Any, Any]]) -> None:
    """Run the graph in float and keep what layers give at the sampled positions."""
    weights = runner.values([rounding.weight for rounding in roundings if rounding.weight is not None])
    for rounding in roundings:
        rounding.sampler.restart()
    for feed in data:
        inputs = runner.run([rounding.site.given for rounding in roundings], feed, quantizing=False)
        for rounding, weight, x in zip(roundings, weights, inputs, strict=True):
            patches = rounding.sampler.patches(x.astype(np.float32), weight.shape)
            rows = rounding.rows(weight.astype(np.float32))
            rounding.outputs.append(np.einsum("ngk,gok->ngo", patches, rows, optimize=True))


def _sample_quantized(runner: Runner, rounding: _Rounding, data: list[dict[Any, Any]]) -> None:
    """Sample a layer's quantized input."""
    rounding.sampler.restart()
    quantized = rounding.op.inputs[rounding.layer.layout.input]
    shape = tuple(rounding.site.weight.shape.as_list())
    for feed in data:
        x = runner.run(quantized, feed, quantizing=True)
        rounding.moments.add(rounding.sampler.patches(x.astype(np.float32), shape), rounding.outputs.pop(0))


@contextmanager
def _kept_on_failure(runner: Runner, roundings: list[_Rounding]) -> Iterator[None]:
    """Restore the variables where the block fails."""
    names: dict[str, tf.Variable] = {one.op.name: one for rounding in roundings for one in rounding.changed}
    before = runner.values(list(names.values()))
    try:
        yield
    except BaseException:
        restore_values(runner.session, zip(names.values(), before, strict=True))
        raise
