"""Finding the backend under test and its harness; what is wrong with either is told in a sentence, not a traceback."""

from __future__ import annotations

import importlib
import inspect
from importlib import metadata

import pytest

from dopt_api import manager
from dopt_api.errors import BackendError
from dopt_api.manager import Backend
from dopt_conformance.harness import GROUP, Harness

__all__ = ["find_harness", "load_backend"]


def load_backend(name: str) -> Backend:
    """Return the installed backend called ``name``.

    Raises:
        pytest.UsageError: It is not there, does not import, or implements the hooks wrongly.
    """
    try:
        return manager.load(name)
    except BackendError as error:
        raise pytest.UsageError(str(error)) from error


def find_harness(name: str, place: str | None) -> Harness:
    """Return the harness of a backend.

    Args:
        name: The backend's name.
        place: ``"module:Class"``, or ``None`` for the entry point of this name in the group ``dopt.conformance``.

    Raises:
        pytest.UsageError: There is none, it does not import, it is no :class:`Harness`, lacks methods, or is that of
            another backend.
    """
    kind, where = _named(place) if place else _installed(name)
    if not (inspect.isclass(kind) and issubclass(kind, Harness)):
        raise pytest.UsageError(
            f"The harness {where} is {kind!r}. Expected: a subclass of dopt_conformance.Harness. "
            "Fix: let --dopt-harness, or the entry point, name the class itself."
        )
    if missing := sorted(kind.__abstractmethods__):
        raise pytest.UsageError(
            f"The harness {where} does not implement {', '.join(missing)}. "
            "Fix: implement them as the docstrings of dopt_conformance.Harness say."
        )
    if getattr(kind, "backend", None) != name:
        raise pytest.UsageError(
            f"The harness {where} is for the backend {getattr(kind, 'backend', None)!r}, not {name!r}. "
            f"Fix: set its attribute 'backend', or pass another --dopt-backend."
        )
    try:
        return kind()
    except Exception as error:  # an author's constructor can raise anything
        raise pytest.UsageError(
            f"The harness {where} cannot be made: {type(error).__name__}: {error}. "
            "Fix: give it a constructor without arguments that works in this environment."
        ) from error


def _named(place: str) -> tuple[object, str]:
    module, _, attribute = place.partition(":")
    if not module or not attribute:
        raise pytest.UsageError(
            f"--dopt-harness is {place!r}. Expected: module:Class. Fix: name both, as in my_tests.harness:MyHarness."
        )
    try:
        found: object = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:  # importing an author's module can raise anything
        raise pytest.UsageError(
            f"The harness {place!r} does not import: {type(error).__name__}: {error}. "
            "Fix: check the spelling, and put the module's folder on PYTHONPATH or in pytest's 'pythonpath'."
        ) from error
    return found, repr(place)


def _installed(name: str) -> tuple[object, str]:
    points = {point.name: point for point in metadata.entry_points(group=GROUP)}
    if name not in points:
        known = ", ".join(map(repr, sorted(points))) or "none"
        raise pytest.UsageError(
            f"There is no harness for the backend {name!r} (installed: {known}). "
            f"Fix: pass --dopt-harness module:Class, or add the entry point {name!r} "
            f"to the group {GROUP!r} of the distribution that has the harness."
        )
    point = points[name]
    try:
        return point.load(), f"{point.value!r} (entry point {name!r} of the group {GROUP!r})"
    except Exception as error:  # as above
        raise pytest.UsageError(
            f"The harness {point.value!r} does not import: {type(error).__name__}: {error}. "
            "Fix: reinstall the distribution that brings it, with what its tests need."
        ) from error
