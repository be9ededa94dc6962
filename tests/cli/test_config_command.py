"""``dopt config``: through the command line to files, tables and sentences."""

import json

import click
import pytest
from click.testing import CliRunner

from dopt_api.cli.group import dopt
from dopt_api.strategy import STRATEGIES

CONV, LINEAR = "<class 'torch.nn.modules.conv.Conv2d'>", "<class 'torch.nn.modules.linear.Linear'>"


def call(*arguments):
    return CliRunner().invoke(dopt, ["config", *map(str, arguments)])


@pytest.fixture
def file(tmp_path):
    layers = {
        "stem/Conv2D": {"op_type": CONV, "quant_strategy": "float"},
        "body.1/Conv2D": {"op_type": CONV, "quant_strategy": "Quant_INT8-8", "range": "mse"},
        "head/Linear": {"op_type": LINEAR, "quant_strategy": "float"},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"//": "mine", "input_shape": "x:1,3,8,8", "layer_strategy": layers}))
    return path


def strategies(path):
    return {name: entry["quant_strategy"] for name, entry in json.loads(path.read_text())["layer_strategy"].items()}


def test_show_prints_each_layer_and_counts(file):
    result = call("show", file)
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    assert rows[0] == ["layer", "op_type", "strategy", "range"]
    assert rows[2] == ["body.1/Conv2D", "<class", "'torch.nn.modules.conv.Conv2d'>", "Quant_INT8-8", "mse"]
    assert result.output.endswith("3 layers: 2 float, 1 Quant_INT8-8\n")
    assert json.loads(call("show", file, "--json").output)["head/Linear"]["quant_strategy"] == "float"


def test_set_gives_all_layers_a_strategy_and_keeps_the_rest_of_the_file(file):
    result = call("set", file, "--strategy", "Quant_INT8-8")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "2 of 3 matching layers changed.")
    assert set(strategies(file).values()) == {"Quant_INT8-8"}
    content = json.loads(file.read_text())
    assert content["//"] == "mine"
    assert content["layer_strategy"]["body.1/Conv2D"]["range"] == "mse"


def test_set_chooses_by_name_and_by_kind(file, tmp_path):
    other = tmp_path / "other.json"
    before = file.read_text()
    call(
        "set",
        file,
        "--strategy",
        "Quant_INT8-4",
        "--op-type",
        "*Conv2d*",
        "--layer",
        "stem*",
        "--layer",
        "head*",
        "--output",
        other,
    )
    assert file.read_text() == before
    assert strategies(other) == {"stem/Conv2D": "Quant_INT8-4", "body.1/Conv2D": "Quant_INT8-8", "head/Linear": "float"}
    call("set", other, "--range", "percentile", "--layer", "*Linear")
    assert json.loads(other.read_text())["layer_strategy"]["head/Linear"]["range"] == "percentile"


def test_a_dry_run_shows_what_would_change_and_writes_nothing(file):
    before = file.read_text()
    result = call("set", file, "--strategy", "Quant_INT8-7", "--layer", "head/Linear", "--dry-run")
    assert "1 of 1 matching layers would change." in result.output
    assert file.read_text() == before
    result = call("set", file, "--strategy", "Quant_INT8-7", "--layer", "head/Linear", "--dry-run", "--json")
    change = {"layer": "head/Linear", "key": "quant_strategy", "from": "float", "to": "Quant_INT8-7"}
    assert json.loads(result.output) == {"matched": 1, "changes": [change], "written": False}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "Say what to give: --strategy NAME"),
        (
            ("--strategy", "Quant_INT8-9"),
            1,
            "There is no strategy 'Quant_INT8-9'. Expected: one of float, Quant_INT8-8",
        ),
        (("--range", "minmax"), 1, "Did you mean 'min_max'?"),
        (("--strategy", "float", "--layer", "haed/Linear"), 1, "'haed/Linear' matches no layer of"),
        (("--strategy", "float", "--layer", "haed/Linear"), 1, "Did you mean 'head/Linear'?"),
        (("--strategy", "float", "--op-type", "Conv2d"), 1, "Use * for any text"),
    ],
)
def test_set_refuses_slips_and_changes_nothing(file, arguments, status, message):
    before = file.read_text()
    result = call("set", file, *arguments)
    assert result.exit_code == status
    assert message in result.output
    assert file.read_text() == before


def test_check_names_the_line_of_what_is_wrong(file):
    result = call("check", file)
    assert (result.exit_code, "1 of 3 layers are quantized" in result.output) == (0, True)
    file.write_text(file.read_text().replace('"Quant_INT8-8"', '\n"Quant_INT8-88"'))
    result = call("check", file)
    assert result.exit_code == 1
    assert "'Quant_INT8-88', which does not exist" in result.output
    assert "Did you mean 'Quant_INT8-8'?" in result.output
    file.write_text(file.read_text()[:-5])
    assert call("check", file).exit_code == 1


def test_diff_is_1_where_files_differ(file, tmp_path):
    assert call("diff", file, file).exit_code == 0
    other = tmp_path / "other.json"
    call("set", file, "--strategy", "Quant_INT8-8", "--layer", "stem*", "--output", other)
    result = call("diff", file, other)
    assert result.exit_code == 1
    assert result.output.splitlines()[1].split() == ["stem/Conv2D", "quant_strategy", "float", "Quant_INT8-8"]
    (row,) = json.loads(call("diff", file, other, "--json").output)
    assert row == {"layer": "stem/Conv2D", "key": "quant_strategy", "one": "float", "other": "Quant_INT8-8"}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("model", "names no function"),
        ("no_such_module:build", "cannot be imported"),
        ("json:build", "has no function 'build'"),
        ("json.tool:main.nothing", "has no function"),
    ],
)
def test_a_factory_that_is_none_is_said(file, factory, message):
    for command in (("check", file, "--model", factory), ("new", factory, file)):
        result = call(*command)
        assert result.exit_code == 1
        assert message in result.output


def test_the_help_shows_examples_a_line_each():
    shown = call("set", "--help").output
    assert "\n  dopt config set config.json --strategy Quant_INT8-8\n" in shown.replace("\n    ", "\n  ")


def commands(group, path=()):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", list(commands(dopt)), ids=" ".join)
def test_every_help_is_text(path):
    shown = CliRunner().invoke(dopt, [*path, "--help"])
    assert shown.exit_code == 0
    assert shown.output.startswith("Usage: ")
    assert not {"\\b", "``", "\b"} & {shown.output[i : i + 2] for i in range(len(shown.output))}
    assert "\b" not in shown.output


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_the_check_of_a_file_alone_takes_every_strategy(file, strategy):
    file.write_text(file.read_text().replace('"quant_strategy": "float"', f'"quant_strategy": "{strategy}"'))
    shown = call("check", file)
    assert shown.exit_code == 0, shown.output
    assert "3 of 3 layers are quantized" in shown.output


def test_outputs_are_set_and_shown(file):
    assert "output" not in call("show", file).output.splitlines()[0]
    before = file.read_text()
    result = call("set", file, "--record-output", "--layer", "body*")
    assert result.output.splitlines()[1].split() == ["body.1/Conv2D", "output", "false", "true"]
    assert json.loads(file.read_text())["layer_strategy"]["body.1/Conv2D"]["output"] is True
    rows = [line.split() for line in call("show", file).output.splitlines()]
    assert (rows[0][-1], rows[2][-1]) == ("output", "true")
    assert call("check", file).exit_code == 0
    assert call("set", file, "--no-record-output").output.endswith("1 of 3 matching layers changed.\n")
    assert json.loads(file.read_text()) == json.loads(before)
    call("set", file, "--record-output", "--layer", "head*")
    refused = call("check", file)
    assert refused.exit_code == 1
    assert "output of layer 'head/Linear' cannot be recorded" in refused.output
