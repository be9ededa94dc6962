"""The command line on a PyTorch model of the user's own project, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import killing
import pytest

MODELS = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)).eval()

def other():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()
"""


def dopt(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "dopt_api.cli", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def project(tmp_path):
    (tmp_path / "my_models.py").write_text(MODELS)
    made = dopt(tmp_path, "config", "new", "my_models:build", "config.json", "--input-shape", "x:1,3,8,8")
    assert (made.returncode, made.stdout) == (0, "config.json: 2 layers\n"), made.stderr
    return tmp_path


def test_a_strategy_file_is_made_edited_and_checked_against_the_model(project):
    assert dopt(project, "config", "set", "config.json", "--strategy", "Quant_INT8-8").returncode == 0
    result = dopt(project, "config", "check", "config.json", "--model", "my_models:build")
    assert (result.returncode, "fits the model: 2 of 2 layers" in result.stdout) == (0, True), result.stderr
    layers = json.loads((project / "config.json").read_text())["layer_strategy"]
    assert {layer["quant_strategy"] for layer in layers.values()} == {"Quant_INT8-8"}


def test_the_file_of_another_model_is_refused_in_a_sentence(project):
    result = dopt(project, "config", "check", "config.json", "--model", "my_models:other")
    assert result.returncode == 1
    assert "The model has no layer '2/Linear'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_installation_is_sound(project):
    result = dopt(project, "doctor", "--json")
    rows = {row["what"]: row for row in json.loads(result.stdout)}
    assert rows["backend torch"]["state"] == "ok"
    assert rows["import dopt"]["state"] == "ok"


DATA = """

import torch

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield torch.randn(4, 3, 8, 8, generator=generator)

def nothing():
    return []

def grey():
    return [torch.zeros(4, 1, 8, 8)]
"""

WEIGHTS = """
def trained():
    torch.manual_seed(0)
    return build()
"""

KILLED = """
import signal
from dopt_torch import checkpoint, rounding
from dopt_api.cli.group import dopt

checkpoint.KeptWork._SECONDS = -1.0
real = rounding._Rounding.conclude

def conclude(self, *arguments):
    if self.quantizer.plan.name == "2/Linear":
        signal.raise_signal(signal.SIGKILL)
    real(self, *arguments)

rounding._Rounding.conclude = conclude
dopt()
"""

QUANTIZE = ("quantize", "my_models:trained", "config.json", "out", "--data", "my_data:batches")


@pytest.fixture
def chosen(project):
    """A project with weights, data, and a strategy file that quantizes every layer."""
    (project / "my_models.py").write_text(MODELS + WEIGHTS)
    (project / "my_data.py").write_text(DATA)
    assert dopt(project, "config", "set", "config.json", "--strategy", "Quant_INT8-4").returncode == 0
    return project


def test_one_command_leads_from_the_float_model_to_the_files(chosen):
    result = dopt(chosen, *QUANTIZE, "--format", "onnx_qdq", "--format", "csv", "--dynamic-batch")
    assert result.returncode == 0, result.stderr
    assert "2 layers quantized, the weights of 2 rounded for the outputs" in result.stdout
    names = ["checkpoint", "model.onnx", "model.qdq.onnx", "quant_params.csv", "quant_params.json", "quantization.json"]
    assert sorted(file.name for file in (chosen / "out").iterdir()) == names
    assert [file.name for file in (chosen / "out" / "checkpoint").iterdir()] == ["quantized.pth"]
    assert all(f"out/{name}" in result.stdout for name in names[1:])
    report = json.loads((chosen / "out" / "quantization.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == ["0/Conv2D", "2/Linear"]
    assert all(0 < layer["rounded"] <= layer["nearest"] < 1 for layer in report["layers"])
    assert {name: sum(one["counts"]) for name, one in report["inputs"].items()} == {
        "0/Conv2D": 12 * 3 * 8 * 8,
        "2/Linear": 12 * 144,
    }
    checked = dopt(chosen, "verify", "out", "--json")
    assert checked.returncode == 0, checked.stderr
    assert min(layer["sqnr_db"] for layer in json.loads(checked.stdout)["layers"]) > 10


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(chosen):
    assert dopt(chosen, *QUANTIZE).returncode == 0
    wanted = {file.name: file.read_bytes() for file in (chosen / "out").glob("*.*")}
    (chosen / "killed.py").write_text(KILLED)
    arguments = ["again" if one == "out" else one for one in QUANTIZE]
    killed = subprocess.run([sys.executable, "killed.py", *arguments], cwd=chosen, capture_output=True, check=False)
    assert killed.returncode < 0
    assert [file.name for file in (chosen / "again").rglob("*.*")] == ["unfinished.pth"]
    assert dopt(chosen, *arguments).returncode == 0
    assert {file.name: file.read_bytes() for file in (chosen / "again").glob("*.*")} == wanted


def test_a_command_killed_anywhere_and_started_again_ends_with_the_same_bytes(chosen):
    modules = "dopt_torch.plugin,dopt_torch.post_training,dopt_torch.export,torch.onnx,dopt_api.formats.onnx_qdq"
    program = (Path(killing.__file__), f"{modules},dopt_api.report.notes,rich.progress", "6")
    result = subprocess.run(
        [sys.executable, *program, *QUANTIZE[:3], "OUT", *QUANTIZE[4:], "--format", "onnx_qdq"],
        cwd=chosen,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    names = ["checkpoint/quantized.pth", "model.onnx", "model.qdq.onnx", "quant_params.json", "quantization.json"]
    assert found["files"] == names
    assert found["moments"] >= len(found["found"]) - 1 >= 6
    assert [row[1:] for row in found["found"]] == [[signal.SIGKILL, 0, []]] * len(found["found"])


def test_what_cannot_be_quantized_is_said_before_anything_is_written(chosen):
    for change, what in (
        ({"my_data:batches": "my_data:nothing"}, "'my_data:nothing' returned no batches"),
        ({"my_data:batches": "my_data:missing"}, "'my_data' has no function 'missing'"),
        (
            {"my_data:batches": "my_data:grey"},
            "Batch 1 of 'my_data:grey' (torch.Tensor [4, 1, 8, 8]) did not go through",
        ),
        ({"my_models:trained": "my_models:other"}, "The model has no layer '2/Linear'"),
        ({"quantize": "quantize --format=cvs"}, "Did you mean 'csv'?"),
    ):
        arguments = " ".join(change.get(one, one) for one in QUANTIZE).split()
        result = dopt(chosen, *arguments)
        assert (result.returncode, what in result.stderr) == (1, True), result.stderr
        assert "Traceback (most" not in result.stderr
        assert not [file for file in (chosen / "out").rglob("*.*") if file.is_file()]
    assert dopt(chosen, "config", "set", "config.json", "--strategy", "float").returncode == 0
    assert "Every layer in config.json is 'float'" in dopt(chosen, *QUANTIZE).stderr


TUNE = ("tune", "my_models:trained", "config.json", "--data", "my_data:batches", "--strategy", "Quant_INT8-8")


def test_strategies_are_chosen_within_a_budget(chosen):
    assert dopt(chosen, "config", "set", "config.json", "--strategy", "Quant_INT8-8").returncode == 0
    options = ("--strategy", "Quant_INT8-4", "--output", "mixed.json", "--picture", "trade_off.svg")
    result = dopt(chosen, *TUNE, "--budget", "80%", *options, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert 0.5 * found["of"] < found["cost"] <= 0.8 * found["of"] == 0.8 * 8 * (4 * 27 + 2 * 144)
    assert sorted(found["strategies"].values()) == ["Quant_INT8-4", "Quant_INT8-8"]
    layers = json.loads((chosen / "mixed.json").read_text())["layer_strategy"]
    assert {name: layer["quant_strategy"] for name, layer in layers.items()} == found["strategies"]
    assert found["files"] == ["trade_off.svg", "mixed.json", "mixed.tuning.json"]
    measured = json.loads((chosen / "mixed.tuning.json").read_text())
    assert len(measured["choices"]) == 6
    assert measured["points"][0]["strategies"] == found["strategies"]
    assert "<svg" in (chosen / "trade_off.svg").read_text()
    shown = dopt(chosen, *TUNE, *options, "--budget", "0.8")
    assert "predicted damage" in shown.stdout
    assert shown.stdout.splitlines()[-2:] == ["mixed.json", "mixed.tuning.json"]
    quantized = dopt(chosen, *("mixed.json" if one == "config.json" else one for one in QUANTIZE))
    assert quantized.stdout.splitlines()[-1] == "out/tuning.json", quantized.stderr
    assert (chosen / "out/tuning.json").read_bytes() == (chosen / "mixed.tuning.json").read_bytes()


def test_what_cannot_be_chosen_is_a_sentence(chosen):
    for change, status, what in (
        (("--budget", "10%"), 1, "cannot be kept"),
        (("--budget", "much"), 2, "'much' is no share, such as 70% or 0.7."),
        (("--budget", "70%", "--strategy", "Quant_INT8-9"), 1, "There is no strategy 'Quant_INT8-9'. Did you mean"),
    ):
        result = dopt(chosen, *TUNE, *change)
        assert (result.returncode, what in result.stderr) == (status, True), result.stderr
        assert "Traceback" not in result.stderr
