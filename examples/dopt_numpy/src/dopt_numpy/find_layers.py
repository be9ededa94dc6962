"""What is in a network: its layers in execution order, what cannot be quantized and why, and what can be folded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dopt_api.config import parse_input_shape
from dopt_api.errors import ConfigError, ModelError
from dopt_api.types import InputSpec, LayerInfo, ModelLayers
from dopt_numpy.layer_kinds import CONTAINERS, PLAIN, is_quantizable, layer_name, why_not
from dopt_numpy.network import BatchNorm, Chain, Layer, Network
from dopt_numpy.quantized_layer import QuantizedNetwork

__all__ = ["Structure", "find_layers", "refuse_quantized"]


@dataclass(frozen=True)
class Structure:
    """What looking at a network has shown.

    Attributes:
        paths: Path of every layer that can be quantized, by layer name.
        norms: Path of the batch normalization to fold into a layer, by the layer's path.
        output_shape: Shape of the network's result for its deployed input.
    """

    paths: dict[str, str]
    norms: dict[str, str]
    output_shape: tuple[int, ...]


def find_layers(model: Network, input_shape: str | None) -> ModelLayers:
    """List what is in a network, and run it once on zeros of its deployed shape.

    Args:
        model: The float network, unchanged.
        input_shape: The contract's text, such as ``"x:1,1,8,8"``.

    Raises:
        ModelError: The network is quantized already, computes in a way of its own, or does not run on its shape.
        ConfigError: The shape is missing or cannot be understood, or is not that of one float input.
    """
    refuse_quantized(model)
    if type(model).forward is not Chain.forward:
        raise ModelError(
            f"{type(model).__name__} has a 'forward' of its own, into which this backend cannot look",
            expected="a Network whose layers run one after the other",
            fix="Build it from Chain and Residual.",
        )
    shape = _output_shape(model, one_input(input_shape))
    survey = _Survey()
    survey.look(model, "")
    layers, refused, paths = [], [], {}
    for path, layer in model.named_layers():
        name, reason = layer_name(path, layer), survey.refused.get(id(layer))
        if reason is not None:
            refused.append(LayerInfo(name, type(layer).__name__, (), reason))
        elif is_quantizable(layer):
            layers.append(LayerInfo(name, type(layer).__name__, weight_only=True))
            paths[name] = path
    norms = dict(survey.pairs())
    return ModelLayers(
        layers=tuple(layers),
        not_quantizable=tuple(refused),
        notes=_notes(model, norms),
        structure=Structure(paths, norms, shape),
    )


def refuse_quantized(model: Network) -> None:
    """Refuse what :func:`dopt_numpy.optimize.optimize` returned.

    Raises:
        ModelError: The network is quantized already.
    """
    if isinstance(model, QuantizedNetwork):
        raise ModelError("The model is already quantized", expected="the float model", fix="Build the model anew.")


def one_input(text: str | None) -> InputSpec:
    """Return the one input of a network.

    Raises:
        ConfigError: The shape is missing or cannot be understood, or is not that of one float input.
    """
    if text is None:
        raise ConfigError("The shape of the input is missing", expected="text such as 'x:1,1,8,8', batch size first")
    inputs = parse_input_shape(text)
    if len(inputs) != 1 or inputs[0].dtype != "float32":
        raise ConfigError(
            f"The input shape {text!r} does not fit a network of this framework",
            where="input_shape",
            expected="one float32 input, such as 'x:1,1,8,8'",
        )
    return inputs[0]


def _output_shape(model: Network, spec: InputSpec) -> tuple[int, ...]:
    try:
        with np.errstate(all="ignore"):
            return model(np.zeros(spec.shape, np.float32)).shape
    except Exception as error:  # whatever the arithmetic or a user's layer raises
        raise ModelError(
            f"The model does not run on its input shape: {type(error).__name__}: {error}",
            where=f"input_shape {spec.name}:{','.join(map(str, spec.shape))}",
            expected="the shape of the deployed input, batch size first, channels second",
        ) from error


@dataclass
class _Survey:
    """One walk through a network that counts how often each layer is called.

    Attributes:
        refused: Why a layer cannot be quantized, by its identity.
        places: The paths at which a layer is called.
        followed: The path of a layer and of the batch normalization that comes next, with both.
    """

    refused: dict[int, str] = field(default_factory=dict)
    places: dict[int, list[str]] = field(default_factory=dict)
    followed: list[tuple[str, Layer, str, Layer]] = field(default_factory=list)

    def look(self, chain: Chain, path: str) -> None:
        """Take in a chain whose layers are called in order."""
        inside = [(f"{path}.{name}" if path else name, layer) for name, layer in chain.layers.items()]
        for place, layer in inside:
            self.places.setdefault(id(layer), []).append(place)
            if isinstance(layer, Chain) and type(layer) in CONTAINERS:
                self.look(layer, place)
            elif not is_quantizable(layer) and type(layer) not in PLAIN:
                self.refused[id(layer)] = why_not(layer)
                for inner in _inside(layer):
                    self.refused[id(inner)] = f"it is called by {place!r}, into which this backend cannot look"
        for (place, layer), (norm_place, norm) in pairwise(inside):
            if is_quantizable(layer) and type(norm) is BatchNorm:
                self.followed.append((place, layer, norm_place, norm))

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield the layers that can take in a batch normalization, with it: both are called there alone."""
        for path, layer, norm_path, norm in self.followed:
            alone = len(self.places[id(layer)]) == len(self.places[id(norm)]) == 1
            if alone and id(layer) not in self.refused and id(norm) not in self.refused:
                yield path, norm_path


def _inside(layer: Layer) -> Iterator[Layer]:
    for child in layer.children().values():
        yield child
        yield from _inside(child)


def _notes(model: Network, norms: dict[str, str]) -> tuple[str, ...]:
    folded = set(norms.values())
    left = [path for path, layer in model.named_layers() if isinstance(layer, BatchNorm) and path not in folded]
    if not left:
        return ()
    return (f"Batch normalization that is not folded, since no layer alone feeds it: {', '.join(map(repr, left))}.",)
