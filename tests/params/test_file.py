"""The parameter file: equal to the byte for equal parameters, read back to the bit, and refused where it is wrong."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from typing import Any

import jsonschema
import numpy as np
import pytest
from dopt_strategies import names
from hypothesis import given
from hypothesis import strategies as st

from dopt_api import __version__
from dopt_api.errors import ParamsError
from dopt_api.params import (
    BiasParams,
    FloatLayer,
    LayerParams,
    QuantParams,
    TensorParams,
    layer_params,
    quantize_layer,
    read_params,
    render_params,
)
from dopt_api.params.file import FLOAT_INPUT
from dopt_api.quantizer import Grid
from dopt_api.strategy import STRATEGIES, Strategy
from dopt_api.types import LayerPlan

F32 = np.float32
SCHEMA = json.loads((resources.files("dopt_api.params") / "quant_params.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

every_scale = st.floats(2.0**-149, float(np.finfo(F32).max), width=32)


@st.composite
def tensors(draw: st.DrawFn) -> TensorParams:
    scale = draw(st.lists(every_scale, min_size=1, max_size=4))
    zero_point = draw(st.lists(st.integers(-32768, 65535), min_size=len(scale), max_size=len(scale)))
    bits = draw(st.integers(2, 16))
    axis = draw(st.none() | st.integers(-4, 4))
    group = None if axis is None else draw(st.none() | st.integers(1, 64))
    return TensorParams(draw(names), f"uint{bits}", bits, tuple(scale), tuple(zero_point), axis, group)


@st.composite
def layers_with_outputs(draw: st.DrawFn) -> LayerParams:
    layer, part = draw(layers), draw(tensors())
    output = replace(part, scale=part.scale[:1], zero_point=part.zero_point[:1], axis=None, group=None)
    return replace(layer, output=output, other_outputs=tuple(f"{edge}/made" for _, edge in layer.other_calls))


layers = st.builds(
    LayerParams,
    name=names,
    node=names,
    op_type=names,
    strategy=names,
    input=tensors() | st.builds(TensorParams, names, *map(st.just, FLOAT_INPUT)),
    weight=tensors(),
    bias=st.none() | st.builds(BiasParams, names, st.just("int32"), st.lists(every_scale, min_size=1).map(tuple)),
    other_calls=st.lists(st.tuples(names, names), max_size=2).map(tuple),
)
files = st.builds(QuantParams, names, st.lists(layers | layers_with_outputs(), max_size=3).map(tuple))


def example() -> dict[str, Any]:
    """Return the content of a file with every part that there can be."""
    plan = LayerPlan("conv1/Conv2D", "Conv2D", STRATEGIES["Quant_INT8-8"], output=True)
    source = FloatLayer(np.array([[1.0], [2.0]]), np.array([0.5, 0.25]), None, 0)
    layer = quantize_layer(source, plan, F32(0.1), 128, output_scale=F32(0.2), output_zero_point=7)
    calls, outputs = [("/conv1/Conv", "x"), ("/conv1_1/Conv", "y")], ["/conv1/made", "/conv1_1/made"]
    entry = layer_params(
        layer, calls=calls, weight_tensor="conv1.weight", weight_axis=0, bias_tensor="conv1.bias", outputs=outputs
    )
    plan = LayerPlan("fc/Linear", "Linear", STRATEGIES["Quant_FLOAT-4A-G32"])
    alone = quantize_layer(FloatLayer(np.linspace(-1, 2, 64)[None], np.array([0.5]), None, 0), plan, None)
    grouped = layer_params(
        alone, calls=[("/fc/Gemm", "z")], weight_tensor="fc.weight", weight_axis=0, bias_tensor="fc.bias"
    )
    return json.loads(render_params(QuantParams("model.onnx", (entry, grouped))))


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a file with the given content."""

    def read(content: object) -> QuantParams:
        path = tmp_path / "quant_params.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return read_params(path)

    return read


# ---- round trip


@given(params=files)
def test_reading_what_was_written_gives_the_same_to_the_bit(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("params") / "quant_params.json"
    path.write_text(render_params(params), encoding="utf-8")
    back = read_params(path)
    path.write_text(render_params(back), encoding="utf-8")
    assert read_params(path) == back
    assert back.model == params.model
    for ours, theirs in zip(params.layers, back.layers, strict=True):
        assert ours.other_calls == theirs.other_calls
        assert (ours.output is None, ours.other_outputs) == (theirs.output is None, theirs.other_outputs)
        pairs = [(ours.input, theirs.input), (ours.weight, theirs.weight), (ours.output, theirs.output)]
        for first, second in pairs[: 2 if ours.output is None else 3]:
            assert np.array(first.scale, F32).tobytes() == np.array(second.scale, F32).tobytes()
            assert first.zero_point == second.zero_point
            for field in ("tensor", "dtype", "bits", "axis", "group", "quantized"):
                assert getattr(first, field) == getattr(second, field)
        if ours.bias is not None:
            assert np.array(ours.bias.scale, F32).tobytes() == np.array(theirs.bias.scale, F32).tobytes()
        assert (ours.bias is None) == (theirs.bias is None)


@given(st.lists(every_scale, min_size=1, max_size=8))
def test_scales_have_the_fewest_digits_that_read_back_to_the_same_float32(learned):
    plan = LayerPlan("fc", "Linear", STRATEGIES["Quant_INT8-8"])
    weight = FloatLayer(np.zeros((len(learned), 1)), None, None, 0)
    layer = replace(quantize_layer(weight, plan, F32(learned[0]), 0), weight_scale=np.array(learned, F32))
    entry = layer_params(layer, calls=[("n", "x")], weight_tensor="w", weight_axis=0, bias_tensor=None)
    text = render_params(QuantParams("m", (entry,)))
    written = json.loads(text)["layers"][0]["weight"]["scale"]
    assert np.array(written, F32).tobytes() == np.array(learned, F32).tobytes()
    for value, number in zip(learned, entry.weight.scale, strict=True):
        digits = len(repr(number).split("e")[0].replace(".", "").strip("0"))
        assert digits <= 9
        assert digits == 1 or F32(f"{value:.{digits - 2}e}") != F32(value)


@given(files)
def test_equal_parameters_give_equal_text_that_the_schema_accepts(params):
    text = render_params(params)
    assert text == render_params(copy.deepcopy(params))
    VALIDATOR.validate(json.loads(text))


def test_rendered_text_is_as_documented():
    entry = LayerParams(
        "fc/Linear",
        "/fc/Gemm",
        "Linear",
        "Quant_INT8-8",
        TensorParams("x", "uint8", 8, (0.1,), (128,), None),
        TensorParams("fc.weight", "int8", 8, (0.5, 1e-45), (0, 0), 0),
        None,
    )
    assert render_params(QuantParams("模型.onnx", (entry,))) == (
        "{\n"
        ' "format": "dopt.quant_params",\n'
        ' "version": 1,\n'
        f' "producer": {{"name": "dopt", "version": "{__version__}"}},\n'
        ' "model": "模型.onnx",\n'
        ' "layers": [\n'
        "  {\n"
        '   "name": "fc/Linear",\n'
        '   "node": "/fc/Gemm",\n'
        '   "op_type": "Linear",\n'
        '   "strategy": "Quant_INT8-8",\n'
        '   "input": {"tensor": "x", "dtype": "uint8", "bits": 8, "scale": [0.1], "zero_point": [128], "axis": null},\n'
        '   "weight": {"tensor": "fc.weight", "dtype": "int8", "bits": 8, "scale": [0.5, 1e-45], '
        '"zero_point": [0, 0], "axis": 0},\n'
        '   "bias": null\n'
        "  }\n"
        " ]\n"
        "}\n"
    )


def test_nan_is_never_written():
    entry = LayerParams(
        "a", "n", "o", "s", *[TensorParams("x", "uint8", 8, (float("nan"),), (0,), None)] * 2, bias=None
    )
    with pytest.raises(ValueError, match="JSON compliant"):
        render_params(QuantParams("m", (entry,)))


# ---- from a quantized layer to its entry


def test_an_entry_says_what_the_layer_has():
    entry = example()["layers"][0]
    assert entry["name"] == "conv1/Conv2D"
    assert (entry["node"], entry["other_calls"]) == ("/conv1/Conv", [["/conv1_1/Conv", "y"]])
    assert entry["input"] == {
        "tensor": "x",
        "dtype": "uint8",
        "bits": 8,
        "scale": [0.1],
        "zero_point": [128],
        "axis": None,
    }
    scale = [float(str(F32(1 / 127))), float(str(F32(2 / 127)))]
    assert entry["weight"] == {
        "tensor": "conv1.weight",
        "dtype": "int8",
        "bits": 8,
        "scale": scale,
        "zero_point": [0, 0],
        "axis": 0,
    }
    assert entry["bias"] == {
        "tensor": "conv1.bias",
        "dtype": "int32",
        "scale": [float(str(F32(0.1) * F32(value))) for value in scale],
    }
    assert entry["output"] == {
        "tensor": "/conv1/made",
        "dtype": "uint8",
        "bits": 8,
        "scale": [0.2],
        "zero_point": [7],
        "axis": None,
    }
    assert entry["other_outputs"] == ["/conv1_1/made"]
    assert "output" not in example()["layers"][1]


def test_a_per_tensor_weight_has_no_axis():
    grid = Grid(8, signed=True, symmetric=True, narrow=True)
    plan = LayerPlan("fc", "Linear", Strategy("other", Grid(8), grid))
    layer = quantize_layer(FloatLayer(np.ones((2, 2)), None, None, 0), plan, F32(1), 0)
    entry = layer_params(layer, calls=[("n", "x")], weight_tensor="w", weight_axis=1, bias_tensor="unused")
    assert entry.weight.axis is None
    assert len(entry.weight.scale) == len(entry.weight.zero_point) == 1
    assert entry.bias is None


# ---- errors


def test_a_missing_file(tmp_path):
    with pytest.raises(ParamsError, match=r"cannot be read: No such file.*an export writes") as caught:
        read_params(tmp_path / "no.json")
    assert caught.value.where == str(tmp_path / "no.json")


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "1" * 5000, b"\xff\xfe"])
def test_what_is_not_json(read, content):
    with pytest.raises(ParamsError, match=r"quant_params\.json' is not JSON"):
        read(content)


@pytest.mark.parametrize("content", ["[]", "null", "1", '"text"'])
def test_what_is_not_an_object(read, content):
    with pytest.raises(ParamsError, match="The file is not an object"):
        read(content)


REMOVE = object()

WRONG = [
    (["format"], "other", "format is 'other'"),
    (["version"], 2, "version is 2.*a newer dopt reads newer files"),
    (["version"], True, "version is True"),
    (["model"], REMOVE, "model is missing"),
    (["producer"], {"name": "dopt"}, "producer.version is missing"),
    (["producer"], [], "producer is not an object"),
    (["layers"], {}, "layers is {}.*a list"),
    (["layers", 1], "text", r"layers\[1\] is not an object"),
    (["layers", 1, "name"], 3, r"layers\[1\].name is 3.*a string"),
    (["layers", 1, "nam"], "x", r"layers\[1\].nam is 'x'.*no other keys than name, node"),
    (["layers", 0, "input"], REMOVE, r"layers\[0\].input is not an object"),
    (["layers", 0, "input", "scale"], [], r"layers\[0\].input.scale is \[\]"),
    (["layers", 0, "input", "scale"], [0], r"layers\[0\].input.scale is \[0\].*positive numbers within float32"),
    (["layers", 0, "input", "scale"], [1e-46], "input.scale is .1e-46."),
    (["layers", 0, "input", "scale"], [3.5e38], "input.scale is .3.5e.38."),
    (["layers", 0, "input", "scale"], [10**400], "input.scale is "),
    (["layers", 0, "input", "scale"], [float("nan")], "input.scale is .nan."),
    (["layers", 0, "input", "scale"], [float("inf")], "input.scale is .inf."),
    (["layers", 0, "input", "zero_point"], [0, 0], "zero_point is .0, 0.*1 integers, as many as there are scales"),
    (["layers", 0, "input", "zero_point"], [0.5], "zero_point is .0.5.*whole numbers"),
    (["layers", 0, "weight", "axis"], "0", "weight.axis is '0'.*a whole number"),
    (["layers", 0, "weight", "axis"], REMOVE, "weight.axis is missing"),
    (["layers", 0, "weight", "bits"], 64, "weight.bits is 64.*2 to 16"),
    (["layers", 0, "weight", "dtype"], "float8", "weight.dtype is 'float8'"),
    (["layers", 0, "bias", "dtype"], "int8", "bias.dtype is 'int8'.*'int32'"),
    (["layers", 0, "bias"], 7, r"layers\[0\].bias is not an object"),
    (["layers", 0, "bias"], REMOVE, r"layers\[0\].bias is not an object"),
    (["layers", 0, "output"], None, r"layers\[0\].output is not an object"),
    (["layers", 0, "output"], REMOVE, "other_outputs is .*no such key without an 'output'"),
    (["layers", 0, "output", "axis"], 0, "output.axis is 0.*an output is quantized as a whole"),
    (["layers", 0, "output", "scale"], [0.5, 0.5], "output.zero_point is"),
    (["layers", 0, "other_outputs"], ["a", "b"], "other_outputs is .*1 edges, as many as there are other calls"),
    (["layers", 0, "other_outputs"], [7], "other_outputs is .7.*a list of strings"),
    (["layers", 0, "other_calls"], 5, "other_calls is 5"),
    (["layers", 0, "other_calls"], [["a"]], "other_calls is .*a list of .node, input edge."),
]


def mutated(path: list[Any], value: object) -> dict[str, Any]:
    content = example()
    parent: Any = content
    for key in path[:-1]:
        parent = parent[key]
    if value is REMOVE:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return content


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_errors_name_the_file_and_the_place(read, path, value, message):
    with pytest.raises(ParamsError, match=message) as caught:
        read(mutated(path, value))
    assert "quant_params.json" in caught.value.where
    assert caught.value.expected
    assert caught.value.fix


# ---- the schema and the reader are of one mind


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * bool(path) + [place for key, child in children for place in places(child, (*path, key))]


VALUES = [
    None, True, 0, 1, -1, 8, 8.0, 17, 2.5, 10**400, 1e-46, 1e-45, 3.4e38, 3.5e38, "", "x", "int8", "int32", [], {}, [1],
    [0.5, 0.25], ["a", "b"], [["a", "b"]], [["a", 1]], {"tensor": "x"}, 32, "float32",
]  # fmt: skip


@given(st.sampled_from(places(example())), st.sampled_from([REMOVE, *VALUES]) | st.floats(0.0), st.booleans())
def test_reader_and_schema_agree(tmp_path_factory, place, value, add):
    if add and isinstance(place[-1], str) and value is not REMOVE:
        place = (*place[:-1], place[-1] + "s")  # an unknown key
    content = mutated(list(place), value)
    path = tmp_path_factory.mktemp("params") / "quant_params.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    if VALIDATOR.is_valid(content):
        with suppress_unequal_lengths():
            read_params(path)
    else:
        with pytest.raises(ParamsError):
            read_params(path)


@contextmanager
def suppress_unequal_lengths():
    """Let pass the errors that no schema can express."""
    try:
        yield
    except ParamsError as error:
        if "as many as there are" not in error.expected:
            raise
