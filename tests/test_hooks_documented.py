"""A hook without a page or without a test fails here, and the page's example is a backend that loads and runs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dopt_api import hookspec, manager
from dopt_api.errors import CheckpointError, ModelError
from dopt_api.params import read_params
from dopt_api.strategy import STRATEGIES
from dopt_api.types import LayerPlan, Plan

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "hooks.md").read_text(encoding="utf-8")
HOOKS = [name for name in hookspec.__all__ if name.startswith("dopt_")]
every_hook = pytest.mark.parametrize("hook", HOOKS)


def section(hook: str) -> str:
    """Return the text under the heading of a hook."""
    found = re.search(rf"^## `{hook}`$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/hooks.md has no heading '## `{hook}`'"
    return found[1]


def test_there_are_hooks():
    assert len(HOOKS) >= 6


@every_hook
def test_every_hook_has_a_docs_section_with_its_arguments_and_errors(hook):
    text = section(hook)
    specification = getattr(hookspec, hook)
    for argument in inspect.signature(specification).parameters:
        assert f"`{argument}`" in text
    for error in re.findall(r"dopt_api\.errors\.(\w+):", specification.__doc__):
        assert f"`{error}`" in text
    for part in ("Purpose", "Arguments", "Returns", "Errors", "Example"):
        assert f"**{part}" in text


@pytest.fixture
def maker():
    """The program that makes the page."""
    specification = importlib.util.spec_from_file_location("hooks_page", TESTS.parent / "docs" / "hooks_page.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_is_what_the_specifications_say(maker):
    assert maker.page(PAGE) == PAGE, "python docs/hooks_page.py"


@every_hook
def test_a_hook_without_documentation_has_no_page(hook, maker, monkeypatch):
    document = getattr(hookspec, hook).__doc__
    for without in ("", document.partition("\n")[0], document.replace("Args:", "Note:").replace("Returns:", "Note:")):
        monkeypatch.setattr(getattr(hookspec, hook), "__doc__", without)
        with pytest.raises(SystemExit, match=hook):
            maker.section_of(hook)


@every_hook
def test_every_hook_is_tested(hook):
    others = [file for file in TESTS.rglob("test_*.py") if file != Path(__file__)]
    assert any(hook in file.read_text(encoding="utf-8") for file in others)


@every_hook
def test_every_hook_has_a_docstring_with_an_example(hook):
    assert ">>>" in getattr(hookspec, hook).__doc__


def test_the_page_documents_no_hook_that_does_not_exist():
    assert re.findall(r"^## `(\w+)`$", PAGE, re.MULTILINE) == re.findall(
        r"^def (dopt_\w+)", inspect.getsource(hookspec), re.MULTILINE
    )


def test_the_examples_of_the_page_are_a_complete_backend(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    module = ModuleType("mine")
    exec("\n".join(blocks), vars(module))
    backend = manager.Backend("mine", module, "docs/hooks.md")
    network = module.Network({"fc": [[1.0, -2.0], [0.5, 0.25]], "head": [[1.0, 1.0]]})
    assert backend.info.owns(network)
    found = backend.find_layers(network, None)
    layers = {"fc": LayerPlan("fc", "Matrix", STRATEGIES["Quant_INT8-8"])}
    plan = Plan(tmp_path / "config.json", (), layers, found)
    quantized = backend.optimize(network, plan, None, None)
    with pytest.raises(ModelError, match="already quantized"):
        backend.find_layers(quantized, None)

    x = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
    backend.set_calibrate_state(quantized, True)
    np.testing.assert_array_equal(quantized(x), network(x))
    backend.set_calibrate_state(quantized, False)
    np.testing.assert_allclose(quantized(x), network(x), atol=0.1)
    assert 0.0 < backend.get_quant_loss(quantized) < 1e-4

    state = tmp_path / "state.json"
    state.write_text(json.dumps({name: [float(scale), zero] for name, (scale, zero) in quantized.inputs.items()}))
    result = backend.export(network, plan, state, tmp_path, None, False)
    (entry,) = read_params(result.params).layers
    assert (entry.name, entry.input.scale[0]) == ("fc", pytest.approx(float(quantized.inputs["fc"][0])))
    written = module.Network(json.loads(result.model.read_text()))
    np.testing.assert_allclose(written(x), network(x), atol=0.1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        backend.export(network, plan, tmp_path / "no.json", tmp_path, None, False)
