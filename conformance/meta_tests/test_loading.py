"""A backend or a harness that cannot be tested ends the run with a sentence: what, why, and how to mend it."""

from __future__ import annotations

import pytest
from installed import HARNESS, HOOKS

NO_LOSS = HOOKS.replace("@hookimpl\ndef dopt_get_quant_loss(model): ...", "")

BACKENDS = {
    "import": ("import no_such_framework", "ModuleNotFoundError: No module named 'no_such_framework'", "pip install"),
    "syntax": ("def", "SyntaxError", "pip install"),
    "missing hook": (NO_LOSS, "does not implement dopt_get_quant_loss", "Update the backend"),
    "unmarked hook": (HOOKS.replace("@hookimpl\ndef dopt_opt", "def dopt_opt"), "dopt_optimize with @hook", "Update"),
    "unknown argument": (HOOKS.replace("(model, plan)", "(model, plans)"), "unknown argument 'plans'", "Update"),
    "default": (HOOKS.replace("(model, plan)", "(model, plan=None)"), "'plan' a default", "Update"),
    "other name": (HOOKS.replace('"mine"', '"other"'), "calls itself 'other'", "Update"),
    "hook API": (HOOKS.replace('"1.0"', '"9.0"'), "written for hook API 9.0", "go together"),
    "description": (
        HOOKS.replace("return Back", "raise OSError('no driver')\n    Back"),
        "OSError: no driver",
        "Update",
    ),
}

HARNESSES = {
    "import": ("import no_such_helper", "No module named 'no_such_helper'", "reinstall"),
    "class": ("Mine = 3", "is 3", "name the class itself"),
    "incomplete": (
        "from dopt_conformance import Harness\nclass Mine(Harness): backend = 'mine'",
        "activations, b",
        "Fix",
    ),
    "other backend": (HARNESS.replace('"mine"', '"torch"'), "is for the backend 'torch'", "'backend'"),
    "constructor": (HARNESS + "\nMine.__init__ = lambda self: 1 / 0", "ZeroDivisionError", "constructor without"),
}

PLACES = {
    "no class": ("mine_harness", "Expected: module:Class", "Fix: name both"),
    "no module": ("nowhere:Mine", "No module named 'nowhere'", "spelling"),
    "no attribute": ("mine_harness:Yours", "has no attribute 'Yours'", "spelling"),
}


def refusal(pytester, *arguments):
    """Run the suite, which must not come to a test, and return what it says instead."""
    result = pytester.runpytest_inprocess("--pyargs", "dopt_conformance", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = result.stderr.str()
    assert "Traceback" not in text
    return text


def test_the_suite_asks_for_a_backend(pytester):
    text = refusal(pytester)
    assert "needs a backend" in text
    assert "--dopt-backend NAME" in text


def test_a_backend_that_is_not_installed(pytester, install):
    install()
    text = refusal(pytester, "--dopt-backend", "mime")
    assert "no backend 'mime'" in text
    assert "mine" in text.replace("mime", "")


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_backend_that_does_not_load(pytester, install, kind):
    hooks, cause, fix = BACKENDS[kind]
    install(hooks)
    text = refusal(pytester, "--dopt-backend", "mine")
    assert "'mine'" in text
    assert cause in text
    assert fix in text


def test_a_backend_without_harness(pytester, install):
    install(harness=None)
    text = refusal(pytester, "--dopt-backend", "mine")
    assert "no harness for the backend 'mine'" in text
    assert "--dopt-harness module:Class" in text
    assert "dopt.conformance" in text


@pytest.mark.parametrize("kind", HARNESSES)
def test_a_harness_that_will_not_do(pytester, install, kind):
    harness, cause, fix = HARNESSES[kind]
    install(harness=harness)
    text = refusal(pytester, "--dopt-backend", "mine")
    assert "mine_harness:Mine" in text
    assert cause in text
    assert fix in text


@pytest.mark.parametrize("kind", PLACES)
def test_a_named_harness_that_is_not_there(pytester, install, kind):
    place, cause, fix = PLACES[kind]
    install()
    text = refusal(pytester, "--dopt-backend", "mine", "--dopt-harness", place)
    assert place in text
    assert cause in text
    assert fix in text
