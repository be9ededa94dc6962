"""Backends that say something wrong of themselves."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace as but
from pathlib import Path
from typing import Any

import pytest
from dopt_numpy import plugin

from dopt_api.hookspec import hookimpl
from mutants.mutant import mutant

HERE = "behaviour/test_description.py::"

UNUSUAL = "mailbox"
"""A module that nothing else here imports, in place of a framework."""


def describing(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change the description of the backend."""
    info = plugin.dopt_describe_backend()

    @hookimpl
    def dopt_describe_backend() -> Any:
        return but(info, **changes)

    patch.setattr(plugin, "dopt_describe_backend", dopt_describe_backend)


@mutant(HERE + "test_the_backend_owns_its_models_and_nothing_else")
def every_object_is_a_model(patch: pytest.MonkeyPatch) -> None:
    """The backend says that it handles everything."""
    describing(patch, model_types=("builtins.object",))


@mutant(HERE + "test_the_description_names_backend_framework_and_versions")
def the_version_of_the_framework_is_not_known(patch: pytest.MonkeyPatch) -> None:
    """It is left out."""
    describing(patch, framework_version=None)


@mutant(HERE + "test_the_hooks_are_of_a_version_that_this_core_has")
def the_hooks_are_newer_than_the_core(patch: pytest.MonkeyPatch) -> None:
    """The backend was written for hooks that this core does not have."""
    describing(patch, hook_api_version="1.9")


@mutant(HERE + "test_listing_backends_imports_no_framework")
def describing_imports_the_framework(patch: pytest.MonkeyPatch) -> None:
    """The module of the hooks imports the framework at its top."""
    describing(patch, framework=UNUSUAL)
    source, folder = Path(plugin.__file__).parent, Path(tempfile.mkdtemp())  # the test looks from a process of its own
    shutil.copytree(source, folder / source.name)
    hooks = folder / source.name / "plugin.py"
    text = hooks.read_text().replace("from pathlib", f"import {UNUSUAL}\nfrom pathlib", 1)
    hooks.write_text(text.replace('framework="numpy"', f'framework="{UNUSUAL}"'))
    patch.setenv("PYTHONPATH", str(folder))
