"""Whether what runs is what was simulated: an export's float graph beside its integer form, layer by layer.

The integer form is that of the format ``onnx_qdq``, run by ONNX Runtime once as it stands and once with all graph
optimizations, where layers run in integer kernels. It needs the packages of the extra ``verify``.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from dopt_api.errors import FormatError
from dopt_api.files import StrPath
from dopt_api.formats import get_format
from dopt_api.formats.integer_nodes import NodeKind, nodes_of
from dopt_api.graphs import as_onnx, read_export
from dopt_api.integer_sums import convolution_sums, matrix_sums
from dopt_api.params import LayerParams, QuantParams
from dopt_api.quantizer import Statistics
from dopt_api.quantizer.histogram import Histogram, condensed
from dopt_api.quantizer.short_sums import overflowing, partners

__all__ = ["LayerCheck", "Verification", "verify"]

Feed = Mapping[str, NDArray[Any]]

MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits")


@dataclass(frozen=True)
class LayerCheck:
    """What quantization does at one layer.

    Attributes:
        name: The layer's name in the strategy file.
        sqnr_db: Signal to quantization noise of its output, in dB, with all layers before it quantized too.
        cosine: Cosine of its output and the float one.
        clipped: The share of its float inputs that lie beyond its range; 0 where the input stays float.
        hazard: The share of its output channels that have two neighbouring weights of one sign whose products with
            8-bit data can overflow the 16-bit sums of processors with AVX2 and without VNNI
            (:mod:`dopt_api.quantizer.short_sums`).
        off: How far its output, in the form as it stands, is from exact integer sums over the same quantized input, at
            most, for the first sample: in units of the accumulator (input scale times weight scale), or of float32's
            last place where that is coarser. 0: the exact sum, rounded. ``None`` where there are no such sums,
            as for transposed convolutions and float inputs.
        inputs: What its float inputs are like.
    """

    name: str
    sqnr_db: float
    cosine: float
    clipped: float
    hazard: float
    off: int | None = None
    inputs: Histogram | None = None


@dataclass(frozen=True)
class Verification:
    """What was found; layers in execution order.

    Attributes:
        layers: Each quantized layer.
        sqnr_db: Of the outputs of the integer form as it stands against float.
        cosine: Likewise.
        optimized_db: Of the outputs of the optimized form against float.
        kernels_db: Of the optimized form against the form as it stands: what the kernels change; infinite if nothing.
        kernels: How many nodes of each operator that multiplies the optimized form has, such as ``QLinearConv``.
        nodes: Which nodes run in integers, and why the others do not.
        reference_db: Of the outputs of the optimized form against the reference, where one was given.
    """

    layers: tuple[LayerCheck, ...]
    sqnr_db: float
    cosine: float
    optimized_db: float
    kernels_db: float
    kernels: Mapping[str, int]
    nodes: tuple[NodeKind, ...] = ()
    reference_db: float | None = None


def verify(
    params_file: StrPath,
    feeds: Iterable[Feed] | None = None,
    *,
    samples: int = 8,
    seed: int = 0,
    reference: StrPath | None = None,
) -> Verification:
    """Run an export in float and in integers over the same data and compare.

    Float is the exported graph, whose weights lie on their grids: the figures are what the activations lose. What the
    weights lose as well is seen against the float network itself, as ``reference``.

    Args:
        params_file: The ``quant_params.json`` of an export, with its model beside it.
        feeds: Arrays by input name, a mapping for each batch; by default made up, uniform over the ranges of the
            layers that take the inputs. A batch is cut where the model has a fixed batch size that divides it.
        samples: How many samples are made up.
        seed: Of what is made up.
        reference: An ONNX model of the float network, with the same inputs and outputs.

    Raises:
        ParamsError: The parameter file cannot be read, or is not that of the model.
        FormatError: The model is not ONNX, or does not run on the data.
    """
    with tempfile.TemporaryDirectory(prefix="dopt-verify-") as folder:
        model, params = as_onnx(*read_export(params_file), Path(folder))
        get_format("onnx_qdq")(model, params, Path(folder))
        integer = Path(folder) / f"{model.stem}.qdq.onnx"
        graph = onnx.load(str(model)).graph
        if feeds is None:
            data = [_made_up(graph, params, samples, seed)]
        else:
            data = [part for feed in feeds for part in _cut(graph, feed)]
        outputs = [_output_of(graph, layer) for layer in params.layers]
        taken = [layer.input.tensor for layer in params.layers]
        exact = _run(model, data, [*outputs, *taken])
        found = _run(integer, data, outputs)
        optimized_file = Path(folder) / "optimized.onnx"
        fast = _run(integer, data, [], optimized_file)
        kernels = _multiplying(onnx.load(str(optimized_file)))
        form = onnx.load(str(integer))
        hazards, nodes = _hazards(form, params), nodes_of(form, params)
        off = _off(integer, params, data[0])
        wanted = None if reference is None else _run(Path(reference), data, [])
    layers = tuple(
        LayerCheck(
            layer.name,
            *_alike(exact[edge], found[edge]),
            _clipped(exact[edge_in], layer),
            hazard,
            distance,
            _histogram(exact[edge_in]),
        )
        for layer, edge, edge_in, hazard, distance in zip(params.layers, outputs, taken, hazards, off, strict=True)
    )
    ends = [np.concatenate([run[name].reshape(-1) for name in exact[""]]) for run in (exact, found, fast)]
    sqnr_db, cosine = _alike(ends[0], ends[1])
    optimized_db, kernels_db = _alike(ends[0], ends[2])[0], _alike(ends[1], ends[2])[0]
    reference_db = None if wanted is None else _against(wanted, ends[2], Path(str(reference)))
    return Verification(layers, sqnr_db, cosine, optimized_db, kernels_db, kernels, nodes, reference_db)


def _run(file: Path, data: Sequence[Feed], edges: Sequence[str], optimized: Path | None = None) -> dict[str, Any]:
    """Return what the outputs and some edges have, over all data; the names of the outputs stand under ``""``."""
    names, batches = _batches(file, data, edges, optimized)
    found: dict[str, Any] = {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
    return {**found, "": names}


def _batches(
    file: Path, data: Sequence[Feed], edges: Sequence[str], optimized: Path | None = None
) -> tuple[list[str], list[dict[str, NDArray[Any]]]]:
    """Return the names of the outputs, and what these and some edges have in each batch."""
    model = onnx.load(str(file))
    names = [output.name for output in model.graph.output]
    given = {value.name for value in model.graph.input}
    more = [edge for edge in dict.fromkeys(edges) if edge not in names and edge not in given]
    model.graph.output.extend(onnx.ValueInfoProto(name=edge) for edge in more)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_DISABLE_ALL if optimized is None else level.ORT_ENABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        batches = [session.run([*names, *more], dict(feed)) for feed in data]
    except Exception as error:  # ONNX Runtime raises many kinds
        raise FormatError(
            f"ONNX Runtime does not run {file.name!r} on the data: {str(error).splitlines()[0]}",
            where=str(file),
            expected="arrays for every input of the model, of its shapes and types",
            fix="Give data of your own.",
        ) from error
    own = [{name: np.asarray(feed[name]) for name in given.intersection(edges)} for feed in data]
    return names, [
        {**dict(zip([*names, *more], batch, strict=True)), **inputs} for batch, inputs in zip(batches, own, strict=True)
    ]


def _against(wanted: Mapping[str, Any], found: NDArray[Any], reference: Path) -> float:
    """Return the signal to noise ratio of all outputs against those of a reference, in dB."""
    exact = np.concatenate([wanted[name].reshape(-1) for name in wanted[""]])
    if exact.size != found.size:
        raise FormatError(
            f"The outputs of the reference {reference.name!r} have {exact.size} numbers, the export's {found.size}",
            where=str(reference),
            expected="the float network of this export, with the same outputs",
            fix="Export the float network with the same outputs, in the same order.",
        )
    return _alike(exact, found)[0]


def _cut(graph: Any, feed: Feed) -> list[Feed]:
    """Return a batch in parts of the model's own batch size.

    Raises:
        FormatError: An input is missing, or its array has another shape.
    """
    constants = {tensor.name for tensor in graph.initializer}
    shapes = {
        value.name: [one.dim_value for one in value.type.tensor_type.shape.dim]  # 0 where it is open
        for value in graph.input
        if value.name not in constants
    }
    counts = set()
    for name, shape in shapes.items():
        given = None if name not in feed else np.shape(feed[name])
        fits = given is not None and len(given) == len(shape) and all(map(_fits, given[1:], shape[1:]))
        if given is None or not fits or (shape and shape[0] and given[0] % shape[0]):
            sizes = "x".join(str(size or "any") for size in shape)
            more = ", or a multiple of the first" if shape and shape[0] else ""
            raise FormatError(
                f"The data have {'no array' if given is None else f'an array of the shape {list(given)}'} for {name!r}",
                where=f"input {name!r} of the model",
                expected=f"an array of {sizes} numbers{more}",
                fix=f"Give an array for each of {', '.join(map(repr, shapes))}; dopt quantize --dynamic-batch leaves "
                "the batch size open.",
            )
        counts.add(given[0] // shape[0] if shape and shape[0] else 1)
    if counts <= {1}:
        return [feed]
    if len(counts) > 1:
        raise FormatError(
            "The arrays of the data have different numbers of batches",
            expected="as many samples in each",
            fix="Give arrays of one batch.",
        )
    parts = {name: np.array_split(np.asarray(feed[name]), max(counts)) for name in shapes}
    return [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]


def _fits(given: int, size: int) -> bool:
    return not size or given == size


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return all values, whatever the shapes of the batches."""
    return np.concatenate([np.asarray(part).reshape(-1) for part in parts])


def _made_up(graph: Any, params: QuantParams, samples: int, seed: int) -> Feed:
    generator = np.random.default_rng(seed)
    turned = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    ranges = {
        turned.get(layer.input.tensor, layer.input.tensor): layer.input
        for layer in params.layers
        if layer.input.quantized
    }
    feed = {}
    for value in graph.input:
        dimensions = [one.dim_value for one in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT or not all(dimensions[1:]):
            raise FormatError(
                f"Data for the input {value.name!r} cannot be made up",
                expected="float data of a shape that is fixed but for the batch",
                fix="Give data of your own.",
            )
        shape = [dimensions[0] or samples, *dimensions[1:]]
        part = ranges.get(value.name)
        if part is None:
            drawn = generator.standard_normal(shape)
        else:
            ends = [part.scale[0] * (end - part.zero_point[0]) for end in (0, (1 << part.bits) - 1)]
            drawn = generator.uniform(ends[0], ends[1], shape)
        feed[value.name] = drawn.astype(np.float32)
    return feed


def _output_of(graph: Any, layer: LayerParams) -> str:
    return next(str(node.output[0]) for node in graph.node if node.name == layer.node)


def _alike(exact: NDArray[Any], found: NDArray[Any]) -> tuple[float, float]:
    """Return the signal to noise ratio, in dB, and the cosine."""
    x, y = exact.astype(np.float64).reshape(-1), found.astype(np.float64).reshape(-1)
    signal, noise = float(x @ x), float((y - x) @ (y - x))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.inf if not noise else 10 * np.log10(np.float64(signal) / noise)
        cosine = 1.0 if not noise else x @ y / np.sqrt(signal * float(y @ y))
    return float(ratio), float(np.nan_to_num(cosine))


def _clipped(x: NDArray[Any], layer: LayerParams) -> float:
    if not layer.input.quantized:
        return 0.0
    scale, zero_point = layer.input.scale[0], layer.input.zero_point[0]
    steps = np.rint(x / np.float32(scale)) + zero_point
    return float(np.mean((steps < 0) | (steps > (1 << layer.input.bits) - 1))) if x.size else 0.0


def _histogram(x: NDArray[Any]) -> Histogram:
    statistics = Statistics()
    statistics.update(x.reshape(1, -1))
    return condensed(statistics)


def _off(integer: Path, params: QuantParams, feed: Feed) -> list[int | None]:
    """Return for each layer how far its output is from exact sums, in units of the coarser last place."""
    graph = onnx.load(str(integer)).graph
    nodes = {node.name: node for node in graph.node}
    makers = {edge: node for node in graph.node for edge in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    quantized_inputs = [layer for layer in params.layers if layer.input.quantized]
    if not quantized_inputs:
        return [None] * len(params.layers)
    decoders = {layer.name: makers[nodes[layer.node].input[0]] for layer in quantized_inputs}
    outputs = {layer.name: str(nodes[layer.node].output[0]) for layer in quantized_inputs}
    edges = [*(str(node.input[0]) for node in decoders.values()), *outputs.values()]
    sizes = {value.name: value.type.tensor_type.shape.dim[:1] for value in graph.input if value.name in feed}
    first = {
        name: np.asarray(feed[name])[: next((one.dim_value for one in size), 1) or 1] for name, size in sizes.items()
    }
    _, (values,) = _batches(integer, [first], edges)
    found: list[int | None] = []
    for layer in params.layers:
        if not layer.input.quantized:
            found.append(None)
            continue
        quantized, decoder = values[decoders[layer.name].input[0]], decoders[layer.name]
        x = quantized.astype(np.int64) - int(numpy_helper.to_array(constants[decoder.input[2]]))
        sums = _sums(nodes[layer.node], x, layer, constants)
        if sums is None:
            found.append(None)
            continue
        axis = 1 if nodes[layer.node].op_type == "Conv" else -1
        shape = [1] * sums.ndim
        shape[axis] = -1
        units = np.float64(np.float32(layer.input.scale[0])) * np.asarray(layer.weight.scale, np.float32)
        wanted = sums * units.reshape(shape)
        place = np.maximum(units.reshape(shape), np.spacing(np.abs(wanted).astype(np.float32)))
        found.append(int(np.rint(np.abs(values[outputs[layer.name]] - wanted) / place).max(initial=0)))
    return found


def _sums(
    node: Any, x: NDArray[np.int64], layer: LayerParams, constants: Mapping[str, Any]
) -> NDArray[np.int64] | None:
    """Return the exact sums of a layer's node, with its bias; ``None`` for what no export writes."""
    weight = numpy_helper.to_array(constants[f"{layer.weight.tensor}/dopt/integers"])
    options = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    usual = {"auto_pad": b"NOTSET", "transA": 0, "alpha": 1.0, "beta": 1.0}
    if any(options.get(name, value) != value for name, value in usual.items()):
        return None
    if node.op_type == "Conv":
        axes = x.ndim - 2
        sums = convolution_sums(
            x,
            weight,
            pads=options.get("pads", [0] * 2 * axes),
            strides=options.get("strides", [1] * axes),
            dilations=options.get("dilations", [1] * axes),
            groups=options.get("group", 1),
        )
    elif node.op_type in ("Gemm", "MatMul"):
        sums = matrix_sums(x, weight.T if options.get("transB") else weight)
    else:
        return None
    if len(node.input) > 2 and layer.bias is not None:
        bias = numpy_helper.to_array(constants[f"{layer.bias.tensor}/dopt/integers"]).astype(np.int64)
        sums += bias.reshape(-1, *[1] * (x.ndim - 2)) if node.op_type == "Conv" else bias
    return sums


def _hazards(model: Any, params: QuantParams) -> list[float]:
    """Return for each layer the share of channels in which a pair of neighbouring weights can overflow."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    found = []
    for layer in params.layers:
        if not layer.input.quantized:
            found.append(0.0)
            continue
        integers = numpy_helper.to_array(stored[f"{layer.weight.tensor}/dopt/integers"]).astype(np.int64)
        node = nodes[layer.node]
        groups = next((one.i for one in node.attribute if one.name == "group"), 1) if node.op_type == "Conv" else 1
        rows = np.moveaxis(integers, layer.weight.axis or 0, 0)
        outputs, channels = len(rows), 1 if rows.ndim < 2 else rows.shape[1]
        rows = rows.reshape(outputs, -1)
        taps = rows.shape[1] // channels
        pairs = partners(groups, outputs // groups, channels, taps, channels_last=False)
        hazard = 0.0 if pairs is None or layer.input.bits != 8 else float(overflowing(rows, pairs).mean())
        found.append(hazard)
    return found


def _multiplying(model: Any) -> dict[str, int]:
    kinds = Counter(node.op_type for node in model.graph.node)
    return {kind: count for kind, count in sorted(kinds.items()) if kind.endswith(MULTIPLYING)}
