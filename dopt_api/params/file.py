"""The parameter file ``quant_params.json``: scales and zero points of every quantized layer.

Its JSON Schema is published beside this module as ``quant_params.schema.json``. Numbers are written with the fewest
digits that read back to the same float32.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from dopt_api._version import __version__
from dopt_api.errors import ParamsError
from dopt_api.files import StrPath
from dopt_api.params.layers import QuantizedLayer
from dopt_api.quantizer.grid import Grid

__all__ = [
    "FORMAT",
    "VERSION",
    "BiasParams",
    "LayerParams",
    "QuantParams",
    "TensorParams",
    "layer_params",
    "read_params",
    "render_params",
]

FORMAT = "dopt.quant_params"
VERSION = 1

FLOAT_INPUT: tuple[str, int, tuple[float, ...], tuple[int, ...], None] = ("float32", 32, (), (), None)
"""Type, bits, scale, zero point and axis of an input that is not quantized."""

TOO_SMALL, TOO_LARGE = 2.0**-150, 2.0**128 - 2.0**103
"""The numbers between these two, exclusive, round to a positive finite float32."""


@dataclass(frozen=True)
class TensorParams:
    """How one tensor of the written graph is quantized.

    Attributes:
        tensor: Name of an initializer or an edge of the graph.
        dtype: ``uint8``, ``int8`` ...; ``float32`` of an input that is not quantized.
        bits: Width of the integers, or 32 of such an input.
        scale: Float32 values as Python floats: one, or one per channel of ``axis``, or one for each group of weights,
            those of a channel one after the other; none of such an input.
        zero_point: As many integers.
        axis: The channel axis of the tensor as it stands in the graph, or ``None``.
        group: How many weights of a channel, one after the other, share a scale; all of them if ``None``.
    """

    tensor: str
    dtype: str
    bits: int
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None
    group: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether it is quantized at all."""
        return bool(self.scale)


@dataclass(frozen=True)
class BiasParams:
    """How a bias is quantized: zero point 0, ``scale`` one value per output channel."""

    tensor: str
    dtype: str
    scale: tuple[float, ...]


@dataclass(frozen=True)
class LayerParams:
    """The parameters of one layer.

    Attributes:
        name: The layer's name in the strategy file.
        node: The node of the written graph that computes it; for a layer that is called several times, the first.
        op_type: The layer's kind.
        strategy: Its strategy.
        input: Quantization of its input.
        weight: Quantization of its weight.
        bias: Quantization of its bias, or ``None`` without one.
        other_calls: Further ``(node, input edge)`` pairs of a layer that is called several times.
        output: Quantization of its output, where that was recorded. The tensor is the edge after which it is
            quantized: the layer's own, or that of the rectifier that alone reads it.
        other_outputs: The edges after which the outputs of the other calls are quantized, on the same grid.
    """

    name: str
    node: str
    op_type: str
    strategy: str
    input: TensorParams
    weight: TensorParams
    bias: BiasParams | None
    other_calls: tuple[tuple[str, str], ...] = ()
    output: TensorParams | None = None
    other_outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantParams:
    """A whole parameter file: the graph's file name and the quantized layers in execution order."""

    model: str
    layers: tuple[LayerParams, ...]


def layer_params(
    layer: QuantizedLayer,
    *,
    calls: Sequence[tuple[str, str]],
    weight_tensor: str,
    weight_axis: int,
    bias_tensor: str | None,
    outputs: Sequence[str] = (),
) -> LayerParams:
    """Return the entry of a quantized layer.

    Args:
        layer: The layer.
        calls: ``(node, input edge)`` for each place of the graph that computes the layer, in execution order.
        weight_tensor: The weight's initializer.
        weight_axis: The output channels' axis of that initializer.
        bias_tensor: The bias's initializer, or ``None``.
        outputs: The edge after which each call's output is quantized, for a layer whose output is recorded.
    """
    activation, weight = layer.plan.strategy.activation, layer.plan.strategy.weight
    (node, edge), *others = calls
    made, *others_made = outputs if layer.output_scale is not None else ("",)
    return LayerParams(
        name=layer.plan.name,
        node=node,
        op_type=layer.plan.op_type,
        strategy=layer.plan.strategy.name,
        input=TensorParams(edge, *FLOAT_INPUT)
        if activation is None or layer.input_scale is None
        else _activation(edge, activation, layer.input_scale, layer.input_zero_point),
        weight=TensorParams(
            weight_tensor,
            weight.dtype,
            weight.bits,
            _floats(layer.weight_scale),
            tuple(layer.weight_zero_point.ravel().tolist()),
            weight_axis if weight.per_channel else None,
            weight.group,
        ),
        bias=None
        if bias_tensor is None or layer.bias_scale is None
        else BiasParams(bias_tensor, "int32", _floats(layer.bias_scale)),
        other_calls=tuple(others),
        output=None
        if activation is None or layer.output_scale is None
        else _activation(made, activation, layer.output_scale, layer.output_zero_point),
        other_outputs=tuple(others_made),
    )


def _activation(edge: str, grid: Grid, scale: np.float32, zero_point: int) -> TensorParams:
    return TensorParams(edge, grid.dtype, grid.bits, _floats(scale), (zero_point,), None)


def render_params(params: QuantParams) -> str:
    """Return the text of a parameter file; equal parameters give equal text, to the byte."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "producer": {"name": "dopt", "version": __version__},
        "model": params.model,
    }
    lines = ["{", *(f" {_json(key)}: {_json(value)}," for key, value in head.items()), ' "layers": [']
    for number, layer in enumerate(params.layers):
        entry = asdict(layer)
        for key in ("other_calls", "output", "other_outputs"):
            if not entry[key]:
                del entry[key]
        for role in ("input", "weight", "output"):
            if role in entry and entry[role]["group"] is None:
                del entry[role]["group"]
        body = ",\n".join(f"   {_json(key)}: {_json(value)}" for key, value in entry.items())
        lines += ["  {", body, "  }" if number + 1 == len(params.layers) else "  },"]
    return "\n".join([*lines, " ]", "}"]) + "\n"


def read_params(path: StrPath) -> QuantParams:
    """Read and check a parameter file.

    Raises:
        ParamsError: The file is missing or does not follow the format; the message names the place.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "quant_params.json"
        ...     _ = file.write_text(render_params(QuantParams("model.onnx", ())))
        ...     read_params(file)
        QuantParams(model='model.onnx', layers=())
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParamsError(
            f"The parameter file {str(file)!r} cannot be read: {error.strerror or error}",
            where=str(file.absolute()),
            fix="Check the path; an export writes quant_params.json beside the model.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise ParamsError(
            f"The parameter file {str(file)!r} is not JSON: {error}", where=str(file), fix="Export the model again."
        ) from error
    top = _Reader(file, "", content)
    if top.text("format") != FORMAT:
        top.refuse("format", f"{FORMAT!r}")
    if top.integer("version") != VERSION:
        top.refuse("version", f"{VERSION}; a newer dopt reads newer files")
    producer = top.child("producer")
    producer.text("name"), producer.text("version")
    layers = tuple(_read_layer(entry) for entry in top.children("layers"))
    return QuantParams(top.text("model"), layers)


def _read_layer(entry: _Reader) -> LayerParams:
    entry.only(LayerParams)
    layer = LayerParams(
        name=entry.text("name"),
        node=entry.text("node"),
        op_type=entry.text("op_type"),
        strategy=entry.text("strategy"),
        input=_read_input(entry.child("input")),
        weight=_read_tensor(entry.child("weight")),
        bias=None if entry.is_null("bias") else _read_bias(entry.child("bias")),
        other_calls=entry.pairs("other_calls") if "other_calls" in entry.content else (),
        output=_read_output(entry.child("output")) if "output" in entry.content else None,
        other_outputs=entry.texts("other_outputs") if "other_outputs" in entry.content else (),
    )
    if layer.output is None and "other_outputs" in entry.content:
        entry.refuse("other_outputs", "no such key without an 'output'")
    if layer.output is not None and len(layer.other_outputs) != len(layer.other_calls):
        entry.refuse("other_outputs", f"{len(layer.other_calls)} edges, as many as there are other calls")
    return layer


def _read_output(entry: _Reader) -> TensorParams:
    output = _read_tensor(entry)
    if output.axis is not None or len(output.scale) != 1:
        entry.refuse("axis", "null, and one scale: an output is quantized as a whole")
    return output


def _read_input(entry: _Reader) -> TensorParams:
    if entry.content.get("dtype") != FLOAT_INPUT[0]:
        return _read_tensor(entry)
    entry.only(TensorParams)
    for key, wanted in zip(("bits", "scale", "zero_point", "axis"), FLOAT_INPUT[1:], strict=True):
        value = list(wanted) if isinstance(wanted, tuple) else wanted
        if key not in entry.content or entry.content[key] != value:
            entry.refuse(key, f"{json.dumps(value)}, as the input is float")
    return TensorParams(entry.text("tensor"), *FLOAT_INPUT)


def _read_tensor(entry: _Reader) -> TensorParams:
    entry.only(TensorParams)
    scale, zero_point = entry.scales("scale"), entry.integers("zero_point")
    if len(scale) != len(zero_point):
        entry.refuse("zero_point", f"{len(scale)} integers, as many as there are scales")
    if not re.fullmatch("u?int[0-9]+", entry.text("dtype")):
        entry.refuse("dtype", "the name of an integer type, such as 'uint8'")
    if not 2 <= entry.integer("bits") <= 16:
        entry.refuse("bits", "2 to 16")
    axis = None if entry.is_null("axis") else entry.integer("axis")
    group = entry.integer("group") if "group" in entry.content else None
    if group is not None and (group < 1 or axis is None):
        entry.refuse("group", "a positive number, of a tensor with an axis")
    return TensorParams(
        entry.text("tensor"), entry.text("dtype"), entry.integer("bits"), scale, zero_point, axis, group
    )


def _read_bias(entry: _Reader) -> BiasParams:
    entry.only(BiasParams)
    if entry.text("dtype") != "int32":
        entry.refuse("dtype", "'int32'")
    return BiasParams(entry.text("tensor"), entry.text("dtype"), entry.scales("scale"))


class _Reader:
    """An object of the file together with its place, for messages.

    It refuses what the JSON Schema refuses, and lists of unequal lengths, which a schema cannot express.
    """

    def __init__(self, file: Path, place: str, content: object) -> None:
        self.file, self.place = file, place
        if not isinstance(content, Mapping):
            raise ParamsError(
                f"{place or 'The file'} is not an object",
                where=f"{file}, {place}" if place else str(file),
                expected="a JSON object",
                fix="Export the model again.",
            )
        self.content: Mapping[str, Any] = content

    def refuse(self, key: str, expected: str) -> NoReturn:
        place = f"{self.place}.{key}".lstrip(".")
        found = reprlib.repr(self.content[key]) if key in self.content else "missing"
        raise ParamsError(
            f"{place} is {found}", where=f"{self.file}, {place}", expected=expected, fix="Export the model again."
        )

    def only(self, kind: type) -> None:
        """Refuse keys that are no fields of the dataclass ``kind``."""
        known = [field.name for field in fields(kind)]
        for key in self.content:
            if key not in known:
                self.refuse(key, f"no other keys than {', '.join(known)}")

    def get(self, key: str) -> Any:
        return self.content.get(key)

    def is_null(self, key: str) -> bool:
        return key in self.content and self.content[key] is None

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def integer(self, key: str) -> int:
        if not _is_whole(self.get(key)):
            self.refuse(key, "a whole number")
        return int(self.get(key))

    def integers(self, key: str) -> tuple[int, ...]:
        values = self.get(key)
        if not isinstance(values, list) or not all(map(_is_whole, values)):
            self.refuse(key, "a list of whole numbers")
        return tuple(map(int, values))

    def scales(self, key: str) -> tuple[float, ...]:
        values = self.get(key)
        if not isinstance(values, list) or not values or not all(map(_is_scale, values)):
            self.refuse(key, "a list of positive numbers within float32")
        return _floats(values)

    def pairs(self, key: str) -> tuple[tuple[str, str], ...]:
        values = self.get(key)
        if not isinstance(values, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in values
        ):
            self.refuse(key, "a list of [node, input edge]")
        return tuple((node, edge) for node, edge in values)

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.get(key)
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            self.refuse(key, "a list of strings")
        return tuple(values)

    def child(self, key: str) -> _Reader:
        return _Reader(self.file, f"{self.place}.{key}".lstrip("."), self.get(key))

    def children(self, key: str) -> list[_Reader]:
        values = self.get(key)
        if not isinstance(values, list):
            self.refuse(key, "a list")
        return [_Reader(self.file, f"{self.place}.{key}[{i}]".lstrip("."), v) for i, v in enumerate(values)]


def _is_whole(value: object) -> bool:
    """Return whether JSON Schema calls the value an integer: 8 and 8.0 are, true is not."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _is_scale(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 2**128 and TOO_SMALL < float(value) < TOO_LARGE  # type: ignore[operator,arg-type]  # it is a number


def _floats(values: ArrayLike) -> tuple[float, ...]:
    return tuple(_shortest(value) for value in np.asarray(values, np.float32).ravel())


def _shortest(value: np.float32) -> float:
    """Return the float64 of fewest digits that rounds to the float32 ``value``."""
    short = float(str(value))
    return short if np.float32(short) == value else float(value)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
