"""The hooks a backend implements: five for the contract's five calls, and one that describes the backend.

A backend is a module (or object) behind an entry point of the group ``dopt.backends``. It implements every hook below
with :data:`hookimpl`, taking the arguments by the names given here (all, or those it needs), without defaults. The
core decides every number and reads and writes strategy files; a backend finds layers, collects statistics, inserts
fake quantization and writes its framework's file.

Example:
    A backend's hook module::

        from dopt_api.hookspec import hookimpl
        from dopt_api.types import BackendInfo

        @hookimpl
        def dopt_describe_backend() -> BackendInfo: ...

    and in its ``pyproject.toml``::

        [project.entry-points."dopt.backends"]
        mine = "my_backend.plugin"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from dopt_api.types import BackendInfo, ExportResult, ModelLayers, Plan

__all__ = [
    "PROJECT",
    "dopt_describe_backend",
    "dopt_export",
    "dopt_find_layers",
    "dopt_get_quant_loss",
    "dopt_optimize",
    "dopt_set_calibrate_state",
    "hookimpl",
    "hookspec",
]

PROJECT = "dopt"
"""The pluggy project name."""

_F = TypeVar("_F", bound=Callable[..., Any])

if TYPE_CHECKING:  # pluggy's markers keep the function's type; spelled out because they are overloaded

    def hookimpl(function: _F) -> _F:
        """Mark a hook implementation."""

    def hookspec(function: _F) -> _F:
        """Mark a hook specification."""

else:
    hookimpl = pluggy.HookimplMarker(PROJECT)
    hookspec = pluggy.HookspecMarker(PROJECT)(firstresult=True)


@hookspec
def dopt_describe_backend() -> BackendInfo:  # type: ignore[empty-body]  # a specification has no body
    """Describe the backend without importing its framework.

    A model is handed to the backend that lists the qualified name of the model's class, or of a base of it, in
    ``model_types``; the quantized model's class counts as well. An error that is raised here marks the backend as
    broken in the list of backends.

    Returns:
        ``BackendInfo``: the entry point's name, the framework and its version (``None`` where it is not installed), the
        backend's version, ``model_types``, the hook API version it was written for, and ``Capabilities``, of which
        every flag is false unless claimed.

    Example:
        >>> from dopt_api.types import BackendInfo
        >>> @hookimpl
        ... def dopt_describe_backend():
        ...     return BackendInfo("mine", "numpy", "2.0", "0.1.0", ("my_backend.Network",), "1.0")
        >>> dopt_describe_backend().capabilities.retraining
        False
    """


@hookspec
def dopt_find_layers(model: Any, input_shape: str | None) -> ModelLayers:  # type: ignore[empty-body]  # see above
    """Account for every operation of a float model: what can be quantized, and what cannot and why.

    Args:
        model: The float model; unchanged afterwards, its mode included.
        input_shape: The contract's text of the deployed shapes, such as ``"x:1,3,224,224"`` (sizes in elements, batch
            first), to be read with ``dopt_api.config.parse_input_shape``; ``None`` where the framework's model knows
            its own.

    Returns:
        ``ModelLayers``: the quantizable layers in execution order under names that are unique and stable, the refused
        operations each with its reason, notes for the user, and ``structure``, which comes back to the backend with
        the plan. A layer whose input can stay float while its weight is quantized says ``weight_only=True`` (a backend
        with such layers claims the capability ``weight_only``), and one whose weights can have groups and zero points
        gives their number per output channel as ``row``; the core offers it the strategies that follow.

    Raises:
        dopt_api.errors.ModelError: The model cannot be handled.
        dopt_api.errors.ConfigError: ``input_shape`` cannot be understood.

    Example:
        >>> from dopt_api.types import LayerInfo, ModelLayers
        >>> @hookimpl
        ... def dopt_find_layers(model, input_shape):
        ...     return ModelLayers(layers=(LayerInfo("conv1/Conv2D", "Conv2D"),))
        >>> dopt_find_layers(None, None).layers[0].name
        'conv1/Conv2D'
    """


@hookspec
def dopt_optimize(model: Any, plan: Plan, is_train_flag: Any, quant_flag: Any) -> Any:
    """Insert fake quantization into the layers that the strategy file chooses.

    Args:
        model: The float model. Frameworks with modules leave it unchanged and return a quantized copy; frameworks with
            session graphs rewrite its graph in place and return the session.
        plan: The checked strategy file; ``plan.quantized`` holds the layers to quantize, each with its strategy and
            range method.
        is_train_flag: Whether scales follow training: a boolean scalar of the graph, or ``None`` where modules carry
            their own mode.
        quant_flag: 0 for the float path, positive for the quantized one: an integer scalar, or ``None`` likewise.

    Returns:
        The quantized model: a copy, or the session. Keys of a float checkpoint stay keys of the quantized model.

    Raises:
        dopt_api.errors.ModelError: The model is already quantized, or cannot be handled.

    Example:
        >>> @hookimpl
        ... def dopt_optimize(model, plan):
        ...     return {**model, "quantized": sorted(plan)}
        >>> dopt_optimize({"layers": 2}, ["fc"])
        {'layers': 2, 'quantized': ['fc']}
    """


@hookspec
def dopt_set_calibrate_state(model: Any, calibration_mode: bool) -> None:
    """Switch calibration on or off.

    On: forward passes run in float and collect ``dopt_api.quantizer.Statistics``, from nothing. Off: the statistics of
    all processes are merged, and the core's ``activation_parameters`` makes scales and zero points of them. Switching
    to the present state does nothing. Statistics are part of a checkpoint, so that who never switches off still exports
    the right parameters.

    Args:
        model: What ``dopt_optimize`` returned.
        calibration_mode: On or off.

    Raises:
        dopt_api.errors.CalibrationError: On switching off: a layer saw no data, or saw NaN or infinity. The message
            names the layer.

    Example:
        >>> @hookimpl
        ... def dopt_set_calibrate_state(model, calibration_mode):
        ...     model["calibrating"] = calibration_mode
        >>> model = {}
        >>> dopt_set_calibrate_state(model, True)
        >>> model
        {'calibrating': True}
    """


@hookspec
def dopt_get_quant_loss(model: Any) -> Any:
    """Give training a term that pulls weights and inputs towards their grids.

    It is the mean over the quantized layers of the relative squared error of the weight and, where a training forward
    pass has run, of the probed elements of the input; see :mod:`dopt_api.quantizer.training`.

    Args:
        model: What ``dopt_optimize`` returned.

    Returns:
        A differentiable, dimensionless scalar of the framework; 0 when every layer is float.

    Example:
        >>> @hookimpl
        ... def dopt_get_quant_loss(model):
        ...     return sum(model["errors"]) / max(len(model["errors"]), 1)
        >>> dopt_get_quant_loss({"errors": [0.25, 0.75]})
        0.5
    """


@hookspec
def dopt_export(  # type: ignore[empty-body]  # see above
    model: Any,
    plan: Plan,
    checkpoint: Path,
    output_dir: Path,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
) -> ExportResult:
    """Write the deployable float graph and ``quant_params.json``, both or neither.

    Batch normalization is folded and the weights of quantized layers lie on their grid. What is written is quantized by
    :func:`dopt_api.params.quantize_layer`, so that equal weights and statistics give equal files whichever the
    framework.

    Args:
        model: The float model, built anew; unchanged afterwards.
        plan: The checked strategy file.
        checkpoint: Path of the state saved after calibration or retraining; nothing in it is executed.
        output_dir: Path of an existing folder.
        output_names: Names of the outputs of the written graph, or ``None`` for the backend's own.
        dynamic_batch: Leave the batch size of the written graph open.

    Returns:
        ``ExportResult``: the paths of the two files, which must exist.

    Raises:
        dopt_api.errors.CheckpointError: The checkpoint is missing, unreadable, or does not fit.
        dopt_api.errors.CalibrationError: A quantized layer was neither calibrated nor trained.
        dopt_api.errors.OutputError: The folder does not exist or cannot be written; ``dopt_api.files.staged`` raises
            it.

    Example:
        >>> from dopt_api.types import ExportResult
        >>> @hookimpl
        ... def dopt_export(model, output_dir):
        ...     return ExportResult(output_dir / "model.onnx", output_dir / "quant_params.json")
        >>> dopt_export(None, Path("out")).params.name
        'quant_params.json'
    """
