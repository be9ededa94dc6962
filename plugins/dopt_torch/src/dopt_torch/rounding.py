"""Rounding the weights of a calibrated model so that its outputs, and not its weights, have the least error."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dopt_api.errors import CalibrationError, never_calibrated
from dopt_api.files import StrPath
from dopt_api.quantizer.rounding import Moments, RoundedLayer, round_layer
from dopt_api.quantizer.short_sums import partners
from dopt_torch.checkpoint import KeptWork
from dopt_torch.layer_kinds import on_weight
from dopt_torch.optimize import root_of
from dopt_torch.quantized_layer import (
    QuantizedLayer,
    norm_factor,
    norm_of,
    original_class,
    quantized_layers,
    shadowed,
)
from dopt_torch.running import evaluation, run, taking_over

__all__ = ["RoundedLayer", "round_weights"]

Progress = Callable[[list["_Rounding"]], Iterable["_Rounding"]]


def round_weights(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    positions: int = 128,
    damping: float = 0.3,
    short_sums: bool = False,
    seed: int = 0,
    seconds: float | None = None,
    resume: StrPath | None = None,
    progress: Progress = iter,
) -> list[RoundedLayer]:
    """Round the weights of a calibrated model, layer by layer, and correct their biases; the model is changed in place.

    Layer after layer, in execution order, the quantized inputs of a layer are sampled, with all layers before it
    rounded already, and :func:`dopt_api.quantizer.rounding.round_layer` rounds the weight that best gives the *float*
    network's outputs on these inputs; the bias (or the running mean of the batch normalization that is folded in)
    takes up the difference to the float output's mean. The weights then lie on their grids: exporting gives just these
    integers. A pass that fails leaves the model as it was.

    Some 32 to 64 samples are enough; time is about half a forward pass over them for each layer, and memory holds
    the float outputs at the sampled positions. Convolutions in two dimensions and linear layers are rounded; others
    are listed with the reason.

    Args:
        model: What ``optimize_model`` returned, calibrated. Its modes are restored.
        batches: Inputs as the model takes them: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
        positions: How many positions of each sample's output are looked at.
        damping: See :func:`~dopt_api.quantizer.rounding.round_weight`.
        short_sums: For kernels that add two products in 16 bits, as on processors with AVX2 and without VNNI: in the
            channels in which such a sum can overflow, the weights are rounded to a range in which none can.
        seed: Of the positions.
        seconds: After that time, layers that are left stay rounded to nearest, and are listed with that reason.
        resume: A file that keeps what is done, layer by layer. If a call was interrupted, the same call with the same
            model (not the interrupted one: built, quantized and calibrated anew), batches and arguments goes on from
            there and ends with the same numbers. It is removed at the end.
        progress: Wraps the list of layers to show progress, such as ``tqdm.tqdm`` or ``rich.progress.track``.

    Returns:
        What was done, for each quantized layer in execution order.

    Raises:
        ModelError: The model is not a quantized one.
        CalibrationError: A layer was never calibrated, or there are no batches.
        CheckpointError: The file to resume from is damaged, or is that of another call.
        OutputError: That file cannot be written.
    """
    end = None if seconds is None else time.monotonic() + seconds
    root, data = root_of(model), list(batches)
    if not data:
        raise CalibrationError("There are no batches", expected="one or more inputs of the model")
    roundings = _roundings(root, positions, seed)
    kept = None if resume is None else KeptWork(Path(resume), root, [len(data), positions, damping, short_sums, seed])
    with torch.no_grad(), evaluation(model), _kept_on_failure(root):
        _sample_float(model, data, roundings)
        done = [] if kept is None else [RoundedLayer(*row) for row in kept.restore()]
        for rounding, result in zip(roundings, done, strict=False):
            rounding.result = result
        for number, rounding in enumerate(progress(roundings[len(done) :]), len(done)):
            if end is not None and time.monotonic() > end:
                rounding.reason = rounding.reason or "no time was left for it"
            if not rounding.reason:
                with _sampling([rounding], "sample_quantized"):
                    for batch in data:
                        _run_until(model, batch, rounding)
            rounding.conclude(damping, short_sums)
            if kept is not None:
                kept.keep([astuple(earlier.result) for earlier in roundings[: number + 1]])
    if kept is not None:
        kept.forget()
    return [rounding.result for rounding in roundings]


def _roundings(root: nn.Module, positions: int, seed: int) -> list[_Rounding]:
    """Return what is to be rounded, in execution order."""
    by_name = {layer.dopt_quantizer.plan.name: layer for layer in quantized_layers(root)}
    ordered = [by_name[name] for name in root.__dict__["dopt_plan"].quantized if name in by_name]
    if missing := [name for name, layer in by_name.items() if not layer.dopt_quantizer.is_ready()]:
        raise never_calibrated(missing)
    owners = Counter(id(layer.weight) for layer in ordered)
    return [
        _Rounding(layer, _Sampler(layer, positions, seed + number), owners[id(layer.weight)] > 1)
        for number, layer in enumerate(ordered)
    ]


def _sample_float(model: nn.Module, data: list[Any], roundings: list[_Rounding]) -> None:
    """Run the network in float and keep what each layer gives."""
    with _sampling(roundings, "sample_float"):
        for batch in data:
            run(model, batch)
    for rounding in roundings:
        even = rounding.calls % len(data) == 0  # else nobody knows when a batch is done with the layer
        rounding.calls_a_batch = rounding.calls // len(data) if even else 0


class _Reached(Exception):  # noqa: N818  # no error: the layer has what it needs of this batch
    """A layer was run as often as a batch runs it."""


class _Sampler:
    """Takes the patches of a layer's input from random positions of its output, the same in each pass."""

    def __init__(self, layer: QuantizedLayer, positions: int, seed: int) -> None:
        self.layer, self.positions, self.seed = layer, positions, seed
        self.function = layer.dopt_quantizer.kind.function
        self.restart()

    def restart(self) -> None:
        """Begin the positions anew."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def patches(self, call: _Call) -> Tensor:
        """Return ``[N, G, K]`` of a call of the layer's function."""
        if self.function == "linear":
            return self._rows(call.x)
        return self._windows(call)

    def _rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        wanted = self.positions * (x.shape[0] if x.dim() > 1 else 1)
        if len(rows) > wanted:
            rows = rows[torch.randint(len(rows), (wanted,), generator=self.generator).to(x.device)]
        return rows[:, None, :]

    def _windows(self, call: _Call) -> Tensor:
        x, (height, width) = call.padded(), call.kernel
        rows, columns = (
            (x.shape[2 + i] - call.dilation[i] * (call.kernel[i] - 1) - 1) // call.stride[i] + 1 for i in range(2)
        )
        shape = (x.shape[0], min(self.positions, rows * columns))
        sample = torch.arange(x.shape[0], device=x.device)[:, None]
        top, left = (
            torch.randint(size, shape, generator=self.generator).to(x.device) * call.stride[i]
            for i, size in enumerate((rows, columns))
        )
        found = [
            x[sample, :, top + i * call.dilation[0], left + j * call.dilation[1]].reshape(-1, x.shape[1])
            for i in range(height)
            for j in range(width)
        ]
        return torch.stack(found, -1).reshape(len(found[0]), call.groups, -1)


@dataclass(frozen=True)
class _Call:
    """A call of ``conv2d`` or ``linear``, as a layer's ``forward`` made it."""

    x: Tensor
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: Any = 0
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def padded(self) -> Tensor:
        """Return the input with its padding, ``[N, C, H, W]``."""
        x = self.x if self.x.dim() == 4 else self.x[None]
        if self.padding == "valid":
            return x
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            sides = [side for size in reversed(total) for side in (size // 2, size - size // 2)]
            return functional.pad(x, sides)
        vertical, horizontal = _pair(self.padding)
        return functional.pad(x, [horizontal, horizontal, vertical, vertical])


class _Watched(Tensor):
    """A tensor that shows how the layer's own function is called with it."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the call, then make it."""
        name = getattr(func, "__name__", "")
        watched = next((one for one in (*args, *(kwargs or {}).values()) if isinstance(one, _Watched)), None)
        result = super().__torch_function__(func, types, args, kwargs or {})
        if watched is not None and hasattr(watched, "calls"):
            if name in ("conv2d", "linear"):
                watched.calls.append((name, args, kwargs or {}))
            if isinstance(result, _Watched):
                result.calls = watched.calls
        return result


class _Rounding:
    """One layer that is rounded."""

    def __init__(self, layer: QuantizedLayer, sampler: _Sampler, shared: bool) -> None:
        self.layer, self.quantizer, self.sampler = layer, layer.dopt_quantizer, sampler
        self.forward = original_class(layer).forward
        self.moments, self.outputs = Moments(), list[Tensor]()
        self.calls, self.calls_a_batch, self.left = 0, 0, 0
        self.reason = "its weight is another layer's too" if shared else ""
        grid = self.quantizer.plan.strategy.weight
        if self.quantizer.kind.function not in ("conv2d", "linear"):
            self.reason = f"{self.quantizer.kind.label} is not rounded by this method"
        elif grid.group is not None or not grid.symmetric:
            self.reason = "weights in groups or with zero points are not rounded by this method"
        self.result = RoundedLayer(self.quantizer.plan.name, reason=self.reason)

    # The input is the only tensor that these layers take; by whatever name it comes, it is passed on by position.

    def sample_float(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer in float and keep what it gives at the sampled positions."""
        self.calls += 1
        result, patches = self._sample(args, kwargs)
        if patches is not None:
            weight: Any = self.layer.weight
            groups = patches.shape[1]
            rows = weight.reshape(groups, len(weight) // groups, -1)
            self.outputs.append(torch.einsum("ngk,gok->ngo", patches, rows))
        return result

    def sample_quantized(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the layer's quantized input, and end the pass once the batch needs the layer no more."""
        x = args[0] if args else next(iter(kwargs.values()))
        weight: Any = self.layer.weight
        with shadowed(self.layer, weight=self.quantizer.smooth_weight(weight)):
            result, patches = self._sample((self.quantizer.quantize_input(x), *args[1:]), {})
        if patches is not None:
            self.moments.add(patches.cpu().numpy(), self.outputs.pop(0).cpu().numpy())
        self.left -= 1
        if not self.left:
            raise _Reached
        return result

    def _sample(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor | None]:
        x = args[0] if args else next(iter(kwargs.values()))
        watched = x.detach().as_subclass(_Watched)
        watched.calls = []
        result = self.forward(self.layer, watched, *args[1:])
        call = _call_of(watched.calls, self.sampler.function)
        if call is None:
            self.reason = self.reason or f"its forward does not call {self.sampler.function} once"
        sampled = None if self.reason or call is None or not x.numel() else self.sampler.patches(call)
        return result.as_subclass(Tensor), sampled

    def conclude(self, damping: float, short_sums: bool) -> None:
        """Round the weight and correct the bias."""
        if not self.reason and not self.moments.count:
            self.reason = "no batch reached it"
        if self.reason:
            self.result = RoundedLayer(self.quantizer.plan.name, reason=self.reason)
            return
        weight: Any = self.layer.weight
        grid, factor = self.quantizer.plan.strategy.weight, norm_factor(self.layer)
        folding = (
            torch.ones(len(weight)) if factor is None else torch.where(factor == 0, torch.ones_like(factor), factor)
        )
        on = on_weight(folding.to(weight.device), weight, 0)
        groups = self.moments.first.shape[0]
        shape = (groups, len(weight) // groups, -1)
        folded = self.quantizer.smooth_weight(weight.float()) * on
        w, s, f = (
            part.double().cpu().numpy().reshape(shape)
            for part in (folded, self.quantizer.learned_weight_scale(folded), on)
        )
        found = round_layer(
            w,
            s[..., 0],
            self.moments,
            grid,
            factor=f,
            damping=damping,
            pairs=self._pairs(groups) if short_sums else None,
        )
        rounded = torch.from_numpy(found.weight).reshape(weight.shape).to(weight.device)
        weight.copy_(rounded / self.quantizer.smooth_weight(torch.ones_like(weight)))
        self.quantizer.weight_gain.copy_(torch.from_numpy(found.gain).to(self.quantizer.weight_gain))
        self._correct(torch.from_numpy(found.shift))
        self.result = RoundedLayer(self.quantizer.plan.name, found.nearest, found.rounded)

    def _pairs(self, groups: int) -> Any:
        """Return which weights short sums pair, where the input has 8 bits."""
        if self.quantizer.plan.input_grid.bits != 8:
            return None
        outputs, channels, *window = self.layer.weight.shape  # type: ignore[misc]  # a quantized layer has a weight
        return partners(groups, outputs // groups, channels, math.prod(window), channels_last=False)

    def _correct(self, shift: Tensor) -> None:
        """Let the bias, or the running mean of the normalization, take up what the mean of the output moved by."""
        bias: Any = self.layer._parameters.get("bias")
        norm: Any = norm_of(self.layer)
        if bias is not None:
            bias.add_(shift.to(bias))
        elif norm is not None:
            norm.running_mean.sub_(shift.to(norm.running_mean))


def _call_of(calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]], function: str) -> _Call | None:
    """Return the one call of the layer's function, or ``None`` if there is not just one."""
    own = [(args, kwargs) for name, args, kwargs in calls if name == function]
    if len(own) != 1:
        return None
    (args, kwargs) = own[0]
    given = dict(zip(("x", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
    given.update({("x" if key == "input" else key): value for key, value in kwargs.items()})
    x = given["x"].as_subclass(Tensor)
    if function == "linear":
        return _Call(x)
    return _Call(
        x,
        tuple(given["weight"].shape[2:]),
        _pair(given.get("stride", 1)),
        given.get("padding", 0),
        _pair(given.get("dilation", 1)),
        given.get("groups", 1),
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


def _run_until(model: nn.Module, batch: Any, rounding: _Rounding) -> None:
    """Run the model until the layer has been called as often as a batch calls it."""
    rounding.left = rounding.calls_a_batch
    with suppress(_Reached):
        run(model, batch)


def _sampling(roundings: list[_Rounding], method: str) -> AbstractContextManager[None]:
    """Let a method of each take the place of the layer's own forward, with the positions begun anew."""
    for rounding in roundings:
        rounding.sampler.restart()
    return taking_over({rounding.layer: getattr(rounding, method) for rounding in roundings})


@contextmanager
def _kept_on_failure(model: nn.Module) -> Iterator[None]:
    """Restore parameters and buffers where the block fails."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        raise
