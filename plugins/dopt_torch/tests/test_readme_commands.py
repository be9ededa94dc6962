"""The commands of the README go from a project to the report, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[3] / "README.md"


def test_the_commands_quantize_the_project_that_stands_there(tmp_path):
    install, quantize = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert "pip install" in install
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-e", "-c", quantize]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 layers quantized" in done.stdout
    wanted = {"model.onnx", "quant_params.json", "model.qdq.onnx", "report.html"}
    assert wanted <= {path.name for path in (tmp_path / "output").iterdir()}
