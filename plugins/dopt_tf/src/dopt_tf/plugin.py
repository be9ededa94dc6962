"""The hooks. Nothing here imports TensorFlow before a hook needs it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopt_api.errors import BackendError
from dopt_api.hookspec import hookimpl
from dopt_api.types import BackendInfo, Capabilities, ExportResult, ModelLayers, Plan
from dopt_tf._version import __version__

if TYPE_CHECKING:
    import tensorflow as tf

_DISTRIBUTIONS = ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-macos", "tensorflow-rocm", "tf-nightly")


@hookimpl
def dopt_describe_backend() -> BackendInfo:
    """Describe the backend from the metadata of what is installed."""
    return BackendInfo(
        name="tf",
        framework="tensorflow",
        framework_version=_installed_version(),
        version=__version__,
        model_types=(
            "tensorflow.python.client.session.BaseSession",
            "tensorflow.python.training.monitored_session._MonitoredSession",
        ),
        hook_api_version="1.2",
        capabilities=Capabilities(
            retraining=True, quant_loss=True, session_graph=True, weight_only=True, recorded_outputs=True
        ),
    )


@hookimpl
def dopt_find_layers(model: Any, input_shape: str | None) -> ModelLayers:
    """See :func:`dopt_tf.find_layers.find_layers`."""
    require_tensorflow()
    from dopt_tf.find_layers import find_layers

    return find_layers(model, input_shape)


@hookimpl
def dopt_optimize(model: Any, plan: Plan, is_train_flag: Any, quant_flag: Any) -> Any:
    """See :func:`dopt_tf.optimize.optimize`."""
    from dopt_tf.optimize import optimize

    return optimize(model, plan, is_train_flag, quant_flag)


@hookimpl
def dopt_set_calibrate_state(model: Any, calibration_mode: bool) -> None:
    """See :func:`dopt_tf.optimize.set_calibrate_state`."""
    from dopt_tf.optimize import set_calibrate_state

    set_calibrate_state(model, calibration_mode)


@hookimpl
def dopt_get_quant_loss(model: Any) -> tf.Tensor:
    """See :func:`dopt_tf.optimize.get_quant_loss`."""
    from dopt_tf.optimize import get_quant_loss

    return get_quant_loss(model)


@hookimpl
def dopt_export(
    model: Any,
    plan: Plan,
    checkpoint: Path,
    output_dir: Path,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
) -> ExportResult:
    """See :func:`dopt_tf.export.export`."""
    from dopt_tf.export import export

    return export(model, plan, checkpoint, output_dir, output_names, dynamic_batch)


def require_tensorflow() -> None:
    """Raise with the remedy if TensorFlow is not installed.

    Raises:
        BackendError: TensorFlow does not import.
    """
    try:
        import tensorflow  # noqa: F401, ICN001  # only whether it imports
    except ImportError as error:
        raise BackendError(
            f"The tf backend needs TensorFlow, which does not import: {error}",
            expected="TensorFlow 2.8 or newer, in any of its distributions",
            fix="pip install tensorflow, or tensorflow-cpu, or tensorflow-gpu (or: pip install 'dopt-tf[tensorflow]')",
        ) from error


def _installed_version() -> str | None:
    """Return the version of whichever distribution of TensorFlow is installed."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:  # noqa: PERF203  # there are six names
            continue
    return None
