"""Hypothesis profiles, and backends installed for one test.

The profile ``ci`` runs the same examples every time; ``dev`` looks for new ones. ``HYPOTHESIS_PROFILE`` chooses, and
without it ``ci`` where the environment variable ``CI`` is set. What the tests generate is in ``support``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from dopt_api import manager

settings.register_profile("dev", deadline=None, max_examples=150)
settings.register_profile("ci", deadline=None, max_examples=150, derandomize=True, print_blob=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

BACKEND = """
from dopt_api.hookspec import hookimpl
from dopt_api.types import BackendInfo, ExportResult, LayerInfo, ModelLayers

CALLS = []
FOUND = ModelLayers((LayerInfo("conv1", "Conv2D"), LayerInfo("fc", "Linear")), notes=("a note",))


@hookimpl
def dopt_describe_backend():
    return BackendInfo("{name}", "{name}", "2.0", "0.1", ("{name}.Net", "{name}.Quantized"), "1.0")


@hookimpl
def dopt_find_layers(model, input_shape):
    CALLS.append(("find_layers", model, input_shape))
    return FOUND


@hookimpl
def dopt_optimize(model, plan, is_train_flag, quant_flag):
    CALLS.append(("optimize", model, plan, is_train_flag, quant_flag))
    return "quantized"


@hookimpl
def dopt_set_calibrate_state(model, calibration_mode):
    CALLS.append(("set_calibrate_state", model, calibration_mode))


@hookimpl
def dopt_get_quant_loss(model):
    CALLS.append(("get_quant_loss", model))
    return 0.25


@hookimpl
def dopt_export(model, plan, checkpoint, output_dir, output_names, dynamic_batch):
    CALLS.append(("export", model, plan, checkpoint, output_dir, output_names, dynamic_batch))
    result = ExportResult(output_dir / "model.onnx", output_dir / "quant_params.json")
    result.model.write_text("graph")
    result.params.write_text("parameters")
    return result
"""

Install = Callable[..., None]


@pytest.fixture
def install_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install backends as distributions with metadata and an entry point, into a folder on ``sys.path``.

    Called as ``install_backend("alpha", extra="...", distribution="dopt-alpha", version="1.0")``: the module
    ``alpha_backend`` is a complete backend of the models ``alpha.Net``, and ``extra`` is code at its end.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules = []

    def install(
        name: str, *, extra: str = "", distribution: str = "", version: str = "1.0", module: str | None = None
    ) -> None:
        module = module or f"{name}_backend"
        modules.append(module)
        (site / f"{module}.py").write_text(BACKEND.replace("{name}", name) + extra)
        distribution = distribution or f"dopt-{name}"
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{manager.GROUP}]\n{name} = {module}\n")

    yield install
    manager._loaded.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def make_model() -> Callable[..., object]:
    """Return a function that makes a model whose class says it is ``<module>.<name>``."""

    def make(module: str, name: str = "Net", base: type = object) -> object:
        return type(name, (base,), {"__module__": module})()

    return make
