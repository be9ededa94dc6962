"""What is in a model: its layers in execution order, what cannot be quantized and why, and what can be folded.

The model runs once on its deployed shapes, with inputs of a tensor subclass that sees every function call. Control
flow on data is no obstacle, since nothing is traced into a graph: the calls that happen are recorded.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from dopt_api import config
from dopt_api.errors import ConfigError, ModelError
from dopt_api.types import InputSpec, LayerInfo, ModelLayers
from dopt_torch.layer_kinds import LayerKind, kind_of, layer_name

__all__ = ["Structure", "evaluating", "example_inputs", "find_layers", "refuse_wrapped", "tensors_of"]


@dataclass(frozen=True)
class Structure:
    """What running the model once has shown. Modules are named by their paths.

    Attributes:
        paths: Module path of every layer that can be quantized, by layer name.
        norms: Path of the batch normalization to fold into a layer, by the layer's module path.
        outputs: How many tensors the model returns, or ``None`` if it could not be run.
        pairs: Module paths of two layers, the second of which alone takes the output of the first, through nothing but
            its folded batch normalization and operations that commute with a positive factor on a channel.
        rectifiers: The ends of the rectifier that alone reads a layer's output, behind its folded batch normalization,
            by the layer's module path; only of layers that are called once.
        computes_more: Module paths of layers that return something else than what their own function made.
    """

    paths: dict[str, str]
    norms: dict[str, str]
    outputs: int | None
    pairs: tuple[tuple[str, str], ...] = ()
    rectifiers: dict[str, tuple[float, float]] = field(default_factory=dict)
    computes_more: frozenset[str] = frozenset()


def find_layers(model: nn.Module, input_shape: str | None) -> ModelLayers:
    """Run the model once on noise of its deployed shapes and list what is in it.

    Args:
        model: The float model; its parameters, buffers and modes are unchanged afterwards.
        input_shape: The contract's text, such as ``"x:1,3,224,224"``.

    Raises:
        ModelError: The model is wrapped, scripted, compiled or already quantized.
        ConfigError: There is no ``input_shape``, or it cannot be understood.
    """
    refuse_wrapped(model)
    if input_shape is None:
        raise ConfigError(
            "There is no input shape",
            where="input_shape",
            expected="the shapes of the model as deployed, such as 'x:1,3,224,224'",
            fix="Pass input_shape to generate_config_file (dopt config new: --input-shape); the file keeps it.",
        )
    inputs = config.parse_input_shape(input_shape)
    try:
        observed = copy.deepcopy(model)  # models keep things between calls; what is kept must not come from this run
    except Exception:  # noqa: BLE001  # whatever a user's module raises on being copied; optimizing will say so
        observed = model
    record = _Record(observed)
    if observed is not model:
        record.lend_biases()
    try:
        record.run(example_inputs(observed, inputs))
    except Exception as error:  # noqa: BLE001  # a user's model can raise anything; the structure is then unknown
        return _by_definition(model, input_shape, error)
    return record.result()


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if the model is not a plain float ``nn.Module``.

    Raises:
        ModelError: It is wrapped by a distributed API, scripted, compiled, or already quantized.
    """
    for path, module in model.named_modules():
        kind = type(module).__name__
        where = f"module {path!r}" if path else "the model itself"
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            raise ModelError(
                f"The model is wrapped by {kind}",
                where=where,
                expected="the plain model",
                fix="Pass 'model.module', and wrap the quantized model afterwards.",
            )
        if kind == "OptimizedModule":
            raise ModelError(
                "The model is compiled by torch.compile",
                where=where,
                expected="the plain model",
                fix="Pass the model before torch.compile.",
            )
        if not path and isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                "The model is a TorchScript module, whose layers cannot be changed",
                where=where,
                expected="an nn.Module written in Python",
                fix="Pass the module that was scripted or traced.",
            )
        if any(isinstance(parameter, UninitializedParameter) for parameter in module._parameters.values()):
            raise ModelError(
                f"The {kind} has no weights yet",
                where=where,
                expected="a model whose layers know their shapes",
                fix="Run the model once on data before.",
            )
        if "dopt_quantizer" in module._modules or "dopt_plan" in module.__dict__:
            raise ModelError(
                "The model is already quantized",
                where=where,
                expected="a float model",
                fix="Build the float model anew and pass that; its weights are loaded from the checkpoint.",
            )


def example_inputs(model: nn.Module, inputs: tuple[InputSpec, ...]) -> tuple[Tensor, ...]:
    """Return one tensor an input, on the model's device: noise for floats, zeros for integers, true for masks.

    ``float32`` stands for the model's own floating type. The global random state is not touched.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    noise = torch.Generator().manual_seed(0)
    tensors = []
    for spec in inputs:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            values = torch.randn(spec.shape, generator=noise).to(first.dtype if dtype is torch.float32 else dtype)
        else:
            values = torch.full(spec.shape, dtype is torch.bool, dtype=dtype)
        tensors.append(values.to(first.device))
    return tuple(tensors)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode for the block, and back to its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# How functions are called that multiply tensors, and why they stay float.
_FUNCTIONAL = "it is called as a function, so its operands have no module to hold their quantizers"
_RECURRENT = "recurrent layers are not quantized in this version"
_ATTENTION = "fused attention computes its products inside one call"
_PRODUCT = "a product of two activations is not quantized in this version"
_REASONS = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"),
        _FUNCTIONAL,
    ),
    **dict.fromkeys(("bilinear", "conv_tbc"), _FUNCTIONAL),
    **dict.fromkeys(
        ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _RECURRENT
    ),
    **dict.fromkeys(
        (
            "multi_head_attention_forward",
            "scaled_dot_product_attention",
            "_native_multi_head_attention",
            "_transformer_encoder_layer_fwd",
        ),
        _ATTENTION,
    ),
    **dict.fromkeys(
        ("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot", "inner", "einsum", "tensordot"), _PRODUCT
    ),
    **dict.fromkeys(("addmm", "addbmm", "baddbmm", "addmv", "addmm_", "addbmm_", "baddbmm_", "addmv_"), _PRODUCT),
    **dict.fromkeys(("chain_matmul", "multi_dot", "linalg_multi_dot", "matrix_power"), _PRODUCT),
}

# Calls that only ask about a tensor and so do not use its values.
_PADS = ("pad", "_pad", "_pad_circular")

_HOMOGENEOUS = frozenset(
    (
        *("relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "dropout_", "feature_dropout"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "contiguous"),
    )
)
"""Functions of evaluation mode whose channels are multiplied by what the channels of their input are multiplied by."""

_RECTIFIERS = {
    **dict.fromkeys(("relu", "relu_", "relu6"), ()),
    **dict.fromkeys(("hardtanh", "hardtanh_"), ("min_val", "max_val")),
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_"), ("min", "max")),
    **dict.fromkeys(("clamp_min", "clamp_min_"), ("min",)),
}
"""Functions that can be rectifiers, and what they call their ends."""

_ASKS = frozenset(
    (
        *("__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex", "__len__"),
        *("ndimension", "nelement", "element_size", "get_device", "storage_offset", "type", "__repr__", "__hash__"),
    )
)


@dataclass
class _Call:
    """One use of a layer: the tensors that its own function took and gave."""

    given: Tensor
    made: Any
    weight: Any
    bias: Any
    module_input: Tensor | None


@dataclass
class _Record:
    """The run of one model: module stack, calls, and who uses which tensor."""

    model: nn.Module
    stack: list[nn.Module] = field(default_factory=list)
    stack_inputs: list[Tensor | None] = field(default_factory=list)
    calls: dict[nn.Module, list[_Call]] = field(default_factory=dict)
    norm_calls: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    refused: dict[nn.Module, str] = field(default_factory=dict)
    used_elsewhere: dict[nn.Module, str] = field(default_factory=dict)
    functions: list[LayerInfo] = field(default_factory=list)
    uses: Counter[int] = field(default_factory=Counter)
    padded_from: dict[int, Tensor] = field(default_factory=dict)
    scaled_from: dict[int, Tensor] = field(default_factory=dict)
    passed_in_place: Counter[int] = field(default_factory=Counter)
    rectified: dict[int, tuple[tuple[float, float], bool]] = field(default_factory=dict)
    computes_more: set[nn.Module] = field(default_factory=set)
    normalized_by: dict[int, nn.Module] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    lent_bias: set[nn.Module] = field(default_factory=set)
    ignores_bias: set[nn.Module] = field(default_factory=set)
    outputs: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        self.paths = {module: path for path, module in self.model.named_modules()}
        self.owners = {
            id(parameter): module
            for module in self.paths
            if kind_of(module) is not None
            for name, parameter in module._parameters.items()
            if name == "weight" and parameter is not None
        }

    def lend_biases(self) -> None:
        """Give layers without a bias one of zeros, to see whether their forward would use it."""
        for module in self.paths:
            kind = kind_of(module)
            weight = None if kind is None else module._parameters.get("weight")
            if kind is not None and weight is not None and module._parameters.get("bias", weight) is None:
                channels = weight.shape[kind.weight_axis] * (getattr(module, "groups", 1) if kind.weight_axis else 1)
                module._parameters["bias"] = nn.Parameter(weight.new_zeros(channels), requires_grad=False)
                self.lent_bias.add(module)

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        """Run the model on ``inputs`` and record what happens."""
        record = self

        class Watched(Tensor):
            """A tensor that reports the functions it meets; what they make is watched too."""

            @classmethod
            def __torch_function__(
                cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                result = super().__torch_function__(func, types, args, kwargs or {})
                record.see(getattr(func, "__name__", ""), args, kwargs or {}, result)
                return result

        def watched(value: Any) -> Any:
            # also what does not come from the model's inputs, such as parameters given to a module, and what code
            # returns that hides tensors from the watch, such as scripted modules
            return _map_tensors(value, lambda t: t if isinstance(t, Watched) else t.as_subclass(Watched))

        def enter(module: nn.Module, args: Any) -> Any:
            args = watched(args)
            self.stack.append(module)
            self.stack_inputs.append(next(tensors_of(args), None))
            return args

        def leave(module: nn.Module, _args: Any, output: Any) -> Any:
            self.stack.pop()
            self.stack_inputs.pop()
            if module in self.calls and self.calls[module][-1].made is not output:
                self.computes_more.add(module)
            return watched(output)

        hooks = []
        try:
            for module in self.paths:
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # it takes no hooks
                hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
            devices = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
            with torch.no_grad(), evaluating(self.model), torch.random.fork_rng(list(devices)):
                output = self.model(*(tensor.as_subclass(Watched) for tensor in inputs))
            for tensor in tensors_of(output):
                self.outputs += 1
                self.uses[id(tensor)] += 1
        finally:
            self.closed = True
            self.alive.clear()
            for hook in hooks:
                hook.remove()

    def see(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Take note of one function call."""
        if self.closed or (name in _ASKS and next(tensors_of(result), None) is None):
            return
        self.alive.append((args, kwargs, result))  # so that no id is used twice
        for tensor in tensors_of((args, kwargs)):
            self.uses[id(tensor)] += 1
        module = self.stack[-1] if self.stack else self.model
        given = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        if isinstance(given, Tensor) and isinstance(result, Tensor):
            self.see_between(name, module, given, result, padded=name in _PADS and _pads_zero(args, kwargs))
            ends = _rectifies(name, args, kwargs)
            if ends is not None and self.uses[id(given)] == 1:
                self.rectified[id(given)] = ends, result is given
        if name not in _REASONS:
            return
        kind = kind_of(module)
        if kind is not None and name == kind.function:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self.see_layer(module, _Call(given, result, weight, bias, self.stack_inputs[-1]))
            return
        for tensor in tensors_of((args, kwargs)):
            owner = self.owners.get(id(tensor))
            if owner is not None and owner is not module:
                self.used_elsewhere[owner] = (
                    f"its weight is used by {name} in {self.at(module)}, not through its own forward"
                )
        self.functions.append(self.function_info(name, module))

    def see_between(self, name: str, module: nn.Module, given: Tensor, result: Tensor, padded: bool) -> None:
        """Take note of what happens to a tensor between two layers."""
        if padded:
            self.padded_from[id(result)] = given
        if isinstance(module, _BatchNorm) and name == "batch_norm":
            self.norm_calls.setdefault(module, []).append(given)
            self.normalized_by[id(result)] = module
        if (padded or name in _HOMOGENEOUS) and result is not given:
            self.scaled_from[id(result)] = given
        elif name in _HOMOGENEOUS:
            self.passed_in_place[id(given)] += 1

    def see_layer(self, module: nn.Module, call: _Call) -> None:
        """Take note of a layer's own computation, or of why it cannot be quantized."""
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            self.refused[module] = (
                "its weight is computed before each use (weight_norm, spectral_norm or a parametrization); "
                "remove that first, for example with torch.nn.utils.remove_weight_norm"
            )
        elif call.weight is not module._parameters["weight"]:
            self.refused[module] = "its forward computes with something other than its 'weight' itself"
        elif module in self.lent_bias and call.bias is None:
            self.ignores_bias.add(module)  # then there is no place for the bias that folding brings
        elif call.bias is not module._parameters.get("bias"):
            self.refused[module] = "its forward computes with something other than its 'bias' itself"
        elif not self.same_but_padded(call.given, call.module_input):
            self.refused[module] = "its forward changes the input (more than padding it with zeros) before computing"
        self.calls.setdefault(module, []).append(call)

    def same_but_padded(self, given: Tensor, module_input: Tensor | None) -> bool:
        while given is not module_input and id(given) in self.padded_from:
            given = self.padded_from[id(given)]
        return module_input is None or given is module_input

    def at(self, module: nn.Module) -> str:
        return repr(self.paths[module]) if self.paths.get(module) else "the model's own forward"

    def function_info(self, name: str, module: nn.Module) -> LayerInfo:
        label = type(module).__name__ if _REASONS[name] == _RECURRENT else name
        base = layer_name(self.paths.get(module, ""), label)
        taken = {info.name for info in self.functions}
        unique, number = base, 0
        while unique in taken:
            number += 1
            unique = f"{base}_{number}"
        op_type = str(type(module)) if _REASONS[name] == _RECURRENT else name
        return LayerInfo(unique, op_type, (), _REASONS[name])

    def result(self) -> ModelLayers:
        """Return what was found."""
        layers: list[LayerInfo] = []
        refused: list[LayerInfo] = []
        for module in [*self.calls, *(module for module in self.paths if module not in self.calls)]:
            kind = kind_of(module)
            if kind is None:
                continue
            reason = self.refused.get(module) or self.used_elsewhere.get(module, "")
            if module not in self.calls and not reason:
                reason = "the run on 'input_shape' did not reach it"
            info = _info(self.paths[module], module, kind, reason)
            (refused if reason else layers).append(info)
        paths = {layer_name(self.paths[m], k.label): self.paths[m] for m in self.paths if (k := kind_of(m)) is not None}
        sealed = [path for module, path in self.paths.items() if isinstance(module, torch.jit.ScriptModule)]
        scripted = [
            LayerInfo(layer_name(path, "ScriptModule"), "TorchScript", (), "the layers of TorchScript are sealed")
            for path in sealed
            if not any(path.startswith(f"{outer}.") for outer in sealed)
        ]
        norms = self.find_norms()
        return ModelLayers(
            layers=tuple(layers),
            not_quantizable=(*refused, *self.functions, *scripted),
            notes=self.notes(norms),
            structure=Structure(
                paths,
                norms,
                self.outputs,
                tuple(self.find_pairs(norms)),
                self.find_rectifiers(norms),
                frozenset(self.paths[module] for module in self.computes_more),
            ),
        )

    def find_rectifiers(self, norms: dict[str, str]) -> dict[str, tuple[float, float]]:
        """Find the rectifiers that alone read a layer's output; see :class:`Structure`."""
        normalized = {self.paths[norm]: made for made, norm in self.normalized_by.items()}
        found = {}
        for module, calls in self.calls.items():
            path = self.paths[module]
            made = normalized.get(norms[path]) if path in norms else id(calls[0].made)
            if len(calls) > 1 or made not in self.rectified:
                continue
            ends, in_place = self.rectified[made]
            if in_place or self.uses[made] == 1:
                found[path] = ends
        return found

    def find_pairs(self, norms: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Find the layers of which each alone feeds another; see :class:`Structure`."""
        made_by = {id(calls[0].made): module for module, calls in self.calls.items() if len(calls) == 1}
        for after, calls in self.calls.items():
            if len(calls) > 1 or after in self.refused or after in self.used_elsewhere:
                continue
            given = calls[0].given
            while self.used_once(given) and id(given) in self.scaled_from:
                given = self.scaled_from[id(given)]
            norm = self.normalized_by.get(id(given))
            before = made_by.get(id(given if norm is None else self.norm_calls[norm][0]))
            if before is None or before in self.refused or before in self.used_elsewhere or not self.used_once(given):
                continue
            if norms.get(self.paths[before]) == (None if norm is None else self.paths[norm]):
                yield self.paths[before], self.paths[after]

    def used_once(self, tensor: Tensor) -> bool:
        return self.uses[id(tensor)] - self.passed_in_place[id(tensor)] == 1

    def notes(self, norms: dict[str, str]) -> tuple[str, ...]:
        """Name the batch normalizations that stay as they are."""
        left = [self.paths[norm] for norm in self.norm_calls if self.paths[norm] not in norms.values()]
        if not left:
            return ()
        names = ", ".join(map(repr, left[:10])) + (f" and {len(left) - 10} more" if len(left) > 10 else "")
        return (f"Batch normalization that is not folded, since no layer alone feeds it: {names}.",)

    def find_norms(self) -> dict[str, str]:
        """Pair each layer with the batch normalization that alone uses its output."""
        norms = {}
        for norm, given in self.norm_calls.items():
            for module, calls in self.calls.items():
                if len(given) == 1 and len(calls) == 1 and given[0] is calls[0].made and self.foldable(module, norm):
                    norms[self.paths[module]] = self.paths[norm]
        return norms

    def foldable(self, module: nn.Module, norm: nn.Module) -> bool:
        call = self.calls[module][0]
        kind = kind_of(module)
        own_forward = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        channels_on_axis_1 = kind is not None and call.made.dim() == (kind.input_dims or 2)
        return (
            module not in self.refused
            and module not in self.ignores_bias
            and module not in self.used_elsewhere
            and self.uses[id(call.made)] == 1
            and own_forward
            and channels_on_axis_1
            and call.made.dim() == call.given.dim()
            and getattr(norm, "running_mean", None) is not None
        )


def _by_definition(model: nn.Module, input_shape: str, error: Exception) -> ModelLayers:
    """List a model that does not run on its shapes: in the order of its definition, without structure."""
    layers, paths = [], {}
    for path, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            info = _info(path, module, kind)
            layers.append(info)
            paths[info.name] = path
    first_line = str(error).strip().split("\n")[0][:200]
    note = (
        f"The model does not run on input_shape {input_shape!r} ({type(error).__name__}: {first_line}): layers are "
        "listed in the order of their definition, functional calls are not listed, and batch normalization is not "
        "folded."
    )
    embeds = any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in model.modules())
    if embeds and "int" not in input_shape:
        note += " Inputs are float unless they say otherwise: token numbers are declared as 'ids:1,128:int64'."
    return ModelLayers(tuple(layers), notes=(note,), structure=Structure(paths, {}, None))


def _info(path: str, module: nn.Module, kind: LayerKind, reason: str = "") -> LayerInfo:
    name = layer_name(path, kind.label)
    if reason:
        return LayerInfo(name, kind.op_type, (), reason)
    weight: Any = module._parameters.get("weight")
    row = int(weight.shape[1]) if kind.function == "linear" and weight is not None else 0
    return LayerInfo(name, kind.op_type, weight_only=True, row=row)


def _rectifies(name: str, args: Any, kwargs: Any) -> tuple[float, float] | None:
    """Return the ends of a rectifier, from 0 upwards, or ``None`` if a call is none."""
    if name not in _RECTIFIERS:
        return None
    known = ("input", *_RECTIFIERS[name])
    given: dict[str, Any] = {**dict(zip(known, args, strict=False)), **kwargs}
    if len(known) == 1:
        return 0.0, 6.0 if name == "relu6" else inf
    low, high = given.get(known[1]), given.get(known[2]) if len(known) > 2 else None
    if not isinstance(low, int | float) or low != 0 or not isinstance(high, int | float | None):
        return None
    return 0.0, inf if high is None else float(high)


def _pads_zero(args: Any, kwargs: Any) -> bool:
    """Say whether a call of ``pad`` fills with zeros or repeats the data, which both commute with quantization."""
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
    value = args[3] if len(args) > 3 else kwargs.get("value")
    return mode != "constant" or not value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries (dataclasses are opaque)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tensors in plain tuples, lists and dictionaries; anything else is returned as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    return value
