"""A distribution with a backend and its harness, installed by being put on the path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from dopt_api import manager
from dopt_conformance.harness import GROUP

__all__ = ["HARNESS", "HOOKS", "Installer"]

HOOKS = """
from dopt_api.hookspec import hookimpl
from dopt_api.types import BackendInfo, Capabilities

@hookimpl
def dopt_describe_backend():
    return BackendInfo("mine", "numpy", "2.0", "0.1.0", (), "1.0", Capabilities(quant_loss=True))

@hookimpl
def dopt_find_layers(model, input_shape): ...

@hookimpl
def dopt_optimize(model, plan): ...

@hookimpl
def dopt_set_calibrate_state(model, calibration_mode): ...

@hookimpl
def dopt_get_quant_loss(model): ...

@hookimpl
def dopt_export(model, plan, checkpoint, output_dir): ...
"""
"""A backend that fulfils the contract of the hooks, claims the quantization loss, and does nothing."""

HARNESS = """
from dopt_conformance import Harness

class Mine(Harness):
    backend = "mine"

for name in Harness.__abstractmethods__:
    setattr(Mine, name, lambda self, *arguments: None)
Mine.__abstractmethods__ = frozenset()
"""
"""A harness with every method, none of which does anything."""


class Installer:
    """Installs ``mine`` for the length of a test."""

    def __init__(self, site: Path, patch: pytest.MonkeyPatch) -> None:
        self.site, self.patch = site, patch

    def __call__(self, hooks: str = HOOKS, harness: str | None = HARNESS) -> None:
        """Install the two modules with their entry points; ``harness=None`` leaves the harness out."""
        points = f"[{manager.GROUP}]\nmine = mine_hooks\n"
        (self.site / "mine_hooks.py").write_text(hooks)
        if harness is not None:
            (self.site / "mine_harness.py").write_text(harness)
            points += f"[{GROUP}]\nmine = mine_harness:Mine\n"
        info = self.site / "dopt_mine-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dopt-mine\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(points)
        self.patch.syspath_prepend(self.site)
        for module in ("mine_hooks", "mine_harness"):
            self.patch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
