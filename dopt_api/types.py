"""What travels between the core and a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopt_api.quantizer.grid import Grid
from dopt_api.quantizer.ranges import DEFAULT_RANGE
from dopt_api.strategy import STRATEGIES, Strategy, strategy_names

__all__ = [
    "HOOK_API_VERSION",
    "BackendInfo",
    "Capabilities",
    "ExportResult",
    "InputSpec",
    "LayerInfo",
    "LayerPlan",
    "ModelLayers",
    "Plan",
]

HOOK_API_VERSION = "1.2"
"""Version of the hooks: an added hook or argument raises the minor number, a removed one the major number."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do beyond finding layers, calibrating and exporting; nothing unless it is claimed.

    Attributes:
        retraining: Scales and weights can be trained through the quantized model.
        quant_loss: ``get_quant_loss`` works.
        distributed_calibration: Statistics of several processes are merged.
        dynamic_batch: The exported graph can leave the batch size open.
        session_graph: ``optimize`` rewrites a graph in place and takes the two flags of the contract.
        weight_only: Layers can have integer weights and a float input.
        recorded_outputs: The outputs of layers are recorded and quantized where a plan asks for it.
    """

    retraining: bool = False
    quant_loss: bool = False
    distributed_calibration: bool = False
    dynamic_batch: bool = False
    session_graph: bool = False
    weight_only: bool = False
    recorded_outputs: bool = False


@dataclass(frozen=True)
class BackendInfo:
    """A backend's description of itself, given without importing its framework.

    Attributes:
        name: The name of its entry point, such as ``torch``.
        framework: The framework's import name.
        framework_version: Its installed version, or ``None`` if it is not installed.
        version: The backend's own version.
        model_types: Qualified names of the classes whose instances it handles, such as
            ``torch.nn.modules.module.Module``; subclasses are recognised by their bases.
        hook_api_version: The version of the hooks that the backend was written for.
        capabilities: What it claims.
    """

    name: str
    framework: str
    framework_version: str | None
    version: str
    model_types: tuple[str, ...]
    hook_api_version: str
    capabilities: Capabilities = field(default_factory=Capabilities)

    def owns(self, model: object) -> bool:
        """Return whether the model's own type, or a base of it, is one of ``model_types``."""
        return any(f"{kind.__module__}.{kind.__qualname__}" in self.model_types for kind in type(model).__mro__)


@dataclass(frozen=True)
class LayerInfo:
    """A layer of a model, or an operation of it that cannot be quantized.

    Attributes:
        name: Unique in the model and stable from the strategy file to the parameter file.
        op_type: The kind of layer, as the strategy file names it.
        strategies: Names of the strategies that its kind supports; empty if it cannot be quantized.
        reason: Why it cannot be quantized; empty if it can.
        weight_only: Whether its input can be left float while its weight is quantized.
        row: How many weights an output channel has, where they can have groups and zero points; otherwise 0.
    """

    name: str
    op_type: str
    strategies: tuple[str, ...] = field(default_factory=strategy_names)
    reason: str = ""
    weight_only: bool = False
    row: int = 0

    @property
    def offered(self) -> tuple[str, ...]:
        """The strategies of its kind that this layer can have, as far as can be said without loading extensions."""
        return tuple(name for name in self.strategies if name not in STRATEGIES or not self.unfit(STRATEGIES[name]))

    def unfit(self, strategy: Strategy) -> str:
        """Return why this layer cannot have a strategy, or nothing if it can."""
        return strategy.unfit(weight_only=self.weight_only, row=self.row)


@dataclass(frozen=True)
class ModelLayers:
    """All that a backend found in a model.

    Attributes:
        layers: The layers that can be quantized, in execution order.
        not_quantizable: Operations that stay float, each with its reason.
        notes: Remarks for the user about the model as a whole.
        structure: The backend's own knowledge of the graph, handed back to it with the plan.
    """

    layers: tuple[LayerInfo, ...]
    not_quantizable: tuple[LayerInfo, ...] = ()
    notes: tuple[str, ...] = ()
    structure: Any = None


@dataclass(frozen=True)
class InputSpec:
    """One input of the deployed model: its name, shape, and dtype name (``float32`` unless the text says otherwise)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done with one layer.

    Attributes:
        name: The layer's name.
        op_type: Its kind.
        strategy: Its strategy.
        range_method: How its ranges are chosen from the statistics.
        output: Whether its output is recorded and quantized as well, on the grid of the strategy's activations.
    """

    name: str
    op_type: str
    strategy: Strategy
    range_method: str = DEFAULT_RANGE
    output: bool = False

    @property
    def input_grid(self) -> Grid:
        """The grid of the layer's input, for layers that quantize it.

        Raises:
            ValueError: The strategy leaves the input float, which only backends that claim ``weight_only`` meet.
        """
        if self.strategy.activation is None:
            raise ValueError(f"The strategy {self.strategy.name!r} of layer {self.name!r} leaves the input float")
        return self.strategy.activation


@dataclass(frozen=True)
class Plan:
    """A strategy file, checked against a model.

    Attributes:
        config_file: Where it was read from.
        inputs: The inputs of the deployed model; empty where the backend needs none.
        quantized: The layers to quantize by name, in execution order; all others stay float.
        model_layers: What the backend found in the model.
    """

    config_file: Path
    inputs: tuple[InputSpec, ...]
    quantized: Mapping[str, LayerPlan]
    model_layers: ModelLayers


@dataclass(frozen=True)
class ExportResult:
    """The files an export wrote.

    Attributes:
        model: The float graph.
        params: The parameter file.
        others: The files of other formats that were asked for.
    """

    model: Path
    params: Path
    others: tuple[Path, ...] = ()
