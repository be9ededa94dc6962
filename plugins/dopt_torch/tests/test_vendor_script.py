"""Scripts that know nothing but the vendor's import path."""

import json
import subprocess
import sys

import pytest

from dopt_api.params import read_params

MODEL = """
import sys
import torch
from torch import nn
from dopt.dopt_torch.opt_main import (
    generate_config_file, generate_final_model, get_quant_loss, optimize_model, set_calibrate_state,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net()


def data(batches):
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches):
        y = torch.randint(0, 3, (16,), generator=generator)
        yield torch.randn(16, 1, 10, 10, generator=generator) + y.view(-1, 1, 1, 1), y
"""

CONFIG = (
    MODEL
    + """
generate_config_file(build(), "x:1,1,10,10", dst_path="./config_gen.json")
"""
)

CALIBRATE = (
    MODEL
    + """
model = build()
quant_model = optimize_model(model, "config_gen.json")
set_calibrate_state(quant_model, True)
for x, _ in data(4):
    quant_model(x)
set_calibrate_state(quant_model, False)
torch.save(quant_model.state_dict(), "quant.pth")
generate_final_model(build(), "config_gen.json", pth_file="quant.pth", output_dir="./")
"""
)

RETRAIN = (
    MODEL
    + """
quant_model = optimize_model(build(), "config_gen.json")
optimizer = torch.optim.SGD(quant_model.parameters(), lr=0.02, momentum=0.9)
losses = []
for x, y in data(60):
    loss = nn.functional.cross_entropy(quant_model(x), y)
    total_loss = loss + 0.05 * get_quant_loss(quant_model)
    optimizer.zero_grad()
    total_loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), losses
torch.save(quant_model.state_dict(), "quant.pth")
generate_final_model(build(), config_file="config_gen.json", pth_file="quant.pth", output_dir="./")
"""
)


def run(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path):
    """A folder with a strategy file in which every layer is quantized."""
    done = run(CONFIG, tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "config_gen.json"
    text = path.read_text()
    assert text.count('"float"') == 3
    path.write_text(text.replace('"float"', '"Quant_INT8-8"'))
    return tmp_path


def test_the_strategy_file_has_the_layout_of_the_contract(project):
    content = json.loads((project / "config_gen.json").read_text())
    conv = "<class 'torch.nn.modules.conv.Conv2d'>"
    assert content[f"quant_strategy_for op '{conv}'"][0] == "Quant_INT8-8"
    assert content["input_shape"] == "x:1,1,10,10"
    assert list(content["layer_strategy"]) == ["conv1/Conv2D", "conv2/Conv2D", "fc/Linear"]
    assert content["layer_strategy"]["conv1/Conv2D"] == {"op_type": conv, "quant_strategy": "Quant_INT8-8"}


@pytest.mark.parametrize("script", [CALIBRATE, RETRAIN], ids=["calibration", "retraining"])
def test_a_vendor_style_script_runs_through_to_the_export(project, script):
    done = run(script, project)
    assert done.returncode == 0, done.stderr
    assert (project / "model.onnx").stat().st_size > 1000
    names = [layer.name for layer in read_params(project / "quant_params.json").layers]
    assert names == ["conv1/Conv2D", "conv2/Conv2D", "fc/Linear"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config_gen.json").unlink(), "cannot be read: No such file"),
        (lambda folder: edit(folder, "Quant_INT8-8", "Quant_INT8-9"), "Did you mean 'Quant_INT8-8'?"),
        (lambda folder: edit(folder, "conv2/Conv2D", "conv3/Conv2D"), "The model has no layer 'conv3/Conv2D'"),
        (
            lambda folder: edit(folder, '"quant_strategy": "Quant_INT8-8"\n', '"quant_strategy": "Quant_INT8-8",\n'),
            "comma",
        ),
    ],
    ids=["no file", "strategy", "layer", "comma"],
)
def test_a_mistake_ends_a_script_with_one_sentence_and_a_failing_exit_code(project, spoil, message):
    spoil(project)
    done = run(CALIBRATE, project)
    assert done.returncode == 1
    assert message in done.stderr
    assert "config_gen.json" in done.stderr
    assert not (project / "model.onnx").exists()


def edit(folder, old, new):
    path = folder / "config_gen.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
