"""The names that a new backend's name gives: of its distribution, its package and its classes."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass

from dopt_api.errors import BackendError

__all__ = ["RESERVED", "Names", "check_framework", "check_type", "names_of"]

RESERVED = ("torch", "tf", "numpy", "api", "conformance")
"""Names whose distributions this project has itself."""

EXPECTED = "lower-case letters, digits and single hyphens, a letter first, such as 'mine' or 'my-engine'"

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Names:
    """What a backend called ``my-engine`` is called elsewhere.

    Attributes:
        backend: The name of its entry points, ``my-engine``.
        distribution: What is installed, ``dopt-my-engine``.
        package: What is imported, ``dopt_my_engine``.
        prefix: What its classes begin with, ``MyEngine``.
    """

    backend: str
    distribution: str
    package: str
    prefix: str


def names_of(name: str) -> Names:
    """Return the names for a backend.

    Raises:
        BackendError: The name gives no valid distribution or package, or is taken.

    Example:
        >>> names_of("my-engine")
        Names(backend='my-engine', distribution='dopt-my-engine', package='dopt_my_engine', prefix='MyEngine')
    """
    if _NAME.fullmatch(name) is None:
        raise BackendError(
            f"A backend cannot be called {name!r}", where="argument NAME", expected=EXPECTED, fix=_instead(name)
        )
    if keyword.iskeyword(name):
        raise BackendError(
            f"A backend cannot be called {name!r}, which is a keyword of Python",
            where="argument NAME",
            expected=EXPECTED,
            fix=f"Choose another name, such as '{name}-engine'.",
        )
    if name in RESERVED:
        raise BackendError(
            f"A backend cannot be called {name!r}: this project has a distribution 'dopt-{name}' of its own",
            where="argument NAME",
            expected=f"any other name than {', '.join(map(repr, RESERVED))}",
            fix=f"Choose another name, such as 'my-{name}'.",
        )
    parts = name.split("-")
    return Names(name, f"dopt-{name}", f"dopt_{'_'.join(parts)}", "".join(part.capitalize() for part in parts))


def check_framework(name: str) -> str:
    """Return the name if it can be imported as a package.

    Raises:
        BackendError: It cannot.

    Example:
        >>> check_framework("jax")
        'jax'
    """
    if name.isascii() and name.isidentifier() and not keyword.iskeyword(name):
        return name
    raise BackendError(
        f"A framework cannot be imported as {name!r}",
        where="option --framework",
        expected="the name after 'import', without dots, such as 'jax'",
        fix="Pass the name with which programs import the framework, not that with which pip installs it.",
    )


def check_type(name: str) -> str:
    """Return the name if it is that of a class within a module.

    Raises:
        BackendError: It is not.

    Example:
        >>> check_type("torch.nn.modules.module.Module")
        'torch.nn.modules.module.Module'
    """
    parts = name.split(".")
    if len(parts) > 1 and all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        return name
    raise BackendError(
        f"A class of models cannot be called {name!r}",
        where="option --model-type",
        expected="its module and its name, such as 'torch.nn.modules.module.Module'",
        fix="Print type(model).__module__ and type(model).__qualname__ of a model.",
    )


def _instead(name: str) -> str:
    """Return a hint with the nearest valid name, if there is one."""
    near = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("dopt")).strip("-")
    if _NAME.fullmatch(near) and not keyword.iskeyword(near) and near not in RESERVED:
        return f"Use {near!r}."
    return "Choose a name of these characters."
