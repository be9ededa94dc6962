"""The code of the README runs as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

from dopt_api.params import read_params

README = Path(__file__).parents[3] / "README.md"


def test_the_code_of_the_readme_goes_from_a_float_model_to_the_exported_files(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["model.onnx", "quant_params.json"]
    names = [layer.name for layer in read_params(tmp_path / "quant_params.json").layers]
    assert (
        names == list(json.loads((tmp_path / "config.json").read_text())["layer_strategy"]) == ["0/Conv2D", "5/Linear"]
    )
