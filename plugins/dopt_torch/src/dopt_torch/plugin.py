"""The hooks. Nothing here imports torch before a hook needs it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dopt_api.errors import BackendError
from dopt_api.hookspec import hookimpl
from dopt_api.types import BackendInfo, Capabilities, ExportResult, ModelLayers, Plan
from dopt_torch._version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn


@hookimpl
def dopt_describe_backend() -> BackendInfo:
    """Describe the backend from the metadata of what is installed."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        version = None
    return BackendInfo(
        name="torch",
        framework="torch",
        framework_version=version,
        version=__version__,
        model_types=("torch.nn.modules.module.Module",),
        hook_api_version="1.2",
        capabilities=Capabilities(
            retraining=True,
            quant_loss=True,
            distributed_calibration=True,
            dynamic_batch=True,
            weight_only=True,
            recorded_outputs=True,
        ),
    )


@hookimpl
def dopt_find_layers(model: nn.Module, input_shape: str | None) -> ModelLayers:
    """See :func:`dopt_torch.find_layers.find_layers`."""
    require_torch()
    from dopt_torch.find_layers import find_layers

    return find_layers(model, input_shape)


@hookimpl
def dopt_optimize(model: nn.Module, plan: Plan) -> nn.Module:
    """See :func:`dopt_torch.optimize.optimize`."""
    from dopt_torch.optimize import optimize

    return optimize(model, plan)


@hookimpl
def dopt_set_calibrate_state(model: nn.Module, calibration_mode: bool) -> None:
    """See :func:`dopt_torch.optimize.set_calibrate_state`."""
    from dopt_torch.optimize import set_calibrate_state

    set_calibrate_state(model, calibration_mode)


@hookimpl
def dopt_get_quant_loss(model: nn.Module) -> Tensor:
    """See :func:`dopt_torch.optimize.get_quant_loss`."""
    from dopt_torch.optimize import get_quant_loss

    return get_quant_loss(model)


@hookimpl
def dopt_export(
    model: nn.Module,
    plan: Plan,
    checkpoint: Path,
    output_dir: Path,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
) -> ExportResult:
    """See :func:`dopt_torch.export.export`."""
    from dopt_torch.export import export

    return export(model, plan, checkpoint, output_dir, output_names, dynamic_batch)


def require_torch() -> None:
    """Raise with the remedy if torch is not installed.

    Raises:
        BackendError: torch does not import.
    """
    try:
        import torch  # noqa: F401  # only whether it imports
    except ImportError as error:
        raise BackendError(
            f"The torch backend needs PyTorch, which does not import: {error}",
            expected="torch 1.11 or newer",
            fix="pip install torch (or: pip install 'dopt-torch[torch]')",
        ) from error
