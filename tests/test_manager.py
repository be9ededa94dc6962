"""Backends: found by their metadata, loaded one at a time, held to the hook contract."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from dopt_api import manager
from dopt_api.errors import BackendError, ModelError
from dopt_api.types import Capabilities, ExportResult, ModelLayers


def status_of(name: str) -> manager.BackendStatus:
    (status,) = [status for status in manager.statuses() if status.name == name]
    return status


def hook(name: str, arguments: str, body: str) -> str:
    """Return the code of a hook that replaces the one of the model backend."""
    return f"\n@hookimpl\ndef {name}({arguments}):\n    {body}\n"


# ---- dispatch


def test_a_model_finds_its_backend_without_loading_others(install_backend, make_model):
    for name in ("alpha", "beta", "gamma"):
        install_backend(name)
    backend = manager.select(make_model("beta"))
    assert backend.name == "beta"
    assert backend.info.framework == "beta"
    assert "beta_backend" in sys.modules
    assert not {"alpha_backend", "gamma_backend"} & set(sys.modules)


def test_a_subclass_of_a_models_class_finds_the_backend_of_its_base(install_backend, make_model):
    install_backend("alpha")
    install_backend("beta")
    model = make_model("my_project.networks", "Custom", base=type(make_model("beta")))
    assert manager.select(model).name == "beta"
    assert "alpha_backend" not in sys.modules


def test_a_backend_may_have_another_name_than_the_models_package(install_backend, make_model):
    install_backend("alpha", extra='\nNAME = "other.Net"\n')
    install_backend(
        "zeta",
        extra=hook(
            "dopt_describe_backend", "", 'return BackendInfo("zeta", "other", None, "0.1", ("other.nn.Net",), "1.0")'
        ),
    )
    assert manager.select(make_model("other.nn")).name == "zeta"


def test_an_explicit_backend_is_the_only_one_loaded(install_backend, make_model):
    install_backend("alpha")
    install_backend("beta")
    assert manager.select(make_model("alpha"), "alpha").name == "alpha"
    assert "beta_backend" not in sys.modules


def test_an_explicit_backend_must_handle_the_model(install_backend, make_model):
    install_backend("alpha")
    with pytest.raises(
        ModelError, match=r"The backend 'alpha' does not handle a beta.Net.*alpha.Net or alpha.Quantized"
    ):
        manager.select(make_model("beta"), "alpha")


def test_a_foreign_model_names_its_type_and_what_is_installed(install_backend, make_model):
    install_backend("alpha")
    with pytest.raises(ModelError, match=r"No backend handles a foreign.nn.Net.*installed: alpha") as caught:
        manager.select(make_model("foreign.nn"))
    assert "Pass a model object" in caught.value.fix


@pytest.mark.parametrize("thing", [None, "model.pth", {"conv1.weight": 1}, object])
def test_things_that_are_no_models(install_backend, thing):
    install_backend("alpha")
    with pytest.raises(ModelError, match="Pass a model object, not its class, path or state dict"):
        manager.select(thing)


def test_a_model_of_a_known_framework_says_what_to_install(monkeypatch, make_model):
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    with pytest.raises(ModelError, match=r"\(installed: none\). Fix: pip install dopt-torch"):
        manager.select(make_model("torch.nn.modules.module", "Module"))


def test_a_foreign_model_mentions_backends_that_do_not_load(install_backend, make_model):
    install_backend("alpha", extra="\nimport no_such_framework\n")
    with pytest.raises(ModelError, match=r"alpha: The backend 'alpha' does not import: ModuleNotFoundError"):
        manager.select(make_model("alpha"))


def test_a_broken_backend_does_not_stand_in_the_way_of_another(install_backend, make_model):
    install_backend("alpha", extra="\n1 / 0\n")
    install_backend("beta")
    assert manager.select(make_model("beta")).name == "beta"


# ---- loading


def test_a_backend_is_loaded_once(install_backend):
    install_backend("alpha")
    assert manager.load("alpha") is manager.load("alpha")


def test_an_unknown_name_lists_the_known_ones_and_hints(install_backend):
    install_backend("alpha")
    with pytest.raises(BackendError, match=r"There is no backend 'alhpa'.*'alpha'.*Did you mean 'alpha'\?"):
        manager.load("alhpa")


def test_an_unknown_name_says_what_to_install(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    with pytest.raises(BackendError, match=r"an installed backend \(none is\). Fix: pip install dopt-torch"):
        manager.load("torch")
    with pytest.raises(BackendError, match="pip install dopt-paddle"):
        manager.load("paddle")


def test_a_clash_names_both_distributions(install_backend, make_model):
    install_backend("alpha", distribution="dopt-alpha", version="1.0")
    install_backend("alpha", distribution="other-alpha", version="2.5", module="other_backend")
    with pytest.raises(BackendError, match="The backend 'alpha' comes from two distributions") as caught:
        manager.load("alpha")
    assert caught.value.where == "dopt-alpha 1.0 and other-alpha 2.5"
    assert caught.value.fix.endswith("pip uninstall other-alpha")
    assert not {"alpha_backend", "other_backend"} & set(sys.modules)
    assert status_of("alpha").distribution == "dopt-alpha 1.0 and other-alpha 2.5"
    assert "two distributions" in status_of("alpha").error


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("\nimport no_such_framework\n", "ModuleNotFoundError: No module named 'no_such_framework'"),
        ("\nraise RuntimeError('no device')\n", "RuntimeError: no device"),
        ("\ndef broken(:\n", "SyntaxError"),
        ("\nraise ValueError\n", "ValueError"),
    ],
)
def test_an_import_failure_is_isolated_and_names_the_distribution(install_backend, extra, reason):
    install_backend("alpha", extra=extra, version="3.1")
    install_backend("beta")
    with pytest.raises(BackendError, match=f"The backend 'alpha' does not import: {reason}") as caught:
        manager.load("alpha")
    assert caught.value.where == "dopt-alpha 3.1, entry point 'alpha_backend'"
    assert caught.value.fix.endswith("pip install --force-reinstall dopt-alpha")
    assert caught.value.__cause__ is not None
    broken = status_of("alpha")
    assert (broken.info, broken.distribution) == (None, "dopt-alpha 3.1")
    assert reason in broken.error
    assert status_of("beta").error == ""


def test_an_entry_point_that_leads_nowhere(install_backend, tmp_path):
    install_backend("alpha")
    (tmp_path / "site" / "alpha_backend.py").unlink()
    assert "does not import: ModuleNotFoundError" in status_of("alpha").error


def test_a_failing_description_is_isolated_as_well(install_backend):
    install_backend("alpha", extra=hook("dopt_describe_backend", "", "raise OSError('driver missing')"))
    install_backend("beta")
    assert "dopt_describe_backend raised OSError: driver missing" in status_of("alpha").error
    assert status_of("beta").info is not None


def test_statuses_describe_what_is_installed(install_backend):
    install_backend("alpha", version="1.2")
    status = status_of("alpha")
    assert (status.distribution, status.error) == ("dopt-alpha 1.2", "")
    assert status.info.framework_version == "2.0"
    assert status.info.capabilities == Capabilities()


def test_backends_have_a_repr(install_backend):
    install_backend("alpha")
    assert repr(manager.load("alpha")) == "Backend('alpha', dopt-alpha 1.0)"


# ---- the hook contract


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ("\ndel dopt_optimize\n", "it does not implement dopt_optimize with @hookimpl"),
        ("\ndef dopt_export(model, plan): ...\n", "it does not implement dopt_export with @hookimpl"),
        (
            hook("dopt_optimize", "model, plan, device", "return model"),
            "dopt_optimize has the unknown argument 'device'",
        ),
        (hook("dopt_optimize", "model, **others", "return model"), "dopt_optimize has the unknown argument 'others'"),
        (
            hook("dopt_optimize", "model, plan=None", "return model"),
            "dopt_optimize gives the argument 'plan' a default",
        ),
        (hook("dopt_optimise", "model", "return model"), "unknown hook 'dopt_optimise'"),
        (hook("dopt_describe_backend", "", "return {}"), "dopt_describe_backend returned dict instead of BackendInfo"),
        (hook("dopt_describe_backend", "", "pass"), "dopt_describe_backend returned NoneType instead of BackendInfo"),
        (
            hook("dopt_describe_backend", "", 'return BackendInfo("beta", "a", None, "0", ("a.Net",), "1.0")'),
            "it calls itself 'beta', but its entry point is called 'alpha'",
        ),
        (
            hook("dopt_describe_backend", "", 'return BackendInfo("alpha", "a", None, "0", "a.Net", "1.0")'),
            "model_types is 'a.Net', not a tuple of names",
        ),
    ],
)
def test_a_backend_that_breaks_the_contract_is_refused(install_backend, extra, problem):
    install_backend("alpha", extra=extra)
    with pytest.raises(BackendError, match="The backend 'alpha' breaks the hook contract") as caught:
        manager.load("alpha")
    assert problem in caught.value.what
    assert caught.value.where == "dopt-alpha 1.0"
    assert problem in status_of("alpha").error


@pytest.mark.parametrize("version", ["0.9", "2.0"])
def test_another_major_version_of_the_hooks_is_refused(install_backend, version):
    description = f'return BackendInfo("alpha", "a", None, "0", ("a.Net",), "{version}")'
    install_backend("alpha", extra=hook("dopt_describe_backend", "", description))
    with pytest.raises(BackendError, match=f"was written for hook API {version}.*hook API 1.2.*go together"):
        manager.load("alpha")


def test_another_minor_version_of_the_hooks_is_accepted(install_backend):
    description = 'return BackendInfo("alpha", "a", None, "0", ("a.Net",), "1.7")'
    install_backend("alpha", extra=hook("dopt_describe_backend", "", description))
    assert manager.load("alpha").info.hook_api_version == "1.7"


def test_a_hook_may_take_only_the_arguments_it_needs(install_backend):
    install_backend("alpha", extra=hook("dopt_optimize", "plan", "return ['quantized', plan]"))
    assert manager.load("alpha").optimize("model", "plan", None, None) == ["quantized", "plan"]


WRONG_RETURNS = [
    ("dopt_find_layers", "find_layers", ("model", None), "return []", "list instead of ModelLayers"),
    ("dopt_find_layers", "find_layers", ("model", None), "pass", "NoneType instead of ModelLayers"),
    ("dopt_optimize", "optimize", ("model", "plan", None, None), "pass", "NoneType instead of something"),
    ("dopt_set_calibrate_state", "set_calibrate_state", ("model", True), "return True", "bool instead of NoneType"),
    ("dopt_get_quant_loss", "get_quant_loss", ("model",), "pass", "NoneType instead of something"),
    (
        "dopt_export",
        "export",
        ("model", "plan", Path("a.pth"), Path(), None, False),
        "return 'model.onnx'",
        "str instead of ExportResult",
    ),
]


@pytest.mark.parametrize(("name", "method", "arguments", "body", "problem"), WRONG_RETURNS)
def test_what_a_hook_returns_is_checked(install_backend, name, method, arguments, body, problem):
    install_backend("alpha", extra=hook(name, "", body))
    with pytest.raises(BackendError, match=f"{name} returned {problem}"):
        getattr(manager.load("alpha"), method)(*arguments)


def test_layers_of_the_same_name_are_refused(install_backend):
    body = 'return ModelLayers((LayerInfo("fc", "Linear"), LayerInfo("fc", "Linear")))'
    install_backend("alpha", extra=hook("dopt_find_layers", "", body))
    with pytest.raises(BackendError, match="dopt_find_layers returned two layers of the same name"):
        manager.load("alpha").find_layers("model", None)


@pytest.mark.parametrize("missing", ["model.onnx", "quant_params.json"])
def test_an_export_that_wrote_nothing_is_found_out(install_backend, tmp_path, missing):
    body = 'return ExportResult(output_dir / "model.onnx", output_dir / "quant_params.json")'
    install_backend("alpha", extra=hook("dopt_export", "output_dir", body))
    for name in {"model.onnx", "quant_params.json"} - {missing}:
        (tmp_path / name).write_text("")
    with pytest.raises(BackendError, match=f"dopt_export returned '.*{missing}', which is not there"):
        manager.load("alpha").export("model", "plan", Path("a.pth"), tmp_path, None, False)


def test_errors_of_a_hook_pass_through_unchanged(install_backend):
    install_backend("alpha", extra=hook("dopt_optimize", "model", "raise LookupError(model)"))
    with pytest.raises(LookupError, match="my model"):
        manager.load("alpha").optimize("my model", "plan", None, None)


def test_right_returns_are_passed_on(install_backend, tmp_path):
    install_backend("alpha")
    backend = manager.load("alpha")
    assert isinstance(backend.find_layers("model", "x:1,3"), ModelLayers)
    assert backend.optimize("model", "plan", None, None) == "quantized"
    assert backend.set_calibrate_state("model", True) is None
    assert backend.get_quant_loss("model") == 0.25
    result = backend.export("model", "plan", Path("a.pth"), tmp_path, None, False)
    assert isinstance(result, ExportResult)
    assert result.params.is_file()


def test_two_backends_do_not_answer_for_each_other(install_backend):
    install_backend("alpha", extra=hook("dopt_get_quant_loss", "", "return 'loss of alpha'"))
    install_backend("beta", extra=hook("dopt_get_quant_loss", "", "return 'loss of beta'"))
    alpha, beta = manager.load("alpha"), manager.load("beta")
    assert alpha.get_quant_loss(None) == "loss of alpha"
    assert beta.get_quant_loss(None) == "loss of beta"


def test_a_backend_may_be_an_object_with_methods(install_backend):
    methods = "\n".join(
        f"    @hookimpl\n    def {name}(self{', ' + arguments if arguments else ''}): return {value}"
        for name, arguments, value in [
            ("dopt_describe_backend", "", 'BackendInfo("alpha", "a", None, "0", ("a.Net",), "1.0")'),
            ("dopt_find_layers", "model", "FOUND"),
            ("dopt_optimize", "model", "self"),
            ("dopt_set_calibrate_state", "model", "None"),
            ("dopt_get_quant_loss", "model", "0.5"),
            ("dopt_export", "model", "None"),
        ]
    )
    install_backend("alpha", module="object_backend", extra=f"\nclass Plugin:\n{methods}\n\nplugin = Plugin()\n")
    (point,) = metadata.entry_points(group=manager.GROUP, name="alpha")
    backend = manager.Backend("alpha", point.load().plugin, "here")
    assert backend.get_quant_loss(None) == 0.5
