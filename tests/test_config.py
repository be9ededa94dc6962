"""The strategy file: what is written, what is parsed, and a sentence for everything that can be wrong with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from dopt_strategies import names
from hypothesis import example, given
from hypothesis import strategies as st

from dopt_api import config
from dopt_api.errors import ConfigError, DoptError, OutputError, StrategyError
from dopt_api.strategy import INTEGER_STRATEGIES, STRATEGIES
from dopt_api.types import InputSpec, LayerInfo, LayerPlan, ModelLayers

CONV = "<class 'torch.nn.modules.conv.Conv2d'>"
LINEAR = "<class 'torch.nn.modules.linear.Linear'>"
FOUND = ModelLayers(
    layers=(LayerInfo("conv1/Conv2D", CONV), LayerInfo("conv2/Conv2D", CONV), LayerInfo("fc/Linear", LINEAR)),
    not_quantizable=(LayerInfo("lstm/LSTM", "LSTM", (), "recurrent layers are not supported"),),
    notes=("Traced with a batch of 1.",),
)

CONTRACT = """{
    "quant_strategy_for op '<class 'torch.nn.modules.conv.Conv2d'>'": ["Quant_INT8-8"],
    "quant_strategy_for op '<class 'torch.nn.modules.linear.Linear'>'": ["Quant_INT8-8"],
    "input_shape": "x:1,3,224,224",
    "layer_strategy": {
        "conv1/Conv2D": {"op_type": "<class 'torch.nn.modules.conv.Conv2d'>", "quant_strategy": "Quant_INT8-8"},
        "conv2/Conv2D": {"op_type": "<class 'torch.nn.modules.conv.Conv2d'>", "//": "why", "quant_strategy": "float"},
        "fc/Linear": {"op_type": "<class 'torch.nn.modules.linear.Linear'>", "quant_strategy": "Quant_INT8-8"}
    }
}
"""


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a file with the given content."""

    def read(content: str | bytes) -> config.StrategyFile:
        path = tmp_path / "config.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return config.read(path)

    return read


# ---- writing


def test_the_layout_is_that_of_the_contract(tmp_path):
    path = config.write(tmp_path / "config.json", FOUND, "x:1,3,224,224")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == [
        f"quant_strategy_for op '{CONV}'",
        f"quant_strategy_for op '{LINEAR}'",
        "input_shape",
        "layer_strategy",
        "not_quantizable",
        "notes",
    ]
    assert content[f"quant_strategy_for op '{CONV}'"] == list(INTEGER_STRATEGIES)
    assert content["input_shape"] == "x:1,3,224,224"
    assert list(content["layer_strategy"]) == ["conv1/Conv2D", "conv2/Conv2D", "fc/Linear"]
    assert content["layer_strategy"]["fc/Linear"] == {"op_type": LINEAR, "quant_strategy": "float"}
    assert content["not_quantizable"] == {
        "lstm/LSTM": {"op_type": "LSTM", "reason": "recurrent layers are not supported"}
    }
    assert content["notes"] == ["Traced with a batch of 1."]


def test_a_model_that_knows_its_shape_has_no_input_shape(tmp_path):
    content = json.loads(config.write(tmp_path / "config.json", FOUND).read_text(encoding="utf-8"))
    assert "input_shape" not in content


def test_a_written_file_is_read_and_leaves_every_layer_float(tmp_path):
    path = config.write(tmp_path / "config.json", FOUND, "x:1,3,224,224")
    plan = config.check(config.read(path), FOUND)
    assert plan.quantized == {}
    assert plan.inputs == (InputSpec("x", (1, 3, 224, 224)),)
    assert plan.config_file == path
    assert plan.model_layers is FOUND


@given(layers=st.lists(names.filter(lambda name: name != "//"), max_size=4, unique=True), shape=names)
def test_any_names_survive_writing_and_reading(layers, shape, tmp_path_factory):
    found = ModelLayers(tuple(LayerInfo(name, "Conv2D") for name in layers))
    file = config.read(config.write(tmp_path_factory.mktemp("config") / "config.json", found, shape))
    assert list(file.layers) == layers
    assert file.input_shape == shape
    for number, name in enumerate(layers):  # after six lines and the strategies, each on four
        assert file.where("layer_strategy", name).endswith(f", line {6 + len(INTEGER_STRATEGIES) + 4 * number}")


def test_writing_into_a_missing_folder_names_it(tmp_path):
    with pytest.raises(OutputError, match="no' does not exist"):
        config.write(tmp_path / "no" / "config.json", FOUND)


# ---- reading


def test_the_file_of_the_contract_is_read(read):
    plan = config.check(read(CONTRACT), FOUND)
    assert list(plan.quantized) == ["conv1/Conv2D", "fc/Linear"]
    layer = plan.quantized["conv1/Conv2D"]
    assert (layer.op_type, layer.strategy, layer.range_method) == (CONV, STRATEGIES["Quant_INT8-8"], "min_max")


def test_layers_are_planned_in_execution_order_whatever_the_file(read):
    content = json.loads(CONTRACT)
    content["layer_strategy"] = dict(reversed(content["layer_strategy"].items()))
    assert list(config.check(read(json.dumps(content)), FOUND).quantized) == ["conv1/Conv2D", "fc/Linear"]


def test_hints_and_comments_are_not_parsed(read):
    content = json.loads(CONTRACT)
    content[f"quant_strategy_for op '{CONV}'"] = {"nonsense": 1}
    content |= {"my own": [], "not_quantizable": 3, "//": ["a"]}
    content["layer_strategy"] |= {"//": "about all"}
    content["layer_strategy"]["fc/Linear"]["//"] = {"about": "this"}
    assert list(config.check(read(json.dumps(content)), FOUND).quantized) == ["conv1/Conv2D", "fc/Linear"]


def test_comments_may_stand_twice(read):
    read('{"//": "a", "//": "b", "layer_strategy": {"//": 1, "//": 2}}')


def test_a_layer_chooses_its_range_method(read):
    content = json.loads(CONTRACT)
    content["layer_strategy"]["fc/Linear"]["range"] = "mse"
    assert config.check(read(json.dumps(content)), FOUND).quantized["fc/Linear"].range_method == "mse"


def test_op_type_may_be_left_out(read):
    content = json.loads(CONTRACT)
    del content["layer_strategy"]["fc/Linear"]["op_type"]
    assert "fc/Linear" in config.check(read(json.dumps(content)), FOUND).quantized


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(read):
    content = b"\xef\xbb\xbf" + CONTRACT.replace("\n", "\r\n").encode()
    assert len(config.check(read(content), FOUND).quantized) == 2


@pytest.mark.parametrize("folder", ["with space", "项目", "naïve", "a'b"])
@pytest.mark.parametrize("kind", [str, Path])
def test_paths_of_any_kind(tmp_path, folder, kind):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "配置.json"
    config.write(kind(path), FOUND)
    assert len(config.read(kind(path)).layers) == 3


def test_symbolic_links_are_followed(tmp_path):
    config.write(tmp_path / "real.json", FOUND)
    (tmp_path / "link.json").symlink_to("real.json")
    assert len(config.read(tmp_path / "link.json").layers) == 3


def test_a_relative_path_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"The strategy file config\.json is not valid JSON"):
        config.read("config.json")


def test_a_line_is_that_of_the_layer_and_of_no_other_key_of_the_same_name(read):
    entry = '{"quant_strategy": "float"}'
    file = read(
        f"""{{"hint": [{{"fc": 1}}, {{"a": {{"layer_strategy": 2}}}}], "//": "\\"fc\\": 1 {{",
        "input_shape": "x:1", "fc": {{"fc": 0}},
        "layer_strategy": {{"a": {entry},
            "input_shape": {entry},
            "f\\u0063": {entry}
        }}}}"""
    )
    places = [file.where("input_shape"), file.where("layer_strategy")]
    places += [file.where("layer_strategy", name) for name in ("a", "input_shape", "fc")]
    assert [place.split(", line ")[1] for place in places] == ["2", "3", "3", "4", "5"]
    assert file.where("hint", "a").endswith("line 1")
    assert file.where("layer_strategy", "no") == str(file.path)


# ---- what cannot be read


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no.json' cannot be read: No such file.*generate_config_file") as caught:
        config.read(tmp_path / "no.json")
    assert caught.value.where == str(tmp_path / "no.json")


def test_a_directory(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        config.read(tmp_path)


@pytest.mark.parametrize("content", ["配置".encode("gb18030"), CONTRACT.encode("utf-16")])
def test_another_encoding_than_utf8(read, content):
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 0\).*encoding UTF-8"):
        read(content)


SYNTAX = {  # the wrong text, line and column that are named, problem, fix
    "full-width comma": ('{\n "a": 1，\n "b": 2}', 2, 8, "the full-width or typographic character '，'", "ASCII ','"),
    "full-width colon": ('{\n "a"：1}', 2, 5, "the full-width or typographic character '：'", "ASCII ':'"),
    "full-width quotes": ("{\n  “a”: 1}", 2, 3, "the full-width or typographic character '“'", "ASCII '\"'"),
    "closing quotes of a value": ('{"a": ”b”}', 1, 7, "the full-width or typographic character '”'", "ASCII '\"'"),
    "ideographic space": ('{"a":\u30001}', 1, 6, "the full-width or typographic character", "ASCII 'space'"),
    "trailing comma of an object": ('{\n "a": {"b": 1,\n }}', 2, 14, "a trailing comma before '}'", "Remove the comma"),
    "trailing comma of an array": ('{\n "a": [1, 2, ],\n "b": 1}', 2, 12, "a trailing comma before ']'", "Remove the"),
    "trailing comma at the end": ('{"a": 1,\n}\n', 1, 8, "a trailing comma before '}'", "Remove the comma"),
    "line comment": ('{\n "a": 1, // why\n "b": 2}', 2, 10, "a comment in the style of C", '"//": "text"'),
    "comment before a value": ('{\n "a": /* why */ 1}', 2, 7, "a comment in the style of C", '"//": "text"'),
    "missing comma": ('{\n "a": 1\n "b": 2}', 2, 8, "Expecting ',' delimiter", "Add the missing comma"),
    "missing comma in an array": ('{\n "a": ["b"\n "c"]}', 2, 11, "Expecting ',' delimiter", "Add the missing comma"),
    "single quotes": ("{\n 'a': 1}", 2, 2, "a single-quoted string", "Use double quotes"),
    "single-quoted value": ('{\n "a": \'b\'}', 2, 7, "a single-quoted string", "Use double quotes"),
    "empty": ("", 1, 1, "the file is empty", "generate_config_file"),
    "blank": ("\n \n", 1, 1, "the file is empty", "generate_config_file"),
    "truncated": ('{\n "a": {"b": 1\n\n', 2, 14, "the file ends too early", "Add what is missing"),
    "truncated after a comma": ('{\n "a": {"b": 1,\n', 2, 15, "the file ends too early", "Add what is missing"),
    "truncated in a string": ('{\n "a": "b', 2, 7, "Unterminated string", "Correct this line"),
    "something else": ('{\n "a": tru}', 2, 7, "Expecting value", "Correct this line"),
    "more after the end": ("{}\n{}", 2, 1, "Extra data", "Correct this line"),
    "tabs": ('{\n\t\t"a": 1，}', 2, 9, "the full-width or typographic character '，'", "ASCII ','"),
}  # fmt: skip


@pytest.mark.parametrize("case", SYNTAX)
def test_a_syntax_error_names_the_place_and_shows_the_line(read, tmp_path, case):
    text, line, column, problem, fix = SYNTAX[case]
    with pytest.raises(ConfigError) as caught:
        read(text)
    error = caught.value
    assert f"at line {line}, column {column}: {problem}" in error.what
    assert error.where == f"{tmp_path / 'config.json'}, line {line}, column {column}"
    assert fix in error.fix
    shown, caret = error.fix.splitlines()[-2:]
    assert shown.strip() == (text.split("\n")[line - 1]).strip()
    assert caret.index("^") - (len(shown) - len(shown.removeprefix("    "))) == column - 1
    if case not in {
        "empty",
        "blank",
        "truncated",
        "truncated after a comma",
        "missing comma",
        "missing comma in an array",
    }:
        assert shown[caret.index("^")] == text.split("\n")[line - 1][column - 1]


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ('{"layer_strategy": {},\n"layer_strategy": {}}', "layer_strategy", 2),
        (
            """{"layer_strategy": {"a": {"op_type": "x",
                "quant_strategy": "float",
                "quant_strategy": "float"},
                "b": {"quant_strategy": "float"}}}""",
            "quant_strategy",
            3,
        ),
        ('{"layer_strategy": {\n"层": {},\n"x": "层",\n"\\u5c42": {}}}', "层", 4),
        ('{"a": "{\\"a\\": {",\n"a": 1}', "a", 2),
        ('{"//": 1,\n"//": 2,\n"a": 1,\n"a": 1}', "a", 4),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(read, text, key, line):
    with pytest.raises(ConfigError, match=f"The key '{key}' stands twice") as caught:
        read(text)
    assert caught.value.where.endswith(f"config.json, line {line}")


def test_a_key_may_stand_in_two_objects(read):
    read('{"a": {"b": 1, "c": [{"b": 1}, {"b": 2}]}, "b": 1, "layer_strategy": {}}')


@pytest.mark.parametrize(
    ("text", "reason"), [("[" * 100_000, "recursion"), ('{"a": ' + "1" * 5000 + "}", "integer string conversion")]
)
def test_json_beyond_the_reader(read, text, reason):
    with pytest.raises(ConfigError, match=f"cannot be read as JSON: .*{reason}"):
        read(text)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"text"', "{}", '{"layer_strategy": []}', '{"layer_strategy": null}']
)
def test_a_file_without_layer_strategy(read, text):
    with pytest.raises(ConfigError, match="has no object 'layer_strategy'") as caught:
        read(text)
    assert "quant_strategy" in caught.value.expected


# ---- what is read and does not fit

ENTRY = {"op_type": LINEAR, "quant_strategy": "float"}


def file_with(entry: object = ENTRY, **top: object) -> str:
    content = json.loads(CONTRACT) | top
    content["layer_strategy"]["fc/Linear"] = entry
    return json.dumps(content, indent=1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("float", "The entry of layer 'fc/Linear' has no 'quant_strategy': 'float'"),
        (None, "has no 'quant_strategy': None"),
        ({"op_type": LINEAR}, "has no 'quant_strategy'"),
        (ENTRY | {"quant_stratgy": "float"}, "has the unknown key 'quant_stratgy'.*Did you mean 'quant_strategy'"),
        (ENTRY | {"bits": 4}, "has the unknown key 'bits'.*Remove it"),
        (ENTRY | {"quant_strategy": 8}, "The 'quant_strategy' of layer 'fc/Linear' is 8.*a string"),
        (ENTRY | {"quant_strategy": None}, "The 'quant_strategy' of layer 'fc/Linear' is None"),
        (ENTRY | {"range": ["mse"]}, r"The 'range' of layer 'fc/Linear' is \['mse'\]"),
        (ENTRY | {"op_type": {}}, "The 'op_type' of layer 'fc/Linear' is {}"),
    ],
)
def test_a_malformed_entry_is_refused_with_layer_and_line(read, entry, message):
    text = file_with(entry)
    with pytest.raises(ConfigError, match=message) as caught:
        read(text)
    assert caught.value.where.endswith(f"config.json, line {line_of(text, 'fc/Linear')}")


def line_of(text: str, key: str) -> int:
    return next(number for number, line in enumerate(text.split("\n"), 1) if json.dumps(key) + ":" in line)


@pytest.mark.parametrize("shape", [3, ["x:1,3"], {"x": [1, 3]}, True])
def test_an_input_shape_that_is_no_text(read, shape):
    text = file_with(input_shape=shape)
    with pytest.raises(ConfigError, match="'input_shape' is") as caught:
        read(text)
    assert caught.value.where.endswith(f", line {line_of(text, 'input_shape')}")


def test_a_wrong_input_shape_is_refused_with_its_line(read):
    text = file_with(input_shape="x:1,-3")
    with pytest.raises(ConfigError, match="The part 'x:1,-3' of the input shape") as caught:
        config.check(read(text), FOUND)
    assert caught.value.where.endswith(f", line {line_of(text, 'input_shape')}")


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"op_type": CONV}, ConfigError, "the op_type .*Conv2d.* in the file, but is .*Linear.* in the model"),
        ({"range": "min-max"}, ConfigError, "range method 'min-max', which does not exist.*Did you mean 'min_max'"),
        ({"quant_strategy": "Quant_INT8_8"}, StrategyError, "which does not exist.*Did you mean 'Quant_INT8-8'"),
        (
            {"quant_strategy": "nonsense"},
            StrategyError,
            "one of 'float', 'Quant_INT8-8', .*. Fix: Set 'quant_strategy'",
        ),
        ({"quant_strategy": ""}, StrategyError, "the strategy '', which does not exist"),
    ],
)
def test_a_wrong_choice_is_refused_with_layer_and_line(read, entry, error, message):
    text = file_with(ENTRY | entry)
    with pytest.raises(error, match=message) as caught:
        config.check(read(text), FOUND)
    assert "fc/Linear" in caught.value.what
    assert caught.value.where.endswith(f"config.json, line {line_of(text, 'fc/Linear')}")


def test_a_strategy_that_the_layer_does_not_support(read):
    found = ModelLayers((LayerInfo("fc/Linear", LINEAR, strategies=()),))
    text = '{"layer_strategy": {"fc/Linear": {"quant_strategy": "Quant_INT8-8"}}}'
    with pytest.raises(StrategyError, match=r"'Quant_INT8-8', which .*Linear.* does not support.*one of 'float'"):
        config.check(read(text), found)


WEIGHTS_ALONE = [name for name in STRATEGIES if name not in INTEGER_STRATEGIES]


@pytest.mark.parametrize(
    ("weight_only", "row", "offered"),
    [
        (False, 0, []),
        (False, 64, []),
        (True, 0, ["Quant_FLOAT-8", "Quant_FLOAT-4"]),
        (True, 33, ["Quant_FLOAT-8", "Quant_FLOAT-4"]),
        (True, 64, WEIGHTS_ALONE),
    ],
)
def test_what_a_layer_is_offered_is_what_it_can_have(read, tmp_path, weight_only, row, offered):
    found = ModelLayers((LayerInfo("fc/Linear", LINEAR, weight_only=weight_only, row=row),))
    path = config.write(tmp_path / "written.json", found)
    names = json.loads(path.read_text(encoding="utf-8"))[f"quant_strategy_for op '{LINEAR}'"]
    assert names == [*INTEGER_STRATEGIES, *offered]
    for name in STRATEGIES:
        file = read(json.dumps({"layer_strategy": {"fc/Linear": {"quant_strategy": name}}}))
        if name in names:
            assert config.check(file, found).quantized["fc/Linear"].strategy is STRATEGIES[name]
        else:
            with pytest.raises(StrategyError, match=r"leaves inputs float|has groups or zero points|gives 32 weights"):
                config.check(file, found)


def test_the_comment_on_a_kind_has_what_any_of_its_layers_can_have(tmp_path):
    rows = (33, 64)
    found = ModelLayers(tuple(LayerInfo(f"fc{row}", LINEAR, weight_only=True, row=row) for row in rows))
    content = json.loads(config.write(tmp_path / "config.json", found).read_text(encoding="utf-8"))
    assert content[f"quant_strategy_for op '{LINEAR}'"] == list(STRATEGIES)


def test_the_grid_of_a_float_input_is_refused_by_name():
    plan = LayerPlan("fc/Linear", LINEAR, STRATEGIES["Quant_FLOAT-8"])
    with pytest.raises(ValueError, match="'Quant_FLOAT-8' of layer 'fc/Linear' leaves the input float"):
        _ = plan.input_grid
    assert LayerPlan("fc/Linear", LINEAR, STRATEGIES["Quant_INT8-8"]).input_grid.dtype == "uint8"


def test_a_layer_that_the_model_does_not_have(read):
    text = CONTRACT.replace("conv2/Conv2D", "conv2/Conv2d")
    with pytest.raises(
        ConfigError, match=r"no layer 'conv2/Conv2d'.*3 layers.*mean 'conv2/Conv2D'.*cannot be added"
    ) as e:
        config.check(read(text), FOUND)
    assert e.value.where.endswith(f", line {line_of(text, 'conv2/Conv2d')}")


def test_a_layer_that_cannot_be_quantized(read):
    text = CONTRACT.replace("conv2/Conv2D", "lstm/LSTM")
    with pytest.raises(ConfigError, match=r"'lstm/LSTM' cannot be quantized: recurrent layers.*Remove it") as caught:
        config.check(read(text), FOUND)
    assert caught.value.where.endswith(f", line {line_of(text, 'lstm/LSTM')}")


def test_layers_that_are_missing_come_with_the_entry_to_add(read):
    content = json.loads(CONTRACT)
    del content["layer_strategy"]["conv1/Conv2D"]
    with pytest.raises(ConfigError, match="The model's layer 'conv1/Conv2D' is not in the file") as caught:
        config.check(read(json.dumps(content)), FOUND)
    entry = re.search(r"Add (.*), or write", caught.value.fix)[1]
    content["layer_strategy"] |= json.loads("{" + entry + "}")
    assert list(config.check(read(json.dumps(content)), FOUND).quantized) == ["fc/Linear"]
    del content["layer_strategy"]["conv1/Conv2D"], content["layer_strategy"]["conv2/Conv2D"]
    with pytest.raises(ConfigError, match="'conv1/Conv2D' and 1 more is not in the file"):
        config.check(read(json.dumps(content)), FOUND)


# ---- input shapes

input_names = st.text(st.characters(exclude_characters=":;", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name == name.strip()
)
specs = st.builds(
    InputSpec,
    input_names,
    st.lists(st.integers(1, 10**6), min_size=1, max_size=5).map(tuple),
    st.sampled_from(config.DTYPES),
)


@given(st.lists(specs, min_size=1, max_size=4, unique_by=lambda spec: spec.name), st.booleans(), st.booleans())
def test_input_shapes_round_trip(inputs, spaced, ended):
    comma, colon, semicolon = (", ", " : ", " ; ") if spaced else (",", ":", ";")
    text = semicolon.join(
        spec.name + colon + comma.join(map(str, spec.shape)) + (colon + spec.dtype) * (spec.dtype != "float32")
        for spec in inputs
    )
    assert config.parse_input_shape(text + ";" * ended) == tuple(inputs)


def test_input_shape_of_the_contract():
    assert config.parse_input_shape("input1:1,3,224,224;input2:1,10") == (
        InputSpec("input1", (1, 3, 224, 224)),
        InputSpec("input2", (1, 10)),
    )


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ";", "1,3,224,224", "x", "x:", ":1,3", "x:1,,3", "x:1,3,", "x:1,a", "x:1,0", "x:1,-3", "x:1,3.5",
        "x:1,3:f32", "x:1:int64:2", "x:1；y:1", "x：1,3", "x:１,3", "x:1,3;;y:1", "x:(1,3)", "x:" + "1" * 5000,
        None, (1, 3, 224, 224),
    ],
)  # fmt: skip
def test_input_shapes_that_cannot_be_understood(text):
    with pytest.raises(ConfigError) as caught:
        config.parse_input_shape(text, where="config.json, line 4")
    assert "input1:1,3,224,224;input2:1,10" in caught.value.expected
    assert caught.value.where == "config.json, line 4"


def test_an_input_that_stands_twice():
    with pytest.raises(ConfigError, match="The input 'x' stands twice"):
        config.parse_input_shape("x:1;y:2;x:3")


# ---- nothing but errors of ours

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["layer_strategy", "conv1/Conv2D", "op_type", "quant_strategy", "range", "input_shape", "//"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)
json_text = json_values.map(json.dumps) | json_values.map(lambda value: json.dumps({"layer_strategy": value}))


def read_and_check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        config.check(config.read(path), FOUND)
    except DoptError:
        return  # and nothing else is raised


@given(
    content=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")) | json_text.map(str.encode)
)
@example(content=b'{"layer_strategy": {"conv1/Conv2D": {"quant_strategy": "float", "range": []}}}')
@example(content=b'"\\ud800"')
def test_arbitrary_content_raises_only_errors_of_ours(content, tmp_path_factory):
    read_and_check(tmp_path_factory.mktemp("config") / "config.json", content)


@given(st.integers(0, len(CONTRACT)), st.integers(0, 3), st.text("{}[]\",:，：“”'/\\ \n1a", max_size=2))
def test_a_slip_of_the_hand_raises_only_errors_of_ours(tmp_path_factory, at, length, typed):
    text = CONTRACT[:at] + typed + CONTRACT[at + length :]
    read_and_check(tmp_path_factory.mktemp("config") / "config.json", text.encode())


@given(st.text())
def test_arbitrary_shapes_raise_only_errors_of_ours(text):
    try:
        inputs = config.parse_input_shape(text)
    except DoptError:
        return
    assert all(spec.name and spec.shape for spec in inputs)


# ---- assigning


def test_assigned_strategies_are_read_and_all_else_stays(tmp_path):
    path = config.write(tmp_path / "config.json", FOUND, "x:1,3,224,224")
    content = json.loads(path.read_text())
    content["layer_strategy"]["fc/Linear"]["//"] = "a comment"
    path.write_text(json.dumps(content))
    other = config.assign(path, {"fc/Linear": "Quant_INT8-4"}, tmp_path / "other.json")
    assert json.loads(path.read_text()) == content
    content["layer_strategy"]["fc/Linear"]["quant_strategy"] = "Quant_INT8-4"
    assert json.loads(other.read_text()) == content
    assert {name: plan.strategy.name for name, plan in config.check(config.read(other), FOUND).quantized.items()} == {
        "fc/Linear": "Quant_INT8-4"
    }
    assert config.assign(other, {}) == other
    assert json.loads(other.read_text()) == content


def test_assigning_to_a_layer_that_is_not_there_is_refused(tmp_path):
    path = config.write(tmp_path / "config.json", FOUND)
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"no layer 'fc/Liner'.*Did you mean 'fc/Linear'"):
        config.assign(path, {"conv1/Conv2D": "float", "fc/Liner": "float"})
    assert path.read_text() == before


def test_outputs_are_recorded_where_the_file_says_so(read):
    found = ModelLayers((LayerInfo("fc/Linear", LINEAR, weight_only=True),))
    for text, wanted in (("", False), (', "output": true', True), (', "output": false', False)):
        file = read(f'{{"layer_strategy": {{"fc/Linear": {{"quant_strategy": "Quant_INT8-8"{text}}}}}}}')
        assert config.check(file, found).quantized["fc/Linear"].output is wanted


@pytest.mark.parametrize(
    ("strategy", "output", "message"),
    [
        ("Quant_INT8-8", '"yes"', "'output' of layer 'fc/Linear' is 'yes'.*true or false"),
        ("Quant_INT8-8", "1", "'output' of layer 'fc/Linear' is 1.*true or false"),
        ("float", "true", "output of layer 'fc/Linear' cannot be recorded: its strategy is 'float'"),
        ("Quant_FLOAT-8", "true", "cannot be recorded: its strategy is 'Quant_FLOAT-8'.*a grid for activations"),
    ],
)
def test_an_output_that_cannot_be_recorded_is_refused_by_line(read, strategy, output, message):
    found = ModelLayers((LayerInfo("fc/Linear", LINEAR, weight_only=True),))
    text = f'{{"layer_strategy":\n{{"fc/Linear": {{"quant_strategy": "{strategy}", "output": {output}}}}}}}'
    with pytest.raises(ConfigError, match=message) as caught:
        config.check(read(text), found)
    assert caught.value.where.endswith("config.json, line 2")


def test_a_layer_made_float_no_longer_records_its_output(read):
    file = read('{"layer_strategy": {"fc/Linear": {"quant_strategy": "Quant_INT8-8", "output": true}}}')
    config.assign(file.path, {"fc/Linear": "float"})
    assert json.loads(file.path.read_text()) == {"layer_strategy": {"fc/Linear": {"quant_strategy": "float"}}}
