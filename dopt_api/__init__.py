"""dopt: neural-network quantization inside your own training project.

The framework-neutral core: hooks, strategy files, the quantizer's numbers, parameter files. Frameworks are plugins;
importing this package imports none of them, and the five calls below are themselves imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dopt_api._version import __version__
from dopt_api.errors import DoptError

if TYPE_CHECKING:
    from dopt_api.facade import backends, export, generate_config, get_quant_loss, optimize, set_calibrate_state

__all__ = [
    "DoptError",
    "__version__",
    "backends",
    "export",
    "generate_config",
    "get_quant_loss",
    "optimize",
    "set_calibrate_state",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("dopt_api.facade"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
