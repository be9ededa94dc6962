"""The five calls reach the hooks of the model's backend with the right arguments."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

import dopt_api
from dopt_api.errors import ConfigError, ModelError
from dopt_api.types import InputSpec


@pytest.fixture
def model(install_backend, make_model):
    install_backend("alpha")
    return make_model("alpha")


@pytest.fixture
def chosen(model, tmp_path):
    """Return a strategy file that quantizes one of the two layers."""
    path = dopt_api.generate_config(model, "x:1,3,8,8", tmp_path / "config.json")
    content = json.loads(path.read_text())
    content["layer_strategy"]["fc"]["quant_strategy"] = "Quant_INT8-8"
    path.write_text(json.dumps(content))
    sys.modules["alpha_backend"].CALLS.clear()
    return path


def calls() -> list:
    return sys.modules["alpha_backend"].CALLS


def test_generate_config_writes_what_the_backend_found(model, tmp_path):
    path = dopt_api.generate_config(model, "x:1,3,8,8", tmp_path / "config.json")
    content = json.loads(path.read_text())
    assert list(content["layer_strategy"]) == ["conv1", "fc"]
    assert content["input_shape"] == "x:1,3,8,8"
    assert calls() == [("find_layers", model, "x:1,3,8,8")]


def test_generate_config_writes_into_the_current_folder_by_default(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dopt_api.generate_config(model) == Path("./config_gen.json")
    assert "input_shape" not in json.loads((tmp_path / "config_gen.json").read_text())
    assert calls() == [("find_layers", model, None)]


def test_optimize_passes_the_checked_plan_and_the_flags(model, chosen):
    assert dopt_api.optimize(model, chosen, is_train_flag="train", quant_flag="quant") == "quantized"
    found, (name, passed, plan, *flags) = calls()
    assert found == ("find_layers", model, "x:1,3,8,8")
    assert (name, passed, flags) == ("optimize", model, ["train", "quant"])
    assert list(plan.quantized) == ["fc"]
    assert plan.inputs == (InputSpec("x", (1, 3, 8, 8)),)
    assert plan.config_file == chosen


def test_flags_are_none_where_they_are_not_given(model, chosen):
    dopt_api.optimize(model, str(chosen))
    assert calls()[1][3:] == (None, None)


@pytest.mark.parametrize(("mode", "passed"), [(True, True), (0, False), (1, True)])
def test_set_calibrate_state_passes_a_boolean(model, mode, passed):
    dopt_api.set_calibrate_state(model, mode)
    assert calls() == [("set_calibrate_state", model, passed)]
    assert isinstance(calls()[0][2], bool)


def test_get_quant_loss_returns_the_backends_scalar(model):
    assert dopt_api.get_quant_loss(model) == 0.25
    assert calls() == [("get_quant_loss", model)]


def test_export_passes_paths_and_options(model, chosen, tmp_path):
    result = dopt_api.export(
        model, str(chosen), str(tmp_path / "quant.pth"), str(tmp_path), output_names=["y"], dynamic_batch=True
    )
    _, (name, passed, plan, *options) = calls()
    assert (name, passed, list(plan.quantized)) == ("export", model, ["fc"])
    assert options == [tmp_path / "quant.pth", tmp_path, ["y"], True]
    assert (result.model, result.params) == (tmp_path / "model.onnx", tmp_path / "quant_params.json")


def test_export_writes_into_the_current_folder_by_default(model, chosen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dopt_api.export(model, chosen, "quant.pth")
    assert calls()[1][4:] == (Path(), None, False)
    assert (tmp_path / "quant_params.json").is_file()


@pytest.mark.parametrize(
    "call",
    [
        lambda model, name: dopt_api.generate_config(model, backend=name),
        lambda model, name: dopt_api.optimize(model, "config.json", backend=name),
        lambda model, name: dopt_api.set_calibrate_state(model, True, backend=name),
        lambda model, name: dopt_api.get_quant_loss(model, backend=name),
        lambda model, name: dopt_api.export(model, "config.json", "a.pth", backend=name),
    ],
)
def test_every_call_takes_an_explicit_backend(model, install_backend, call):
    install_backend("beta")
    with pytest.raises(ModelError, match=r"The backend 'beta' does not handle a alpha.Net"):
        call(model, "beta")
    assert "alpha_backend" not in sys.modules


def test_backends_lists_what_is_installed(model):
    assert "alpha" in [status.name for status in dopt_api.backends()]


def test_a_model_without_layers_is_refused_with_the_reasons(install_backend, make_model, tmp_path):
    extra = '\nFOUND = ModelLayers((), (LayerInfo("lstm", "LSTM", (), "recurrent"),))\n'
    install_backend("alpha", extra=extra)
    with pytest.raises(ModelError, match=r"no layer that can be quantized \(lstm: recurrent\)"):
        dopt_api.generate_config(make_model("alpha"), None, tmp_path / "config.json")
    assert not (tmp_path / "config.json").exists()


def test_a_file_of_only_float_layers_is_worth_a_warning(model, tmp_path, caplog):
    path = dopt_api.generate_config(model, None, tmp_path / "config.json")
    with caplog.at_level(logging.WARNING, "dopt"):
        dopt_api.optimize(model, path)
    assert f"Every layer in {path} is 'float': nothing will be quantized." in caplog.messages


def test_a_file_that_quantizes_is_not(model, chosen, caplog):
    dopt_api.optimize(model, chosen)
    assert not any("nothing will be quantized" in message for message in caplog.messages)


def test_notes_of_the_backend_are_logged(model, tmp_path, caplog):
    dopt_api.generate_config(model, None, tmp_path / "config.json")
    assert [(record.name, record.message) for record in caplog.records] == [("dopt", "a note")]


def test_a_file_that_does_not_fit_stops_before_the_backend_changes_anything(model, chosen):
    chosen.write_text(chosen.read_text().replace("Quant_INT8-8", "Quant_INT9-9"))
    for call in (dopt_api.optimize, lambda *a: dopt_api.export(*a, "quant.pth")):
        with pytest.raises(ConfigError, match="Quant_INT9-9"):
            call(model, chosen)
    assert {name for name, *_ in calls()} == {"find_layers"}


def test_the_package_lists_its_calls_and_nothing_else():
    assert dir(dopt_api) == sorted(dopt_api.__all__)
    assert all(getattr(dopt_api, name) for name in dopt_api.__all__)
    with pytest.raises(AttributeError, match="module 'dopt_api' has no attribute 'optimise'"):
        dopt_api.optimise  # noqa: B018  # the access is what is tested


def test_outputs_are_refused_for_a_backend_that_does_not_record_them(model, chosen):
    content = json.loads(chosen.read_text())
    content["layer_strategy"]["fc"]["output"] = True
    chosen.write_text(json.dumps(content, indent=1))
    with pytest.raises(ConfigError, match=r"'alpha' does not record the outputs of layers.*no 'output' of layer 'fc'"):
        dopt_api.optimize(model, chosen)
    assert [call[0] for call in calls()] == ["find_layers"]
