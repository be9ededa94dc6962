"""The golden cases: single layers with fixed weights and inputs, and the parameter file that the core makes of them.

Every backend goes the whole way with each layer (calibrate, save, export) and must write these parameters, names
aside, to the byte. Weights and inputs are multiples of 1/1024, so that no backend's arithmetic takes part in them.

Run as a script, it writes ``quant_params.json`` beside itself from the NumPy reference alone:
``python tests/golden/cases.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dopt_api.params import FloatLayer, LayerParams, QuantParams, layer_params, quantize_layer, render_params
from dopt_api.quantizer import BatchNorm, Statistics, activation_parameters
from dopt_api.strategy import STRATEGIES
from dopt_api.types import LayerPlan

FILE = Path(__file__).with_name("quant_params.json")
EPSILON = 1e-3


@dataclass(frozen=True, eq=False)
class Case:
    """One layer.

    Attributes:
        name: Its name.
        kind: ``conv``, ``depthwise``, ``transposed``, ``conv3d`` or ``linear``.
        weight: In PyTorch's layout.
        bias: ``[C]``, or ``None``.
        norm: The batch normalization after it, or ``None``.
        batches: What calibration sees, channels first.
        range_method: How the range is chosen.
    """

    name: str
    kind: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    norm: BatchNorm | None
    batches: tuple[NDArray[np.float32], ...]
    range_method: str = "min_max"

    @property
    def axis(self) -> int:
        """The axis of the weight with the output channels."""
        return 1 if self.kind == "transposed" else 0


def cases() -> list[Case]:
    """Return the cases, the same on every machine."""
    numbers = np.random.default_rng(20240601)

    def values(*shape: int, low: int = -700, high: int = 700) -> NDArray[np.float32]:
        return (numbers.integers(low, high, shape) / 1024).astype(np.float32)

    def norm(channels: int) -> BatchNorm:
        variance = values(channels, low=100, high=3000)
        return BatchNorm(values(channels), values(channels), values(channels), variance, EPSILON)

    def seen(*shape: int, low: int = -300) -> tuple[NDArray[np.float32], ...]:
        return tuple(values(n, *shape, low=low, high=2000) for n in (4, 3))

    result = [
        Case("stem", "conv", values(8, 3, 3, 3), None, norm(8), seen(3, 10, 10)),
        Case("depthwise", "depthwise", values(8, 1, 3, 3), values(8), norm(8), seen(8, 9, 9, low=0), "mse"),
        Case("pointwise", "conv", values(6, 8, 1, 1), values(6), None, seen(8, 5, 5), "moving_average"),
        Case("up", "transposed", values(4, 5, 2, 2), values(5), None, seen(4, 6, 6)),
        Case("volume", "conv3d", values(4, 2, 2, 3, 3), values(4), None, seen(2, 5, 5, 5), "mse"),
        Case("head", "linear", values(5, 12), values(5), None, seen(12)),
        Case("plain", "linear", values(3, 7), None, None, seen(7, low=500), "moving_average"),
    ]
    empty = result[2].weight.copy()
    empty[3] = 0.0  # a channel of zeros
    result[2] = replace(result[2], weight=empty)
    return result


def reference(case: Case) -> LayerParams:
    """Return the parameters of a case from the core alone."""
    plan = LayerPlan(case.name, case.kind, STRATEGIES["Quant_INT8-8"], case.range_method)
    statistics = Statistics()
    for batch in case.batches:
        statistics.update(batch, 1)
    scale, zero_point = activation_parameters(
        statistics, plan.strategy.activation, layer=case.name, method=case.range_method
    )
    layer = quantize_layer(FloatLayer(case.weight, case.bias, case.norm, case.axis), plan, scale, zero_point)
    bias = "bias" if layer.bias is not None else None
    return layer_params(
        layer, calls=[("node", "input")], weight_tensor="weight", weight_axis=case.axis, bias_tensor=bias
    )


def named_alike(found: LayerParams, wanted: LayerParams) -> LayerParams:
    """Return ``found`` with the names and the layout of ``wanted``; its numbers are its own."""
    tensors = {
        part: replace(getattr(found, part), tensor=getattr(wanted, part).tensor, axis=getattr(wanted, part).axis)
        for part in ("input", "weight")
    }
    bias = None
    if found.bias is not None:
        bias = replace(found.bias, tensor=wanted.bias.tensor if wanted.bias else "unexpected")
    return replace(found, name=wanted.name, node=wanted.node, op_type=wanted.op_type, bias=bias, **tensors)


def render(layers: list[LayerParams]) -> str:
    """Return the text of the golden file for these layers."""
    return render_params(QuantParams("model", tuple(layers)))


if __name__ == "__main__":
    FILE.write_text(render([reference(case) for case in cases()]), encoding="utf-8", newline="\n")
