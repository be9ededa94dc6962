"""The strategy file: JSON that says which layers of a model are quantized, and how.

Only ``layer_strategy`` and ``input_shape`` are parsed; every other key is a hint for people. A ``"//"`` key is a
comment anywhere in the file.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dopt_api.errors import ConfigError, closest
from dopt_api.files import StrPath, write_text
from dopt_api.quantizer.ranges import DEFAULT_RANGE, range_method_names
from dopt_api.strategy import FLOAT, Strategy, find_strategy
from dopt_api.types import InputSpec, LayerInfo, LayerPlan, ModelLayers, Plan

__all__ = ["StrategyFile", "assign", "check", "parse_input_shape", "read", "records_output", "write"]

COMMENT = "//"
LAYER_KEYS = ("op_type", "quant_strategy", "range", "output")
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")

_FULL_WIDTH = {
    "\uff0c": ",",
    "\uff1a": ":",
    "\u201c": '"',
    "\u201d": '"',
    "\uff02": '"',
    "\uff5b": "{",
    "\uff5d": "}",
    "\u3010": "[",
    "\u3011": "]",
    "\u3000": "space",
    "\u00a0": "space",
    "\u3001": ",",
}


@dataclass(frozen=True)
class StrategyFile:
    """A strategy file as read, not yet checked against a model.

    Attributes:
        path: Where it was read from.
        text: The file's text, kept to name lines in messages.
        input_shape: The text of ``input_shape``, or ``None``.
        layers: The entries of ``layer_strategy`` without comments, in the order of the file.
    """

    path: Path
    text: str
    input_shape: str | None
    layers: Mapping[str, Mapping[str, Any]]

    def where(self, *path: str) -> str:
        """Return ``"file, line N"`` for the key that these keys lead to, or the file alone."""
        line = self._lines.get(path)
        return str(self.path) if line is None else f"{self.path}, line {line}"

    @cached_property
    def _lines(self) -> dict[tuple[str, ...], int]:
        return {path: line for _, path, line in _keys(self.text)}


def write(path: StrPath, found: ModelLayers, input_shape: str | None = None) -> Path:
    """Write the strategy file of a model, every layer ``float``.

    Args:
        path: The file to write; its folder must exist.
        found: What the backend found in the model.
        input_shape: The contract's text of the input shapes, where the backend has one.

    Raises:
        OutputError: The file cannot be written.
    """
    content: dict[str, Any] = {}
    for layer in found.layers:
        names = content.setdefault(f"quant_strategy_for op '{layer.op_type}'", [])
        names.extend(name for name in layer.offered if name not in names)
    if input_shape is not None:
        content["input_shape"] = input_shape
    content["layer_strategy"] = {
        layer.name: {"op_type": layer.op_type, "quant_strategy": FLOAT} for layer in found.layers
    }
    content["not_quantizable"] = {
        layer.name: {"op_type": layer.op_type, "reason": layer.reason} for layer in found.not_quantizable
    }
    if found.notes:
        content["notes"] = list(found.notes)
    return write_text(path, _rendered(content))


def read(path: StrPath) -> StrategyFile:
    """Read a strategy file.

    Raises:
        ConfigError: The file is missing, is no JSON, repeats a key, or has no ``layer_strategy``. A syntax error
            names file, line and column and shows the line.
    """
    file = Path(path)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"The strategy file {str(file)!r} cannot be read: {error.strerror or error}",
            where=str(file.absolute()),
            fix="Check the path, or write a new file with generate_config_file.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The strategy file {str(file)!r} is not UTF-8 text (byte {error.start})",
            where=str(file.absolute()),
            fix="Save it in the editor with the encoding UTF-8.",
        ) from error
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise _syntax_error(file, text, error) from None
    except _RepeatedKeyError:
        key, line = _repeated_key(text)
        raise ConfigError(
            f"The key {key!r} stands twice in the same object",
            where=f"{file}, line {line}",
            fix="Remove one of the two.",
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise ConfigError(
            f"The strategy file {str(file)!r} cannot be read as JSON: {error}",
            where=str(file),
            fix="Write a new file with generate_config_file and edit that.",
        ) from error
    layers = content.get("layer_strategy") if isinstance(content, dict) else None
    if not isinstance(layers, dict):
        raise ConfigError(
            "The strategy file has no object 'layer_strategy'",
            where=str(file),
            expected='{"layer_strategy": {"<layer>": {"op_type": ..., "quant_strategy": "float"}, ...}}',
            fix="Write a new file with generate_config_file and edit that.",
        )
    shape = content.get("input_shape")
    parsed = StrategyFile(file, text, shape, {k: v for k, v in layers.items() if k != COMMENT})
    if shape is not None and not isinstance(shape, str):
        raise ConfigError(
            f"'input_shape' is {reprlib.repr(shape)}", where=parsed.where("input_shape"), expected=_SHAPE_FORM
        )
    for name, entry in parsed.layers.items():
        _check_entry(parsed, name, entry)
    return parsed


def check(file: StrategyFile, found: ModelLayers) -> Plan:
    """Check a strategy file against the layers of a model and return the plan.

    Raises:
        ConfigError: The file names a layer that the model does not have or that cannot be quantized, misses one that
            it has, or gives a wrong ``op_type`` or ``range``.
        StrategyError: A strategy is unknown or not supported for the kind of layer.
    """
    known = {layer.name: layer for layer in found.layers}
    refused = {layer.name: layer for layer in found.not_quantizable}
    for name in file.layers:
        if name in known:
            continue
        if name in refused:
            raise ConfigError(
                f"Layer {name!r} cannot be quantized: {refused[name].reason}",
                where=file.where("layer_strategy", name),
                fix="Remove it from 'layer_strategy'.",
            )
        raise ConfigError(
            f"The model has no layer {name!r}",
            where=file.where("layer_strategy", name),
            expected=f"one of the model's {len(known)} layers",
            fix=f"{closest(name, known)} Otherwise remove it, or write a new file: layers cannot be added.".strip(),
        )
    missing = [name for name in known if name not in file.layers]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        entry = json.dumps({missing[0]: {"op_type": known[missing[0]].op_type, "quant_strategy": FLOAT}})
        raise ConfigError(
            f"The model's layer {missing[0]!r}{more} is not in the file",
            where=file.where("layer_strategy"),
            expected="every layer of the model, those left alone as 'float'",
            fix=f"Add {entry[1:-1]}, or write a new file with generate_config_file if the model has changed.",
        )
    quantized = {}
    for name, layer in known.items():
        plan = _plan_layer(file, name, layer)
        if plan is not None:
            quantized[name] = plan
    inputs = parse_input_shape(file.input_shape, where=file.where("input_shape")) if file.input_shape else ()
    return Plan(file.path, inputs, quantized, found)


_SHAPE_FORM = "text such as 'input1:1,3,224,224;input2:1,10' (for other than float inputs 'ids:1,128:int64')"


def assign(
    path: StrPath,
    strategies: Mapping[str, str],
    destination: StrPath | None = None,
    *,
    ranges: Mapping[str, str] | None = None,
    outputs: Mapping[str, bool] | None = None,
) -> Path:
    """Write a strategy file again with other strategies for some layers; everything else stays.

    Args:
        path: The strategy file.
        strategies: The strategy of each layer to change, by its name; such as those of a search.
        destination: The file to write; by default the file itself.
        ranges: Likewise the range methods.
        outputs: Likewise whether outputs are recorded.

    Raises:
        ConfigError: The file cannot be read, or has no layer of a name.
        OutputError: The file cannot be written.

    Example:
        >>> import json, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "config.json"
        ...     _ = file.write_text('{"layer_strategy": {"fc/Linear": {"quant_strategy": "float"}}}')
        ...     _ = assign(file, {"fc/Linear": "Quant_INT8-4"})
        ...     json.loads(file.read_text())["layer_strategy"]["fc/Linear"]["quant_strategy"]
        'Quant_INT8-4'
    """
    file = read(path)
    content = json.loads(file.text)
    changes: list[tuple[str, str, str | bool]] = [
        *((name, "quant_strategy", strategy) for name, strategy in strategies.items()),
        *((name, "range", method) for name, method in (ranges or {}).items()),
        *((name, "output", recorded) for name, recorded in (outputs or {}).items()),
    ]
    for name, key, value in changes:
        if name not in file.layers:
            raise ConfigError(
                f"There is no layer {name!r}",
                where=str(file.path),
                expected="a layer of this file",
                fix=closest(name, file.layers) or "Use the file of this model.",
            )
        entry = content["layer_strategy"][name]
        entry[key] = value
        if value in (False, FLOAT):  # what is not recorded is not mentioned, and a float layer records nothing
            entry.pop("output", None)
    return write_text(path if destination is None else destination, _rendered(content))


def parse_input_shape(text: str, *, where: str = "input_shape") -> tuple[InputSpec, ...]:
    """Parse the contract's text of input shapes.

    Args:
        text: ``"name:d,d,d"``, several separated by ``;``; a third part may name the dtype.
        where: File and line, for messages.

    Returns:
        One :class:`InputSpec` an input, in order.

    Raises:
        ConfigError: The text does not have this form.

    Example:
        >>> parse_input_shape("x:1,3,8,8;ids:1,4:int64")[1]
        InputSpec(name='ids', shape=(1, 4), dtype='int64')
    """
    if not isinstance(text, str) or not text.strip():  # type: ignore[redundant-expr]  # users pass tuples
        raise ConfigError(f"The input shape is {text!r}", where=where, expected=_SHAPE_FORM)
    inputs: list[InputSpec] = []
    for part in text.strip().rstrip(";").split(";"):
        fields = [item.strip() for item in part.split(":")]
        sizes = [size.strip() for size in fields[1].split(",")] if 2 <= len(fields) <= 3 else []
        whole = sizes and all(re.fullmatch("[0-9]{1,18}", size) and int(size) for size in sizes)
        dtype = fields[2] if len(fields) == 3 else "float32"
        if not fields[0] or not whole or dtype not in DTYPES:
            raise ConfigError(
                f"The part {part!r} of the input shape {text!r} cannot be understood",
                where=where,
                expected=f"{_SHAPE_FORM}; sizes are whole numbers above 0, dtypes {', '.join(DTYPES)}",
                fix="Give the shape of the model as it will be deployed, batch size first.",
            )
        if any(fields[0] == other.name for other in inputs):
            raise ConfigError(f"The input {fields[0]!r} stands twice in {text!r}", where=where, fix="Rename one.")
        inputs.append(InputSpec(fields[0], tuple(map(int, sizes)), dtype))
    return tuple(inputs)


def _check_entry(file: StrategyFile, name: str, entry: object) -> None:
    if not isinstance(entry, dict) or "quant_strategy" not in entry:
        raise ConfigError(
            f"The entry of layer {name!r} has no 'quant_strategy': {reprlib.repr(entry)}",
            where=file.where("layer_strategy", name),
            expected='{"op_type": ..., "quant_strategy": "float" or a strategy}',
        )
    for key, value in entry.items():
        if key == COMMENT:
            continue
        if key not in LAYER_KEYS:
            raise ConfigError(
                f"The entry of layer {name!r} has the unknown key {key!r}",
                where=file.where("layer_strategy", name),
                expected=f"one of {', '.join(map(repr, LAYER_KEYS))}; comments stand under {COMMENT!r}",
                fix=closest(key, LAYER_KEYS) or "Remove it.",
            )
        if not isinstance(value, bool if key == "output" else str):
            raise ConfigError(
                f"The {key!r} of layer {name!r} is {reprlib.repr(value)}",
                where=file.where("layer_strategy", name),
                expected="true or false" if key == "output" else "a string",
            )


def _plan_layer(file: StrategyFile, name: str, layer: LayerInfo) -> LayerPlan | None:
    entry = file.layers[name]
    where = file.where("layer_strategy", name)
    if entry.get("op_type", layer.op_type) != layer.op_type:
        raise ConfigError(
            f"Layer {name!r} has the op_type {entry['op_type']!r} in the file, but is {layer.op_type!r} in the model",
            where=where,
            fix="Write a new file with generate_config_file: the model has changed.",
        )
    method = entry.get("range", DEFAULT_RANGE)
    if method not in (known := range_method_names()):
        raise ConfigError(
            f"Layer {name!r} asks for the range method {method!r}, which does not exist",
            where=where,
            expected=f"one of {', '.join(map(repr, known))}",
            fix=closest(method, known),
        )
    strategy = find_strategy(
        entry["quant_strategy"],
        layer=name,
        op_type=layer.op_type,
        supported=layer.offered,
        where=where,
        unfit=layer.unfit,
    )
    output = records_output(file, name, strategy)
    return None if strategy is None else LayerPlan(name, layer.op_type, strategy, method, output)


def records_output(file: StrategyFile, name: str, strategy: Strategy | None) -> bool:
    """Return whether a layer's output is to be recorded.

    Args:
        file: The strategy file.
        name: The layer.
        strategy: Its strategy, ``None`` where it stays float.

    Raises:
        ConfigError: It is, and the strategy has no grid for it.
    """
    entry = file.layers[name]
    output = bool(entry.get("output", False))
    if output and (strategy is None or strategy.activation is None):
        raise ConfigError(
            f"The output of layer {name!r} cannot be recorded: its strategy is {entry['quant_strategy']!r}",
            where=file.where("layer_strategy", name),
            expected="a strategy with a grid for activations, on which the output is quantized too",
            fix="Remove 'output', or choose another 'quant_strategy', such as 'Quant_INT8-8'.",
        )
    return output


def _rendered(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


class _RepeatedKeyError(Exception):
    pass


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result and key != COMMENT:
            raise _RepeatedKeyError(key)
        result[key] = value
    return result


def _keys(text: str) -> Iterator[tuple[int, tuple[str, ...], int]]:
    """Yield each key of a JSON text: the number of its object, the keys that lead to it and itself, and its line."""
    opened, line, counted = 0, 1, 0
    last: tuple[str, ...] = ()
    objects: list[tuple[int, tuple[str, ...]]] = []
    for token in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]', text):
        if token[0] == "{":
            opened += 1
            objects.append((opened, last))
        elif token[0] == "}":
            last = objects.pop()[1]
        elif token[2]:
            number, parents = objects[-1]
            last = (*parents, json.loads(token[1]))
            line += text.count("\n", counted, token.start())
            counted = token.start()
            yield number, last, line


def _repeated_key(text: str) -> tuple[str, int]:
    """Return the first key that stands twice in an object, and the line where it is repeated."""
    seen: set[tuple[int, str]] = set()
    for number, (*_, key), line in _keys(text):
        if (number, key) in seen and key != COMMENT:
            return key, line
        seen.add((number, key))
    raise ValueError("no key is repeated")


def _syntax_error(file: Path, text: str, error: json.JSONDecodeError) -> ConfigError:
    """Turn a decoder's error into one that shows the line and knows the usual slips."""
    at, problem, fix = error.pos, error.msg, ""
    here, before = text[at : at + 1], text[:at].rstrip()
    closing = re.match(r",\s*([\]}])", text[at:]) or re.match(r"([\]}])", here if before.endswith(",") else "")
    if not text.strip():
        at, problem, fix = 0, "the file is empty", "Write a new file with generate_config_file"
    elif here in _FULL_WIDTH:
        problem, fix = f"the full-width or typographic character {here!r}", f"Type the ASCII {_FULL_WIDTH[here]!r}"
    elif text.startswith(("//", "/*"), at):
        problem, fix = "a comment in the style of C", 'Write comments as entries: "//": "text"'
    elif closing:  # newer decoders point at the comma, older ones behind it
        at = at if here == "," else len(before) - 1
        problem, fix = f"a trailing comma before {closing[1]!r}", "Remove the comma"
    elif here == "'":
        problem, fix = "a single-quoted string", "Use double quotes"
    elif "delimiter" in error.msg and here == '"':
        at, fix = len(before), "Add the missing comma at the end of this line"
    elif not text[at:].strip():
        at, problem, fix = len(text.rstrip()), "the file ends too early", "Add what is missing at the end"
    line = text.count("\n", 0, at) + 1
    start = text.rfind("\n", 0, at) + 1
    column = at - start + 1
    shown = text[start:].split("\n", 1)[0].replace("\t", " ")
    return ConfigError(
        f"The strategy file {file} is not valid JSON at line {line}, column {column}: {problem}",
        where=f"{file}, line {line}, column {column}",
        fix=f"{fix or 'Correct this line'}:\n    {shown}\n    {' ' * (column - 1)}^\n",
    )
