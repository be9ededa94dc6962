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
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mixed-precision.md").read_text("utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    layers = json.loads((tmp_path / "mixed.json").read_text())["layer_strategy"]
    assert {entry["quant_strategy"] for entry in layers.values()} == {"Quant_INT8-8", "Quant_INT8-4"}
