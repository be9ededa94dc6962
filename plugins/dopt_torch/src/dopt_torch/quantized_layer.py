"""Turning a layer into a quantized one, in place: the same module, of a subclass of its own class.

The layer keeps its parameters and their names, its class for ``isinstance``, its hooks and its own ``forward``, which
then sees a fake-quantized input and, for the time of the call, a fake-quantized ``weight``.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dopt_api.errors import CalibrationError
from dopt_api.types import LayerPlan
from dopt_torch.activation import ActivationQuantizer, OutputQuantizer
from dopt_torch.layer_kinds import LayerKind
from dopt_torch.quantizer import LayerQuantizer

__all__ = [
    "QuantizedLayer",
    "activations",
    "norm_factor",
    "norm_of",
    "original_class",
    "quantize_in_place",
    "quantized_layers",
    "shadowed",
    "with_input",
]


class QuantizedLayer(nn.Module):
    """What is mixed into the class of a quantized layer.

    Attributes:
        dopt_quantizer: The layer's quantizer, a submodule.
        dopt_norm: Parent module and name of the batch normalization that is folded in, or ``None``. It is looked up
            at each call, since other tools replace it (``SyncBatchNorm.convert_sync_batchnorm``).
        dopt_output: The quantizer of the layer's output, a submodule, or ``None`` where it is not recorded. The output
            is what comes behind the batch normalization.
    """

    dopt_quantizer: LayerQuantizer
    dopt_output: OutputQuantizer | None
    dopt_norm: tuple[nn.Module, str] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own ``forward``: observed, quantized, or as it is."""
        quantizer = self.dopt_quantizer
        x: Tensor = args[0] if args else kwargs[_input_name(original_class(self))]  # type: ignore[arg-type]  # mypy doubts that types are hashable
        if quantizer.calibrating:
            self._refuse_replica()
            quantizer.observe(x)
            return self._output(super().forward(*args, **kwargs))
        if not quantizer.prepare(x):
            return super().forward(*args, **kwargs)
        args, kwargs = with_input(original_class(self), args, kwargs, quantizer.quantize_input)
        with self.__dict__["dopt_lock"]:  # threads that run one model take turns in a layer
            weight: Any = self.weight
            with shadowed(self, weight=quantizer.quantize_weight(weight, norm_factor(self))):
                made = super().forward(*args, **kwargs)
        return self._output(made)

    def _output(self, made: Any) -> Any:
        """Observe or quantize the output where it is recorded, or leave that to the batch normalization's hook."""
        output, norm = self.dopt_output, norm_of(self)
        if output is None:
            return made
        if norm is None:
            return output.take(made)
        hook = _OutputHook(output)
        if hook not in norm._forward_hooks.values():  # it is another module now than before
            norm.register_forward_hook(hook)
        output.pending += 1
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the original class, since this one is made at run time."""
        reduced: Any = super().__reduce_ex__(protocol)
        state = {key: value for key, value in reduced[2].items() if key != "dopt_lock"}
        return (_new, (original_class(self),), state, *reduced[3:])

    def _refuse_replica(self) -> None:
        if getattr(self, "_is_replica", False):
            raise CalibrationError(
                "The model is being calibrated through DataParallel, whose replicas are thrown away",
                where=f"layer {self.dopt_quantizer.plan.name!r}",
                fix="Run the calibration passes on the model itself ('wrapped.module').",
            )


class _OutputHook:
    """What a batch normalization does with its output after the layer that it is folded into has run quantized."""

    def __init__(self, output: OutputQuantizer) -> None:
        self.output = output

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OutputHook) and other.output is self.output

    def __hash__(self) -> int:
        return id(self.output)

    def __call__(self, _norm: nn.Module, _given: Any, made: Tensor) -> Tensor | None:
        if not self.output.pending:
            return None
        self.output.pending -= 1
        return self.output.take(made)


def quantize_in_place(
    layer: nn.Module,
    plan: LayerPlan,
    kind: LayerKind,
    norm: tuple[nn.Module, str] | None,
    rectifier: tuple[float, float] | None = None,
) -> None:
    """Make ``layer`` a quantized layer."""
    weight: Any = layer.weight
    layer.dopt_quantizer = LayerQuantizer(plan, kind, weight).train(layer.training)
    layer.dopt_output = None
    if plan.output:
        layer.dopt_output = OutputQuantizer(plan, kind, weight.device, rectifier).train(layer.training)
    layer.__dict__.update(dopt_norm=norm, dopt_lock=threading.RLock())
    layer.__class__ = _quantized_class(type(layer))  # type: ignore[arg-type]  # mypy doubts that types are hashable


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    """Return the quantized layers of a model, wrapped or not."""
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


def activations(model: nn.Module) -> list[ActivationQuantizer]:
    """Return what is known of the inputs of a model's quantized layers, and of the outputs that are recorded."""
    pairs = [(layer.dopt_quantizer, layer.dopt_output) for layer in quantized_layers(model)]
    return [quantizer for pair in pairs for quantizer in pair if quantizer is not None]


def original_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a quantized layer had."""
    return type(layer).__mro__[2]


def norm_of(layer: nn.Module) -> nn.Module | None:
    """Return the batch normalization that is folded into a quantized layer, or ``None``."""
    place = layer.__dict__["dopt_norm"]
    norm = None if place is None else place[0]._modules.get(place[1])
    return norm if isinstance(norm, _BatchNorm) else None  # a user may have fused it into the layer meanwhile


def norm_factor(layer: nn.Module) -> Tensor | None:
    """Return what folding multiplies a layer's weight by, as the core does: ``[C]`` float32 without a gradient."""
    norm: Any = norm_of(layer)
    if norm is None:
        return None
    with torch.no_grad():
        root = torch.sqrt(norm.running_var.double() + norm.eps)
        gamma = torch.ones_like(root) if norm.weight is None else norm.weight.double()
        return (gamma / root).float()


def with_input(
    original: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call of a layer's ``forward`` with its input changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = _input_name(original)  # type: ignore[arg-type]  # mypy doubts that types are hashable
    return args, {**kwargs, name: change(kwargs[name])}


@contextmanager
def shadowed(layer: nn.Module, **tensors: Tensor) -> Iterator[None]:
    """Let attributes such as ``layer.weight`` be other tensors for the time of the block; parameters are untouched."""
    before = {name: layer.__dict__[name] for name in tensors if name in layer.__dict__}
    layer.__dict__.update(tensors)
    try:
        yield
    finally:
        for name in tensors:
            del layer.__dict__[name]
        layer.__dict__.update(before)


@cache
def _quantized_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Quantized{original.__name__}", (QuantizedLayer, original), {"__module__": original.__module__})


@cache
def _input_name(original: type[nn.Module]) -> str:
    """Return what a layer's ``forward`` calls its input."""
    return list(inspect.signature(original.forward).parameters)[1]


def _new(original: type[nn.Module]) -> nn.Module:
    made = _quantized_class(original)  # type: ignore[arg-type]  # see above
    layer = made.__new__(made)
    layer.__dict__["dopt_lock"] = threading.RLock()
    return layer
