"""``dopt params``: parameter files shown and compared."""

import json

from click.testing import CliRunner
from quantized_chain import network

from dopt_api.cli.group import dopt


def call(*arguments):
    return CliRunner().invoke(dopt, ["params", *map(str, arguments)])


def folders(tmp_path):
    for name, seed in (("one", 0), ("other", 0)):
        (tmp_path / name).mkdir()
        network(tmp_path / name, ["Quant_INT8-8", "Quant_INT8-4"], seed=seed)
    return tmp_path / "one", tmp_path / "other"


def test_show_has_a_row_for_each_layer(tmp_path):
    one, _ = folders(tmp_path)
    lines = [line.split() for line in call("show", one).output.splitlines()]
    assert [line[:3] for line in lines[1:]] == [
        ["layer0", "Quant_INT8-8", "uint8"],
        ["layer1", "Quant_INT8-4", "uint8"],
    ]
    content = json.loads(call("show", one / "quant_params.json", "--json").output)
    assert content[1]["weight"]["bits"] == 4


def test_diff_says_which_layers_differ_and_by_how_much(tmp_path):
    one, other = folders(tmp_path)
    same = call("diff", one, other)
    assert (same.exit_code, same.output) == (0, "The files have the same 2 layers and numbers.\n")
    file = other / "quant_params.json"
    content = json.loads(file.read_text())
    content["layers"][1]["input"]["scale"][0] *= 1.5
    file.write_text(json.dumps(content))
    result = call("diff", one, other)
    assert result.exit_code == 1
    assert result.output.splitlines()[1].split() == ["layer1", "input", "50.000%", "0.000%"]
    del content["layers"][0]
    file.write_text(json.dumps(content))
    rows = json.loads(call("diff", one, other, "--json").output)
    assert [row["what"] for row in rows] == ["only in the first", "input"]


def test_outputs_are_shown_and_compared_where_there_are_any(tmp_path):
    one, other = folders(tmp_path)
    assert "output scale" not in call("show", one).output
    for folder, scale in ((one, 0.5), (other, 0.75)):
        file = folder / "quant_params.json"
        content = json.loads(file.read_text())
        content["layers"][1]["output"] = {**content["layers"][1]["input"], "scale": [scale], "zero_point": [3]}
        file.write_text(json.dumps(content))
    lines = [line.split() for line in call("show", one).output.splitlines()]
    assert lines[0][-5:] == ["output", "scale", "output", "zero", "point"]
    assert lines[2][-2:] == ["0.5", "3"]
    line = call("diff", one, other).output.splitlines()[1]
    assert line.split() == ["layer1", "output", "0.000%", "0.000%", "50.000%"]


def test_a_missing_file_is_a_sentence(tmp_path):
    result = call("show", tmp_path)
    assert result.exit_code == 1
    assert "quant_params.json" in result.output
