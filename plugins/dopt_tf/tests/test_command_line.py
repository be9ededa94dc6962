"""The command line on a TensorFlow graph of the user's own project, in processes of its own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import killing
import pytest

PROJECT = """
import numpy as np
import tensorflow as tf

v1 = tf.compat.v1

def build():
    numbers = np.random.default_rng(0)
    with tf.Graph().as_default():
        x = v1.placeholder(tf.float32, [None, 8], name="x")
        kernel = v1.get_variable("kernel", initializer=numbers.standard_normal((8, 6)).astype("f"))
        y = tf.nn.relu(tf.matmul(x, kernel, name="first"))
        other = v1.get_variable("other", initializer=numbers.standard_normal((6, 3)).astype("f"))
        tf.identity(tf.matmul(y, other, name="second"), name="logits")
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        return session

def feeds():
    numbers = np.random.default_rng(1)
    return [{"x:0": numbers.standard_normal((16, 8)).astype("f")} for _ in range(3)]
"""


def dopt(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "dopt_api.cli", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def project(tmp_path):
    (tmp_path / "mine.py").write_text(PROJECT)
    made = dopt(tmp_path, "config", "new", "mine:build", "config.json")
    assert (made.returncode, made.stdout) == (0, "config.json: 2 layers\n"), made.stderr
    assert dopt(tmp_path, "config", "set", "config.json", "--strategy", "Quant_INT8-4").returncode == 0
    return tmp_path


def test_one_command_leads_from_the_session_to_the_files(project):
    command = ("quantize", "mine:build", "config.json", "out", "--data", "mine:feeds", "--format", "csv")
    result = dopt(project, *command, "--output-name", "logits", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["files"] == [
        f"out/{name}" for name in ("model.pb", "quant_params.json", "quant_params.csv", "quantization.json")
    ]
    assert [layer["name"] for layer in found["layers"]] == ["first", "second"]
    assert all(0 < layer["rounded"] <= layer["nearest"] < 1 for layer in found["layers"])
    assert sorted(file.name for file in (project / "out").iterdir() if file.is_file()) == sorted(
        file[4:] for file in found["files"]
    )
    notes = json.loads((project / "out" / "quantization.json").read_text())
    assert {name: sum(one["counts"]) for name, one in notes["inputs"].items()} == {"first": 48 * 8, "second": 48 * 6}
    before = {name: (project / name).read_bytes() for name in found["files"]}
    assert dopt(project, *command, "--output-name", "logits").returncode == 0
    assert {name: (project / name).read_bytes() for name in found["files"]} == before
    bare = PROJECT.replace("session.run(v1.global_variables_initializer())", "session.graph.get_operations()")
    (project / "mine.py").write_text(bare)
    refused = dopt(project, *command)
    assert (refused.returncode, "variables without a value" in refused.stderr) == (1, True), refused.stderr
    (project / "mine.py").write_text(PROJECT)
    refused = dopt(project, *command)
    assert (refused.returncode, "a list of the names of the output nodes" in refused.stderr) == (1, True)


def test_a_command_killed_anywhere_and_started_again_ends_with_the_same_bytes(project):
    modules = "dopt_tf.plugin,dopt_tf.post_training,dopt_tf.export,dopt_api.report.notes,rich.progress"
    command = ("quantize", "mine:build", "config.json", "OUT", "--data", "mine:feeds", "--output-name", "logits")
    result = subprocess.run(
        [sys.executable, Path(killing.__file__), modules, "3", *command],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    state = [f"checkpoint/quantized.{part}" for part in ("data-00000-of-00001", "index")]
    assert found["files"] == [*state, "model.pb", "quant_params.json", "quantization.json"]
    assert found["moments"] >= len(found["found"]) - 1 >= 3
    assert [row[1:] for row in found["found"]] == [[signal.SIGKILL, 0, []]] * len(found["found"])


def test_sensitivity_is_measured_at_the_named_output(project):
    assert dopt(project, "config", "set", "config.json", "--strategy", "Quant_INT8-8").returncode == 0
    (project / "tuning.py").write_text(TUNING)
    found = subprocess.run([sys.executable, "tuning.py"], cwd=project, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    choices = json.loads(found.stdout)
    assert [(layer, strategy) for layer, strategy, _ in choices] == [
        (layer, strategy) for layer in ("first", "second") for strategy in ("Quant_INT8-8", "Quant_INT8-4", "float")
    ]
    damages = [damage for _, _, damage in choices]
    assert 0 < damages[0] < damages[1] < 0.1
    assert 0 < damages[3] < damages[4] < 0.1
    command = ("tune", "mine:build", "config.json", "--data", "mine:feeds", "--budget", "70%")
    refused = dopt(project, *command)
    assert (refused.returncode, "--output-name logits" in refused.stderr) == (1, True), refused.stderr
    refused = dopt(project, *command, "--output-name", "missing")
    assert (refused.returncode, "has no such output" in refused.stderr) == (1, True), refused.stderr


TUNING = """
import json
from pathlib import Path
import mine
from dopt_tf.sensitivity import sensitivity_of

names = ["Quant_INT8-8", "Quant_INT8-4"]
found = sensitivity_of(mine.build(), Path("config.json"), mine.feeds(), names, cost="size", output_names=["logits"])
print(json.dumps([(one.layer, one.strategy, one.damage) for one in found]))
"""
