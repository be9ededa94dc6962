"""The examples in PyTorch, as their users start them, at smoke size."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dopt_api.params import read_params

FOLDER = Path(__file__).parents[3] / "examples" / "torch_fashion_mnist"


def figures(text):
    """Return the accuracies that an example has printed, in percent, by name."""
    rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.endswith("%")]
    return {name.strip(): float(value.rstrip("%")) for name, value in rows}


def started(command, rank=None, port=None):
    """Start a program; with a rank, as ``torchrun --nproc_per_node 2`` does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if rank is not None:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment.update({name: str(value) for name, value in given.items()})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(*runs):
    """Return what the programs printed, all of them having ended well."""
    outputs = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(error for _, error in outputs)
    return "".join(output for output, _ in outputs)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_calibration(tmp_path):
    program = str(FOLDER / "calibrate.py")
    found = figures(finished(started([sys.executable, program, "--smoke", "--output-dir", str(tmp_path)])))
    assert found["float"] > 90
    assert found["calibrated, simulated in PyTorch"] == pytest.approx(found["float"], abs=2)
    assert found["calibrated, int8 in ONNX Runtime"] == pytest.approx(found["float"], abs=2)
    assert (tmp_path / "model.qdq.onnx").stat().st_size < 0.5 * (tmp_path / "model.onnx").stat().st_size


def test_retraining_by_two_processes(tmp_path):
    command = [str(FOLDER / "retrain.py"), "--smoke", "--output-dir", str(tmp_path)]
    port = free_port()
    if torch.__version__.startswith("1.11."):  # whose torchrun ends with a segmentation fault on Python 3.10
        runs = [started([sys.executable, *command], rank, port) for rank in range(2)]
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
        runs = [started([*launcher, *command])]
    found = figures(finished(*runs))
    assert found["calibrated, simulated in PyTorch"] < found["float"]
    assert found["retrained, simulated in PyTorch"] >= found["float"]
    assert found["retrained, integers in ONNX Runtime"] == pytest.approx(
        found["retrained, simulated in PyTorch"], abs=1
    )
    state = torch.load(tmp_path / "quant.pth")
    assert all(value.abs().item() > 1e-6 for name, value in state.items() if name.endswith("input_gain"))  # learned
    assert {layer.strategy for layer in read_params(tmp_path / "quant_params.json").layers} == {"Quant_INT8-4"}


def test_retraining_without_torchrun_says_what_to_type(tmp_path):
    command = [sys.executable, str(FOLDER / "retrain.py"), "--smoke", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Fix: torchrun --nproc_per_node 2" in done.stderr
