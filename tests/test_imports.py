"""What importing costs, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FRAMEWORKS = {"torch", "tensorflow", "jax", "onnx"}


def run(code: str, **environment: str) -> str:
    """Return what a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout


def imported_by(code: str) -> set[str]:
    """Return the modules that ``code`` adds to those of a fresh interpreter."""
    text = run(
        f"import sys, json; before = set(sys.modules)\n{code}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    return set(json.loads(text.splitlines()[-1]))


def test_importing_the_package_imports_no_framework_and_no_plugin_machinery():
    modules = imported_by("import dopt_api")
    assert "dopt_api.errors" in modules
    assert not modules & {*FRAMEWORKS, "pluggy", "importlib.metadata", "dopt_api.manager"}


def test_importing_the_package_runs_no_backend():
    assert not {name for name in imported_by("import dopt_api; dopt_api.optimize") if name.startswith("dopt_torch")}


@pytest.mark.parametrize("code", ["import dopt_api; dopt_api.backends()", "import dopt_api.facade, dopt_api.params"])
def test_listing_backends_imports_no_framework(code):
    modules = imported_by(code)
    assert "dopt_api.quantizer" in modules
    assert not modules & FRAMEWORKS


@pytest.mark.parametrize("module", ["dopt_api", "dopt_api.facade"])
def test_import_takes_at_most_60_ms_over_numpy(module, tmp_path):
    """Best of several, of compiled modules, and on a slow machine what NumPy takes: neither a busy machine nor one
    without bytecode may fail the test.
    """
    code = (
        "import time; begun = time.perf_counter(); import numpy\n"
        f"between = time.perf_counter(); import {module}\n"
        "print(between - begun, time.perf_counter() - between)"
    )
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    of_numpy, of_ours = zip(*(map(float, run(code, **compiled).split()) for _ in range(8)), strict=True)
    assert list(Path(tmp_path).rglob("dopt_api/__init__*.pyc")), (
        "nothing was compiled: the figure would be the compiler's"
    )
    assert min(of_ours) <= max(0.060, min(of_numpy))
