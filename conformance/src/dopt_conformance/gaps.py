"""Known gaps: tests that a backend is known to fail, each with the exception and the reason, in ``conformance.toml``.

A gap is a claim like any other: a listed test must fail, and with that exception. Fixing a gap means removing its
entry.

Example:
    ::

        [[gap]]
        test = "laws/test_statistics.py::test_subnormal_data"
        kind = "upstream"
        raises = "AssertionError"
        reason = "The framework's reductions flush subnormal numbers to zero."
"""

from __future__ import annotations

import builtins
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dopt_api import errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DEFAULT_FILE", "KINDS", "Gap", "read_gaps"]

DEFAULT_FILE = "conformance.toml"
"""Where gaps are looked for unless ``--dopt-known-gaps`` says otherwise: in the directory pytest is started in."""

KINDS = ("not implemented", "upstream", "never")
"""Why a gap is there: nobody has written it yet, the framework's own fault, or it cannot be in this framework."""

KEYS = ("test", "kind", "raises", "reason")


@dataclass(frozen=True)
class Gap:
    """One entry of the file.

    Attributes:
        test: ``"laws/test_statistics.py::test_merging"`` for all parameters of a test, or with them
            (``"...::test_merging[conv]"``), or ``"laws/test_statistics.py"`` for every test of a file.
        kind: One of :data:`KINDS`.
        raises: The exception's name: of a built-in, of ``dopt_api.errors``, or with its module.
        reason: A sentence for users.
    """

    test: str
    kind: str
    raises: str
    reason: str

    def matches(self, test: str) -> bool:
        """Return whether the entry is about a test of this name.

        Example:
            >>> gap = Gap("laws/test_a.py::test_b", "never", "AssertionError", "It cannot be.")
            >>> gap.matches("laws/test_a.py::test_b[conv]"), gap.matches("laws/test_a.py::test_bc")
            (True, False)
        """
        return self.test in (test, test.partition("[")[0], test.partition("::")[0])

    def mark(self) -> pytest.MarkDecorator:
        """Return the mark that makes pytest expect the failure, strictly."""
        return pytest.mark.xfail(
            raises=_exception(self.raises), strict=True, reason=f"known gap ({self.kind}): {self.reason}"
        )


def read_gaps(file: Path) -> tuple[Gap, ...]:
    """Read and check a file of known gaps.

    Raises:
        pytest.UsageError: It is missing, is no TOML, or an entry is incomplete or wrong; the message names it.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise pytest.UsageError(
            f"The file of known gaps {str(file)!r} cannot be read: {error.strerror or error}. "
            "Fix: check --dopt-known-gaps."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise pytest.UsageError(f"The file of known gaps {str(file)!r} is not TOML: {error}.") from error
    entries = content.pop("gap", [])
    if content or not isinstance(entries, list):
        raise pytest.UsageError(
            f"The file of known gaps {str(file)!r} has other content than gaps: {', '.join(content) or 'gap'}. "
            "Expected: entries that begin with [[gap]]."
        )
    return tuple(_gap(entry, f"{file}, gap {number}") for number, entry in enumerate(entries, 1))


def _gap(entry: Any, where: str) -> Gap:
    if not isinstance(entry, dict) or sorted(entry) != sorted(KEYS):
        raise pytest.UsageError(f"The entry {entry!r} is incomplete. Where: {where}. Expected: {', '.join(KEYS)}.")
    for key, value in entry.items():
        if not isinstance(value, str) or not value.strip():
            raise pytest.UsageError(f"The {key!r} is {value!r}. Where: {where}. Expected: a text.")
    gap = Gap(**entry)
    if gap.kind not in KINDS:
        raise pytest.UsageError(f"The kind is {gap.kind!r}. Where: {where}. Expected: {' or '.join(map(repr, KINDS))}.")
    try:
        _exception(gap.raises)
    except (ImportError, AttributeError, TypeError) as error:
        raise pytest.UsageError(
            f"The exception {gap.raises!r} is not known: {error}. Where: {where}. "
            "Expected: a built-in, one of dopt_api.errors, or one with its module, such as my_framework.errors.Broken."
        ) from error
    return gap


def _exception(name: str) -> type[BaseException]:
    module, _, attribute = name.rpartition(".")
    owner: Any = importlib.import_module(module) if module else errors if hasattr(errors, name) else builtins
    found = getattr(owner, attribute)
    if not (isinstance(found, type) and issubclass(found, BaseException)):
        raise TypeError(f"{name} is no exception")
    return found
