"""The code of the README and of the pages about PyTorch runs as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

from dopt_api.params import read_params

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"


def test_the_code_of_the_readme_goes_from_a_float_model_to_the_exported_files(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["model.onnx", "quant_params.json"]
    names = [layer.name for layer in read_params(tmp_path / "quant_params.json").layers]
    assert (
        names == list(json.loads((tmp_path / "config.json").read_text())["layer_strategy"]) == ["0/Conv2D", "5/Linear"]
    )


def test_the_code_of_the_page_on_mixed_precision_keeps_its_budget(tmp_path):
    parts = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mixed-precision.md").read_text("utf-8"), re.DOTALL)
    code = "\n".join(parts)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    layers = json.loads((tmp_path / "mixed.json").read_text())["layer_strategy"]
    assert {entry["quant_strategy"] for entry in layers.values()} == {"Quant_INT8-8", "Quant_INT8-4"}
    for name in ("sensitivity.png", "trade_off.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


BEFORE = """
import json, torch
from torch import nn
from dopt.dopt_torch.opt_main import generate_config_file, get_quant_loss, optimize_model
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
generate_config_file(model, "x:1,3,8,8", "config.json")
text = open("config.json").read().replace('"quant_strategy": "float"', '"quant_strategy": "Quant_INT8-4"')
open("config.json", "w").write(text)
quant_model = optimize_model(model, "config.json")
batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
"""


def test_the_code_of_the_page_on_pytorch_quantizes_and_retrains(tmp_path):
    text = (ROOT / "docs" / "pytorch.md").read_text("utf-8")
    parts = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "post_training" in code]
    parts += [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import smooth" in code]
    parts += [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import equalize" in code]
    parts += [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "freeze_norms" in code]
    assert len(parts) == 4
    after = "\nassert [one.reason for one in report] == ['', ''] and smoothed == ['4/Linear']\n"
    after += "assert pairs == [] and loss.isfinite()"
    code = BEFORE + "\n".join(parts) + after
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quant.pth").stat().st_size > 1000
