"""What the tests of the TensorFlow backend share: small graphs, and the way from a graph to a quantized one."""

import json
import os

import hypothesis
import pytest
import tensorflow as tf
from graphs import randomize, session

import dopt_api

v1 = tf.compat.v1
v1.logging.set_verbosity(v1.logging.ERROR)

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(params=["switches", "functions"])
def control_flow(request):
    """Let the program's own conditionals be made of switches and merges, or of functions."""
    before = v1.control_flow_v2_enabled()
    (v1.disable_control_flow_v2 if request.param == "switches" else v1.enable_control_flow_v2)()
    yield request.param
    (v1.enable_control_flow_v2 if before else v1.disable_control_flow_v2)()


@pytest.fixture
def config_of(tmp_path):
    """Write the strategy file of a session's graph, every layer (or those named) set to a strategy."""

    def write(sess, strategy="Quant_INT8-8", only=None, **extra):
        path = dopt_api.generate_config(sess, None, tmp_path / "config.json")
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, layer in content["layer_strategy"].items():
            if only is None or name in only:
                layer.update(quant_strategy=strategy, **extra)
        path.write_text(json.dumps(content, indent=4), encoding="utf-8")
        return path

    return write


@pytest.fixture
def float_checkpoint(tmp_path):
    """Save a checkpoint of the float graph with weights like trained ones; return its path and the float outputs."""

    def save(build, *feeds, seed=0):
        with session(build) as (sess, net):
            randomize(sess, seed)
            path = v1.train.Saver().save(sess, str(tmp_path / "float" / "model"))
            given = {} if not tf.is_tensor(net.training) else {net.training: False}
            return path, [sess.run(net.logits, {net.x: x, **given}) for x in feeds]

    return save
