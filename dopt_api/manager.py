"""Finding, loading and calling backends.

One pluggy manager is made for each selected backend, so that backends never answer for one another, and a backend's
code is imported only when it is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pluggy

from dopt_api import hookspec
from dopt_api.errors import BackendError, DoptError, ModelError, closest
from dopt_api.types import HOOK_API_VERSION, BackendInfo, ExportResult, ModelLayers, Plan

__all__ = ["GROUP", "KNOWN", "Backend", "BackendStatus", "load", "select", "statuses"]

GROUP = "dopt.backends"
"""The entry-point group of backends."""

KNOWN = {"torch": "dopt-torch", "tf": "dopt-tf"}
"""Backends of this project by name, with what to install for them."""

HOOKS = tuple(name for name in hookspec.__all__ if name.startswith("dopt_"))


@dataclass(frozen=True)
class BackendStatus:
    """An installed backend: its description, or why it does not load.

    Attributes:
        name: Name of the entry point.
        distribution: The distribution that brings it, with its version.
        info: The backend's description, or ``None`` if it does not load.
        error: Why it does not load, or an empty string.
    """

    name: str
    distribution: str
    info: BackendInfo | None
    error: str = ""


class Backend:
    """A loaded backend: one method for each hook, with what hooks return validated."""

    def __init__(self, name: str, plugin: object, origin: str) -> None:
        """Register ``plugin`` with a manager of its own.

        Raises:
            BackendError: It misses a hook, has an unknown one, or one with unknown or defaulted arguments.
        """
        self.name, self.origin = name, origin
        self._manager = pluggy.PluginManager(hookspec.PROJECT)
        self._manager.add_hookspecs(hookspec)
        _check_hooks(plugin, name, origin)
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise _contract_error(name, origin, str(error)) from error
        self.info = self._describe()

    def __repr__(self) -> str:
        return f"Backend({self.name!r}, {self.origin})"

    def find_layers(self, model: Any, input_shape: str | None) -> ModelLayers:
        """Call :func:`dopt_api.hookspec.dopt_find_layers`."""
        found: ModelLayers = self._call("dopt_find_layers", ModelLayers, model=model, input_shape=input_shape)
        names = [layer.name for layer in found.layers]
        if len(set(names)) != len(names):
            raise self._broken("dopt_find_layers returned two layers of the same name")
        return found

    def optimize(self, model: Any, plan: Plan, is_train_flag: Any, quant_flag: Any) -> Any:
        """Call :func:`dopt_api.hookspec.dopt_optimize`."""
        return self._call(
            "dopt_optimize", object, model=model, plan=plan, is_train_flag=is_train_flag, quant_flag=quant_flag
        )

    def set_calibrate_state(self, model: Any, calibration_mode: bool) -> None:
        """Call :func:`dopt_api.hookspec.dopt_set_calibrate_state`."""
        self._call("dopt_set_calibrate_state", type(None), model=model, calibration_mode=calibration_mode)

    def get_quant_loss(self, model: Any) -> Any:
        """Call :func:`dopt_api.hookspec.dopt_get_quant_loss`."""
        return self._call("dopt_get_quant_loss", object, model=model)

    def export(
        self,
        model: Any,
        plan: Plan,
        checkpoint: Path,
        output_dir: Path,
        output_names: Sequence[str] | None,
        dynamic_batch: bool,
    ) -> ExportResult:
        """Call :func:`dopt_api.hookspec.dopt_export`."""
        result: ExportResult = self._call(
            "dopt_export",
            ExportResult,
            model=model,
            plan=plan,
            checkpoint=checkpoint,
            output_dir=output_dir,
            output_names=output_names,
            dynamic_batch=dynamic_batch,
        )
        for file in (result.model, result.params):
            if not Path(file).is_file():
                raise self._broken(f"dopt_export returned {str(file)!r}, which is not there")
        return result

    def _describe(self) -> BackendInfo:
        try:
            info: BackendInfo = self._call("dopt_describe_backend", BackendInfo)
        except DoptError:
            raise
        except Exception as error:  # as at import: reported, so that one backend cannot break the list of all
            raise self._broken(f"dopt_describe_backend raised {type(error).__name__}: {error}") from error
        if not isinstance(info.model_types, tuple):
            raise self._broken(f"model_types is {info.model_types!r}, not a tuple of names")
        if info.name != self.name:
            raise self._broken(f"it calls itself {info.name!r}, but its entry point is called {self.name!r}")
        if info.hook_api_version.split(".")[0] != HOOK_API_VERSION.split(".")[0]:
            raise BackendError(
                f"The backend {self.name!r} was written for hook API {info.hook_api_version}",
                where=self.origin,
                expected=f"hook API {HOOK_API_VERSION}",
                fix="Install versions of dopt-api and of the backend that go together.",
            )
        return info

    def _call(self, hook: str, kind: type, /, **arguments: Any) -> Any:
        result = getattr(self._manager.hook, hook)(**arguments)
        if not isinstance(result, kind) or (kind is object and result is None):
            wanted = "something" if kind is object else kind.__name__
            raise self._broken(f"{hook} returned {type(result).__name__} instead of {wanted}")
        return result

    def _broken(self, what: str) -> BackendError:
        return _contract_error(self.name, self.origin, what)


def load(name: str) -> Backend:
    """Load the backend called ``name``, and no other.

    Raises:
        BackendError: There is none, or two distributions bring one, or it does not import, or breaks the contract.
    """
    found = _entry_points()
    points = found.get(name, [])
    if not points:
        raise BackendError(
            f"There is no backend {name!r}",
            expected=f"one of {', '.join(map(repr, found))}" if found else "an installed backend (none is)",
            fix=closest(name, found) or f"pip install {KNOWN.get(name, f'dopt-{name}')}",
        )
    origins = sorted({_origin(point) for point in points})
    if len(origins) > 1:
        raise BackendError(
            f"The backend {name!r} comes from two distributions",
            where=" and ".join(origins),
            expected="one distribution for each backend name",
            fix=f"pip uninstall one of them, for example: pip uninstall {origins[-1].split(maxsplit=1)[0]}",
        )
    return _loaded(points[0], origins[0])


def select(model: object, name: str | None = None) -> Backend:
    """Return the backend for a model: the one called ``name``, or the one that says the model's type is its own.

    Raises:
        ModelError: No installed backend handles this type, or the named one does not.
        BackendError: The backend cannot be loaded.
    """
    if name is not None:
        backend = load(name)
        if not backend.info.owns(model):
            raise ModelError(
                f"The backend {name!r} does not handle a {_type_name(model)}",
                expected=" or ".join(backend.info.model_types),
                fix="Pass the model itself, or leave out 'backend' to have it found by the model's type.",
            )
        return backend
    errors = []
    for candidate in _candidates(model):
        try:
            backend = load(candidate)
        except BackendError as error:
            errors.append(f"{candidate}: {error.what}")
            continue
        if backend.info.owns(model):
            return backend
    installed = ", ".join(_entry_points()) or "none"
    raise ModelError(
        f"No backend handles a {_type_name(model)}" + (f" ({'; '.join(errors)})" if errors else ""),
        expected=f"a model of an installed backend (installed: {installed})",
        fix=_install_hint(model),
    )


def statuses() -> list[BackendStatus]:
    """Describe every installed backend; one that does not load is listed with the reason."""
    result = []
    for name, points in _entry_points().items():
        origin = " and ".join(sorted({_origin(point) for point in points}))
        try:
            result.append(BackendStatus(name, origin, load(name).info))
        except DoptError as error:
            result.append(BackendStatus(name, origin, None, str(error)))
    return result


def _entry_points() -> dict[str, list[metadata.EntryPoint]]:
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name):
        found.setdefault(point.name, []).append(point)
    return found


def _candidates(model: object) -> list[str]:
    """Order the installed backends: first those named after a package that the model's type comes from."""
    roots = {kind.__module__.split(".")[0] for kind in type(model).__mro__}
    return sorted(_entry_points(), key=lambda name: name not in roots)


@cache
def _loaded(point: metadata.EntryPoint, origin: str) -> Backend:
    with _import_errors(point, origin):
        plugin = point.load()
    return Backend(point.name, plugin, origin)


@contextmanager
def _import_errors(point: metadata.EntryPoint, origin: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a backend can fail to import in any way, and is reported, not passed on
        raise BackendError(
            f"The backend {point.name!r} does not import: {type(error).__name__}: {error}",
            where=f"{origin}, entry point {point.value!r}",
            fix=f"Reinstall it: pip install --force-reinstall {origin.split(maxsplit=1)[0]}",
        ) from error


def _origin(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def _check_hooks(plugin: object, name: str, origin: str) -> None:
    for hook in HOOKS:
        implementation: Callable[..., Any] | None = getattr(plugin, hook, None)
        if implementation is None or not hasattr(implementation, f"{hookspec.PROJECT}_impl"):
            raise _contract_error(name, origin, f"it does not implement {hook} with @hookimpl")
        known = inspect.signature(getattr(hookspec, hook)).parameters
        for argument in inspect.signature(implementation).parameters.values():
            if argument.default is not argument.empty:
                raise _contract_error(
                    name, origin, f"{hook} gives the argument {argument.name!r} a default, which pluggy may not pass"
                )
            if argument.name not in known:
                raise _contract_error(
                    name, origin, f"{hook} has the unknown argument {argument.name!r} (known: {', '.join(known)})"
                )


def _contract_error(name: str, origin: str, what: str) -> BackendError:
    return BackendError(
        f"The backend {name!r} breaks the hook contract: {what}",
        where=origin,
        expected="the hooks of dopt_api.hookspec, with their names, arguments and return types",
        fix="Update the backend, or tell its author.",
    )


def _type_name(model: object) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _install_hint(model: object) -> str:
    roots = {kind.__module__.split(".")[0] for kind in type(model).__mro__}
    wanted = [package for name, package in KNOWN.items() if name in roots]
    return f"pip install {wanted[0]}" if wanted else "Pass a model object, not its class, path or state dict."
