"""Calling functions of the user's own project that are named on the command line."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

__all__ = ["call_factory"]


def call_factory(text: str) -> Any:
    """Return what ``package.module:function`` returns; modules in the current folder are found too."""
    module_name, colon, function_name = text.partition(":")
    if not colon or not module_name or not function_name:
        raise click.ClickException(f"{text!r} names no function. Expected: package.module:function.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise click.ClickException(
            f"The module {module_name!r} cannot be imported: {error}. Fix: call dopt from your project's folder, with "
            "its environment active."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise click.ClickException(f"{module_name!r} has no function {function_name!r}.")
    return function()
