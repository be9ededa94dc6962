"""The command line on a PyTorch model of the user's own project, in processes of its own."""

import json
import subprocess
import sys

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
