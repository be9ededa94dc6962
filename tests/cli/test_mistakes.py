"""Likely mistakes: each is answered by a message that says what is wrong, where, and what mends it.

A backend of the test's own stands in for a framework: its models are lists of layers.
"""

import re
import sys

import click
import numpy as np
import pytest
from click.testing import CliRunner

from dopt_api import extensions, manager, search
from dopt_api.cli import verify as verify_command
from dopt_api.cli.group import COMMANDS, dopt
from dopt_api.errors import SearchError
from dopt_api.types import BackendInfo, LayerInfo, ModelLayers

PROJECT = """
import numpy as np

def build():
    return ["conv1/Conv", "conv2/Conv"]

def other():
    return ["stem/Conv"]

def batches():
    return [np.ones((2, 3), np.float32)]

def wide():
    return (np.ones((2, size), np.float32) for size in (3, 7))

def none():
    build()

def single():
    return 7

def empty():
    yield from ()

def fails():
    return {}["weights"]

def configured(path):
    return build()

SIZE = 224
"""

CONFIG = """{
    "layer_strategy": {
        "conv1/Conv": {"quant_strategy": "Quant_INT8-8"},
        "conv2/Conv": {"quant_strategy": "float"}
    }
}
"""


class Backend:
    name = "mine"
    info = BackendInfo("mine", "numpy", "2.0", "0.1", (), "1.1")

    def find_layers(self, model, input_shape):
        return ModelLayers(tuple(LayerInfo(name, "Conv") for name in model))


def calibrate(model, config, batches, folder, **options):
    for batch in options["progress"](batches):
        np.zeros(3) + batch
    pytest.fail("no mistake was found")


def measure(model, config, batches, offered, **options):
    pytest.fail("no mistake was found")


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "mine.py": PROJECT,
        "config.json": CONFIG,
        "comma.json": CONFIG.replace('"float"}', '"float"},'),
        "typo.json": CONFIG.replace("Quant_INT8-8", "Quant_INT8_8"),
        "slip.json": CONFIG.replace("conv2", "conv_2"),
        "needs.py": "import a_package_that_is_not_there",
        "slip.py": "def build(:\n",
        "breaks.py": "1 / 0",
        "data.npz": "no arrays",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(manager, "select", lambda *_: Backend())
    known = {(extensions.POST_TRAINING, "mine"): (calibrate, ""), (extensions.SENSITIVITY, "mine"): (measure, "")}
    monkeypatch.setattr(extensions, "load", lambda group, name: known[group, name])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


def call(*arguments):
    result = CliRunner().invoke(dopt, arguments)
    return result.exit_code, " ".join(result.output.split())


QUANTIZE = "quantize mine:build config.json out --data mine:batches"
TUNE = "tune mine:build config.json --data mine:batches --budget"

MISTAKES = {
    # functions of the project
    "quantize mine:biuld config.json out --data mine:batches": "no function 'biuld'. Where: *mine.py. *mean 'build'?",
    "quantize mine.build config.json out --data mine:batches": "names no function. *write it as 'mine:build'",
    "quantize mien:build config.json out --data mine:batches": "'mien' cannot be imported: *call dopt from the folder",
    "quantize needs:build config.json out --data mine:batches": "pip install a_package_that_is_not_there",
    "quantize slip:build config.json out --data mine:batches": "slip.py, line 1. Fix: correct this line: def build(:",
    "quantize breaks:build config.json out --data mine:batches": "breaks.py*line 1, *ZeroDivisionError*'import breaks",
    "quantize mine:none config.json out --data mine:batches": "'mine:none' returned None. *Fix: end it with 'return",
    "quantize mine:SIZE config.json out --data mine:batches": "has a int, but no function, called 'SIZE'",
    "quantize mine:fails config.json out --data mine:batches": "mine.py*line *'mine:fails' failed: KeyError: 'weights",
    "quantize mine:configured config.json out --data mine:batches": "'path'. Expected: a function without arguments.",
    # data
    "quantize mine:build config.json out": "Missing option '--data'. Expected: *Fix: --data my_project.data:batches",
    "quantize mine:build config.json out --data mine:empty": "'mine:empty' returned no batches. *Fix: look for an",
    "quantize mine:build config.json out --data mine:single": "returned a int, which has no batches. *return [batch]",
    "quantize mine:build config.json out --data mine:wide": "Batch 2 of 'mine:wide' (numpy.ndarray [2, 7]) did not go",
    # strategy files
    "quantize mine:build comma.json out --data mine:batches": "line 4, column *trailing comma *Fix: Remove the comma",
    "quantize mine:build typo.json out --data mine:batches": "typo.json, line 3*Did you mean 'Quant_INT8-8'?",
    "quantize mine:build slip.json out --data mine:batches": "slip.json, line 4*Did you mean 'conv2/Conv'?",
    "quantize mine:other config.json out --data mine:batches": "config.json, line 3*Fix: Use the file of this model.",
    "quantize mine:build missing.json out --data mine:batches": "cannot be read: No such file*(dopt config new)",
    "config set config.json --strategy Quant_INT88": "no strategy 'Quant_INT88'. Expected*Did you mean 'Quant_INT8-8'?",
    "config set config.json --strategy float --layer conv": "--layer 'conv' matches no layer of config.json. Use *",
    "config set config.json --range mean": "There is no range method 'mean'. Expected: one of min_max",
    "config set config.json --layer conv*": "--strategy NAME, --range NAME, --record-output, or several",
    # places
    f"{QUANTIZE.replace('out', 'mine.py')}": "'mine.py' is a file",
    f"{QUANTIZE.replace('out', 'mine.py/out')}": "cannot be made: Not a directory. Where: */mine.py/out/*Pass another",
    "config new mine:build missing/config.json": "'missing' does not exist*Fix: Create it",
    "report missing": "missing/quant_params.json. Fix: Check the path; an export writes",
    "verify missing": "Fix: Check the path; an export writes quant_params.json",
    "report . --data data.npz": "The data 'data.npz' cannot be read as .npz",
    # options
    f"{QUANTIZE} --sample 4": "No such option* '--sample'*'--samples'",
    f"{QUANTIZE} --samples 0": "0 is not in the range x>=1",
    f"{QUANTIZE} --format onnx-qdq": "There is no format 'onnx-qdq'. Expected: *Did you mean 'onnx_qdq'?",
    "convert .": "Say the format: --to onnx_qdq",
    "qantize": "There is no command 'qantize'. Did you mean 'quantize'?",
    f"{TUNE} 70": "is 70 times what CONFIG costs. Did you mean 70%?",
    f"{TUNE} 70% --strategy Quant_INT8-5": "There is no strategy 'Quant_INT8-5'. Did you mean",
    f"{TUNE} 70% --output mine.py/mixed.json": "cannot be made: *Pass another one.",
}


def fits(pattern, text):
    """Whether a text has what a pattern says, in which ``*`` stands for anything; ends of sentences are as written."""
    return re.search(".*".join(map(re.escape, pattern.split("*"))), text)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_by_what_mends_it(project, mistake):
    before = sorted(project.iterdir())
    status, output = call(*mistake.split())
    assert status in (1, 2), output
    assert fits(MISTAKES[mistake], output), output
    left = [file for file in project.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sorted(left) == [file for file in before if file.is_file()]


def test_patterns_of_this_test_can_fail():
    assert fits("a*c.", "abc.")
    assert not fits("a*c.", "abcd")


def test_a_forgotten_extra_is_answered_by_the_command_that_installs_it(project, monkeypatch):
    for module, command in (
        ("onnxruntime", "verify ."),
        ("onnx", f"{QUANTIZE} --format onnx_qdq"),
        ("scipy.optimize", f"{TUNE} 70%"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        for name in [name for name in sys.modules if name.startswith(("dopt_api.verify", "dopt_api.formats.onnx_qdq"))]:
            monkeypatch.delitem(sys.modules, name)
        status, output = call(*command.split())
        assert (status, "pip install 'dopt-api[" in output) == (1, True), output
    with pytest.raises(SearchError, match="SciPy"):
        search.require_solver()
    assert verify_command.command.name == "verify"


def leaves(group=dopt, path=()):
    """All commands with what they are called by."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


@pytest.mark.parametrize(("name", "command"), list(leaves()), ids=lambda one: one if isinstance(one, str) else "")
def test_each_command_has_help_enough_and_json(name, command):
    status, output = call(*name.split(), "--help")
    assert (status, "Example" in output) == (0, True)
    assert f"dopt {name} " in output or f"dopt {name}" in output
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in options
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    example = re.findall(rf"dopt {name}((?: [^ ]+)*)", command.epilog.replace("\\\n", " "))
    used = {word for words in example for word in words.split() if re.fullmatch("--[a-z-]+", word)}
    assert used <= options | {"--help"}


def test_every_command_is_looked_at():
    assert {name.split()[0] for name, _ in leaves()} == set(COMMANDS)


def test_options_of_one_name_mean_one_thing():
    meanings = {}
    for name, command in leaves():
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--"):
                    meanings.setdefault(option, {})[name] = type(parameter.type).__name__, parameter.is_flag
    for option in ("--json", "--backend", "--output", "--output-dir", "--picture", "--output-name", "--samples"):
        assert len(set(meanings[option].values())) == 1, (option, meanings[option])
