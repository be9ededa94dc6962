"""What a mutant is: a small wrong change of the NumPy backend, with the test of the suite that is meant to find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from dopt_numpy import (
    checkpoint,
    conformance,
    export,
    find_layers,
    onnx_graph,
    optimize,
    quant_loss,
    quantized_layer,
    quantizer,
)

__all__ = ["MUTANTS", "Mutant", "mutant", "replace"]

MODULES = (checkpoint, conformance, export, find_layers, onnx_graph, optimize, quant_loss, quantized_layer, quantizer)

Change = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """A wrong backend.

    Attributes:
        name: The name of the function that makes it.
        what: What is wrong, a line.
        killer: The test that must fail: its file within the suite and its name, parameters aside.
        change: Changes the backend until the patch is undone.
    """

    name: str
    what: str
    killer: str
    change: Change


MUTANTS: dict[str, Mutant] = {}
"""All of them by name."""


def mutant(killer: str) -> Callable[[Change], Change]:
    """Register a function as a mutant; its docstring says what is wrong."""

    def register(change: Change) -> Change:
        name, what = change.__name__, (change.__doc__ or "").strip().rstrip(".")
        MUTANTS[name] = Mutant(name, what, killer, change)
        return change

    return register


def replace(patch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Replace what the modules of the backend have imported from the core under a name, and not the core's own."""
    having = [module for module in MODULES if name in vars(module)]
    if not having:
        raise LookupError(f"no module of the backend has {name!r}")
    for module in having:
        patch.setattr(module, name, value)
