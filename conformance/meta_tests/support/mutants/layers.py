"""Wrong lists of layers, and layers that are not what the strategy file says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace as but
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dopt_numpy import find_layers, optimize
from dopt_numpy.quantized_layer import QuantizedLayer
from dopt_numpy.quantizer import LayerQuantizer

from dopt_api.types import LayerInfo
from mutants.mutant import mutant

FILE = "behaviour/test_strategy_file.py::"
FLOAT = "behaviour/test_float_path.py::"

find = find_layers.find_layers


def finding(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Change what the backend finds in a model."""
    patch.setattr(find_layers, "find_layers", lambda model, shape: change(find(model, shape)))


@mutant(FILE + "test_every_layer_is_listed_once_in_the_order_it_runs")
def the_last_layer_is_not_listed(patch: pytest.MonkeyPatch) -> None:
    """The strategy file has one layer less."""
    finding(patch, lambda found: but(found, layers=found.layers[:-1]))


@mutant(FILE + "test_every_layer_is_listed_once_in_the_order_it_runs")
def a_layer_is_listed_under_two_names(patch: pytest.MonkeyPatch) -> None:
    """The first layer stands in the file twice."""
    finding(patch, lambda found: but(found, layers=(*found.layers, but(found.layers[0], name="again"))))


@mutant(FILE + "test_every_layer_is_listed_once_in_the_order_it_runs")
def layers_are_listed_backwards(patch: pytest.MonkeyPatch) -> None:
    """The order is not that of execution."""
    finding(patch, lambda found: but(found, layers=found.layers[::-1]))


@mutant(FILE + "test_equal_models_give_equal_files")
def the_order_changes_from_call_to_call(patch: pytest.MonkeyPatch) -> None:
    """As with a set of names."""
    calls = count()
    finding(patch, lambda found: but(found, layers=found.layers[:: -1 if next(calls) % 2 else 1]))


@mutant(FILE + "test_what_cannot_be_quantized_is_not_listed")
def what_cannot_be_quantized_is_listed(patch: pytest.MonkeyPatch) -> None:
    """Operations that stay float are offered for quantization."""

    def change(found: Any) -> Any:
        more = tuple(LayerInfo(layer.name, layer.op_type) for layer in found.not_quantizable)
        return but(found, layers=found.layers + more, not_quantizable=())

    finding(patch, change)


@mutant(FILE + "test_every_kind_of_layer_has_its_strategies")
def layers_have_no_strategies(patch: pytest.MonkeyPatch) -> None:
    """Layers are listed that nothing can be chosen for."""
    finding(patch, lambda found: but(found, layers=tuple(but(layer, strategies=()) for layer in found.layers)))


@mutant(FLOAT + "test_a_file_with_all_layers_float_changes_nothing")
def the_float_path_rounds(patch: pytest.MonkeyPatch) -> None:
    """The copy has weights of half precision."""

    def deepcopy(model: Any) -> Any:
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            parameter.value[...] = parameter.value.astype(np.float16)
        return copied

    patch.setattr(optimize, "copy", SimpleNamespace(deepcopy=deepcopy))


@mutant(FLOAT + "test_the_model_that_was_given_is_not_changed_where_a_copy_is_returned")
def the_model_that_was_given_is_changed(patch: pytest.MonkeyPatch) -> None:
    """The layers are replaced in the float model."""
    patch.setattr(optimize, "copy", SimpleNamespace(deepcopy=lambda model: model))


@mutant(FLOAT + "test_only_the_chosen_layers_are_quantized")
def layers_without_a_bias_stay_float(patch: pytest.MonkeyPatch) -> None:
    """The strategy is ignored for one layer."""
    forward = QuantizedLayer.forward

    def run(self: QuantizedLayer, x: Any, training: bool = False) -> Any:
        if self.layer.bias is None and not self.quantizer.calibrating:
            return self.layer.forward(x, training)
        return forward(self, x, training)

    patch.setattr(QuantizedLayer, "forward", run)


@mutant(FLOAT + "test_the_first_layer_sees_its_input_on_the_grid")
def inputs_stay_float(patch: pytest.MonkeyPatch) -> None:
    """Only weights are quantized."""
    patch.setattr(LayerQuantizer, "quantize_input", lambda _self, x, _training: (x, lambda dy: dy))
