"""``dopt quantize`` with a backend of the test's own: what it asks of the backend, and what it says."""

import json
import sys

import pytest
from click.testing import CliRunner

from dopt_api import extensions, facade, manager
from dopt_api.cli.group import dopt
from dopt_api.quantizer.rounding import RoundedLayer
from dopt_api.types import BackendInfo, ExportResult, LayerInfo, ModelLayers, Plan

CONFIG = '{"layer_strategy": {"fc/Linear": {"quant_strategy": "Quant_INT8-8"}}}'


class Backend:
    name = "mine"
    info = BackendInfo("mine", "numpy", "2.0", "0.1", (), "1.1")


def call(folder, *arguments):
    return CliRunner().invoke(
        dopt, ["quantize", "my_things:build", str(folder / "config.json"), str(folder / "out"), *arguments]
    )


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Put a backend in place, and return what it was asked for."""
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / "my_things.py").write_text("build = lambda: 'model'\nbatches = lambda: [1, 2]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_things", raising=False)
    found = {}

    def calibrate(model, config, batches, folder, **options):
        found.update(model=model, batches=list(batches), **options)
        return folder / "state", [RoundedLayer("fc/Linear", 0.5, 0.25), RoundedLayer("odd", reason="it is odd")]

    def export(model, config, checkpoint, output_dir, **options):
        found.update(checkpoint=checkpoint, **options)
        return ExportResult(output_dir / "model.onnx", output_dir / "quant_params.json", (output_dir / "a.csv",))

    monkeypatch.setattr(manager, "select", lambda *_: Backend())
    layers = tuple(LayerInfo(name, "Linear") for name in ("fc/Linear", "head/Linear"))
    model_layers = ModelLayers(layers, (LayerInfo("lstm", "LSTM", (), "its weights change"),))
    plan = Plan(tmp_path / "config.json", (), {"fc/Linear": 1}, model_layers)
    monkeypatch.setattr(facade, "check", lambda *_, **__: plan)
    monkeypatch.setattr(facade, "export", export)
    monkeypatch.setattr(extensions, "load", loading({(extensions.POST_TRAINING, "mine"): (calibrate, "a test")}))
    return found


def loading(known):
    """What loads known extensions and no others."""
    return lambda group, name: known[group, name]


def test_options_reach_the_backend_and_files_are_named(asked, tmp_path):
    options = ("--samples", "8", "--short-sums", "--seconds", "5", "--format", "csv", "--output-name", "y")
    result = call(tmp_path, "--data", "my_things:batches", *options, "--dynamic-batch")
    assert result.exit_code == 0, result.output
    progress = asked.pop("progress")
    assert list(progress([1, 2])) == [1, 2]
    assert asked == {
        "model": "model",
        "batches": [1, 2],
        "samples": 8,
        "short_sums": True,
        "seconds": 5.0,
        "checkpoint": tmp_path / "out" / "checkpoint" / "state",
        "output_names": ["y"],
        "dynamic_batch": True,
        "formats": ("csv",),
        "backend": "mine",
    }
    lines = result.output.splitlines()
    assert lines[:2] == [
        "2 layers quantized, the weights of 1 rounded for the outputs",
        "1 rounded to nearest: it is odd",
    ]
    names = ["model.onnx", "quant_params.json", "a.csv", "quantization.json"]
    assert lines[2:] == [str(tmp_path / "out" / name) for name in names]
    report = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert report["versions"]["backend mine"] == "0.1"
    assert report["float"] == ["head/Linear"]
    assert report["not_quantizable"] == [{"name": "lstm", "op_type": "LSTM", "reason": "its weights change"}]
    assert report["layers"][1] == {"name": "odd", "nearest": 0.0, "rounded": 0.0, "reason": "it is odd"}
    assert json.loads(call(tmp_path, "--data", "my_things:batches", "--json").output)["layers"] == report["layers"]


def test_a_backend_without_post_training_is_told(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(extensions, "load", loading({}))
    result = call(tmp_path, "--data", "my_things:batches")
    assert result.exit_code == 1
    assert "The backend 'mine' has no post-training of its own" in result.output
    assert not (tmp_path / "out").exists()


def test_wrong_calls(asked, tmp_path, monkeypatch):
    result = call(tmp_path)
    assert result.exit_code == 2
    assert "Missing option '--data'" in result.output
    assert "names no function" in call(tmp_path, "--data", "my_things").output
    assert "Did you mean 'csv'?" in call(tmp_path, "--data", "my_things:batches", "--format", "cvs").output
    nothing = Plan(tmp_path / "config.json", (), {}, ModelLayers(()))
    monkeypatch.setattr(facade, "check", lambda *_, **__: nothing)
    assert "is 'float'. Fix: dopt config set" in call(tmp_path, "--data", "my_things:batches").output
    assert not asked
