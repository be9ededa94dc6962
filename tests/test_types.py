"""What travels between the core and a backend."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from dopt_api import types
from dopt_api.strategy import STRATEGIES
from dopt_api.types import BackendInfo, Capabilities, ExportResult, InputSpec, LayerInfo, ModelLayers

INFO = BackendInfo("alpha", "alpha", "2.0", "0.1", ("alpha.nn.Net", "alpha.Session"), "1.0")


def test_a_backend_owns_instances_of_its_types_and_of_subclasses(make_model):
    assert INFO.owns(make_model("alpha.nn"))
    assert INFO.owns(make_model("mine", "Custom", base=type(make_model("alpha.nn"))))
    assert INFO.owns(make_model("alpha", "Session"))


def test_a_backend_owns_nothing_else(make_model):
    assert not INFO.owns(make_model("beta.nn"))
    assert not INFO.owns(make_model("alpha.nn", "Network"))
    assert not INFO.owns(type(make_model("alpha.nn")))  # the class itself is no model
    assert not INFO.owns("alpha.nn.Net")


def test_nested_classes_are_known_by_their_qualified_name():
    class Net: ...

    name = f"{Net.__module__}.{Net.__qualname__}"
    assert BackendInfo("a", "a", None, "0", (name,), "1.0").owns(Net())


def test_nothing_is_claimed_by_default():
    assert not any(getattr(Capabilities(), flag.name) for flag in fields(Capabilities))
    assert INFO.capabilities == Capabilities()


def test_layers_support_every_strategy_by_default():
    assert LayerInfo("fc", "Linear").strategies == tuple(STRATEGIES)


@pytest.mark.parametrize(
    "value",
    [
        INFO,
        Capabilities(),
        LayerInfo("a", "b"),
        ModelLayers(()),
        InputSpec("x", (1,)),
        ExportResult(Path("a"), Path("b")),
    ],
)
def test_values_are_frozen(value):
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, None)


def test_hook_api_version_has_a_major_and_a_minor_number():
    major, minor = types.HOOK_API_VERSION.split(".")
    assert major.isdigit()
    assert minor.isdigit()
