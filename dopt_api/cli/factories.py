"""Calling functions of the user's own project that are named on the command line."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click

from dopt_api.errors import DoptError, closest

__all__ = ["Batches", "call_factory", "data_factory_option"]

F = TypeVar("F", bound=Callable[..., Any])

FORM = "package.module:function"


def call_factory(text: str, wanted: str = "a model") -> Any:
    """Return what ``package.module:function`` returns; modules in the current folder are found too.

    Args:
        text: The function's name.
        wanted: What it should return, for messages.

    Raises:
        click.ClickException: There is no such function, it fails, or it returns nothing.
    """
    module_name, colon, function_name = text.partition(":")
    if not colon or not module_name or not function_name:
        head, _, tail = text.rpartition(":" if colon else ".")
        hint = f"{head}:{tail}" if head and tail else "my_project.models:build"
        raise click.ClickException(f"{text!r} names no function. Expected: {FORM}. Fix: write it as {hint!r}.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    module = _imported(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "no function" if function is None else f"a {type(function).__name__}, but no function, called"
        functions = [name for name, one in vars(module).items() if callable(one) and not name.startswith("_")]
        fix = closest(function_name, functions) or f"Write a function that returns {wanted}."
        raise click.ClickException(
            f"{module_name!r} has {what} {function_name!r}. Where: {module.__file__}. Fix: {fix}"
        )
    _require_no_arguments(text, function)
    try:
        found = function()
    except Exception as error:  # the user's own function can fail in any way
        fix = f"Mend it, so that {module_name}.{function_name}() returns {wanted}."
        raise _failure(f"{text!r} failed", error, fix) from error
    if found is None:
        raise click.ClickException(
            f"{text!r} returned None. Where: {module.__file__}. Expected: {wanted}. Fix: end it with 'return ...'."
        )
    return found


def data_factory_option(function: F) -> F:
    """Add the option ``--data`` of commands that run the user's model on the user's batches."""
    return click.option(
        "--data",
        metavar="FACTORY",
        callback=_required,
        help=f"{FORM} that returns batches, any iterable.  [required]",
    )(function)


class Batches:
    """What a data factory returned; knows where it is when something fails.

    Args:
        text: The factory.

    Raises:
        click.ClickException: There is no such function, or it returns nothing that has batches.
    """

    def __init__(self, text: str) -> None:
        self.text, self.number, self.batch = text, 0, None
        found = call_factory(text, "batches")
        if not isinstance(found, Iterable):
            raise click.ClickException(
                f"{text!r} returned a {type(found).__name__}, which has no batches. Expected: a list, a generator or "
                "a data loader. Fix: return [batch] if it is a single one."
            )
        self.found: Iterable[Any] = found

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches, of which there must be one."""
        for self.number, self.batch in enumerate(self.found, 1):  # noqa: B020  # kept for messages
            yield self.batch
        if not self.number:
            raise click.ClickException(
                f"{self.text!r} returned no batches. Expected: one or more inputs of the model. "
                "Fix: look for an empty folder or a generator that was used up."
            )

    @contextmanager
    def told(self) -> Iterator[None]:
        """Name the batch that was worked on where the block fails with what is no error of the toolkit."""
        try:
            yield
        except (DoptError, click.ClickException, ModuleNotFoundError):
            raise
        except Exception as error:  # the user's model can fail in any way
            what = (
                f"Batch {self.number} of {self.text!r} ({_described(self.batch)})" if self.number else repr(self.text)
            )
            fix = "Return batches as the model takes them: tensors of its framework, preprocessed, samples first."
            raise _failure(f"{what} did not go through the model", error, fix) from error


def _required(_context: click.Context, _parameter: click.Parameter, text: str | None) -> str:
    if text is None:
        raise click.UsageError(
            f"Missing option '--data'. Expected: {FORM} of your project, a function that returns batches as the model "
            "takes them. Fix: --data my_project.data:batches"
        )
    return text


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        own = error.name is not None and (name == error.name or name.startswith(f"{error.name}."))
        fix = (
            f"call dopt from the folder that {error.name!r} lies in (now: {Path.cwd()})"
            if own
            else f"install what it imports, for example: pip install {error.name}; or activate its environment"
        )
        raise click.ClickException(f"The module {name!r} cannot be imported: {error}. Fix: {fix}.") from error
    except SyntaxError as error:
        raise click.ClickException(
            f"The module {name!r} cannot be imported: {error.msg}. Where: {error.filename}, line {error.lineno}. "
            f"Fix: correct this line:\n    {(error.text or '').strip()}"
        ) from error
    except Exception as error:  # a module can fail to import in any way
        fix = f"Mend it, so that 'import {name}' works."
        raise _failure(f"The module {name!r} cannot be imported", error, fix) from error


def _require_no_arguments(text: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise click.ClickException(
            f"{text!r} cannot be called without arguments: {error}. Expected: a function without arguments. "
            f"Fix: write one that calls {text.partition(':')[2]} with yours, and name that."
        ) from error
    except ValueError:  # some that are not written in Python have no signature
        return


def _failure(what: str, error: Exception, fix: str) -> click.ClickException:
    """Show where the user's own code failed, and return what says what that means."""
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if "dopt_api" not in Path(frame.filename).parts[:-1]]
    click.echo("".join(traceback.format_list(inner[-8:])).rstrip(), err=True)
    said = " ".join(str(error).split())[:400]
    return click.ClickException(f"{what}: {type(error).__name__}: {said.rstrip('.')}. Fix: {fix}")


def _described(batch: Any) -> str:
    """Return what a batch is, with types and shapes."""
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {_described(value)}" for key, value in list(batch.items())[:4]) + "}"
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of " + ", ".join(map(_described, batch[:4])) if batch else "empty"
    kind = f"{type(batch).__module__.partition('.')[0]}.{type(batch).__name__}".removeprefix("builtins.")
    shape = getattr(batch, "shape", None)
    return kind if shape is None else f"{kind} {list(shape)}"
