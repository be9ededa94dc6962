"""The examples in TensorFlow, as their users start them, at smoke size."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from dopt_api.params import read_params

FOLDER = Path(__file__).parents[3] / "examples" / "tf_fashion_mnist"


def figures(program, folder):
    """Run an example and return the accuracies that it prints, in percent, by name."""
    command = [sys.executable, str(FOLDER / program), "--smoke", "--output-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=1) for line in done.stdout.splitlines()]
    return {name.strip(): float(value.rstrip("%")) for name, value in rows}


def test_calibration(tmp_path):
    found = figures("calibrate.py", tmp_path)
    assert found["float"] > 90
    assert found["the same, quant_flag 0"] == found["float"]
    assert found["calibrated, quant_flag 1"] == pytest.approx(found["float"], abs=2)
    assert found["frozen graph, weights alone quantized"] == pytest.approx(found["float"], abs=2)


def test_retraining(tmp_path):
    found = figures("retrain.py", tmp_path)
    assert found["calibrated, quant_flag 1"] < found["float"]
    assert found["retrained, quant_flag 1"] >= found["float"]
    assert found["frozen graph, weights alone quantized"] == pytest.approx(found["retrained, quant_flag 1"], abs=2)
    state = tf.train.load_checkpoint(str(tmp_path / "quant.ckpt"))
    gains = [name for name in state.get_variable_to_shape_map() if name.endswith("gain")]
    assert len(gains) == 8
    assert all(np.abs(state.get_tensor(name)).max() > 1e-6 for name in gains)  # learned
    assert {layer.strategy for layer in read_params(tmp_path / "quant_params.json").layers} == {"Quant_INT8-4"}
