"""The hooks. The parts of the backend are imported when a hook needs them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dopt_api.hookspec import hookimpl
from dopt_api.types import BackendInfo, Capabilities, ExportResult, ModelLayers, Plan
from dopt_numpy._version import __version__

if TYPE_CHECKING:
    from dopt_numpy.network import Network
    from dopt_numpy.quant_loss import QuantLoss
    from dopt_numpy.quantized_layer import QuantizedNetwork


@hookimpl
def dopt_describe_backend() -> BackendInfo:
    """Describe the backend."""
    return BackendInfo(
        name="numpy",
        framework="numpy",
        framework_version=metadata.version("numpy"),
        version=__version__,
        model_types=("dopt_numpy.network.chain.Network",),
        hook_api_version="1.1",
        capabilities=Capabilities(retraining=True, quant_loss=True, dynamic_batch=True, weight_only=True),
    )


@hookimpl
def dopt_find_layers(model: Network, input_shape: str | None) -> ModelLayers:
    """See :func:`dopt_numpy.find_layers.find_layers`."""
    from dopt_numpy.find_layers import find_layers

    return find_layers(model, input_shape)


@hookimpl
def dopt_optimize(model: Network, plan: Plan) -> QuantizedNetwork:
    """See :func:`dopt_numpy.optimize.optimize`."""
    from dopt_numpy.optimize import optimize

    return optimize(model, plan)


@hookimpl
def dopt_set_calibrate_state(model: Network, calibration_mode: bool) -> None:
    """See :func:`dopt_numpy.optimize.set_calibrate_state`."""
    from dopt_numpy.optimize import set_calibrate_state

    set_calibrate_state(model, calibration_mode)


@hookimpl
def dopt_get_quant_loss(model: Network) -> QuantLoss:
    """See :func:`dopt_numpy.quant_loss.get_quant_loss`."""
    from dopt_numpy.quant_loss import get_quant_loss

    return get_quant_loss(model)


@hookimpl
def dopt_export(
    model: Network,
    plan: Plan,
    checkpoint: Path,
    output_dir: Path,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
) -> ExportResult:
    """See :func:`dopt_numpy.export.export`."""
    from dopt_numpy.export import export

    return export(model, plan, checkpoint, output_dir, output_names, dynamic_batch)
