"""Strategies of float inputs that are not."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import numpy as np
import pytest
from dopt_numpy.quantizer import LayerQuantizer

from dopt_api.params import quantize_layer
from mutants.mutant import mutant, replace

HERE = "behaviour/test_weight_only.py::"


@mutant(HERE + "test_weights_alone_are_quantized_and_without_calibration")
def weights_stay_float_beside_float_inputs(patch: pytest.MonkeyPatch) -> None:
    """A layer whose input is float is taken for a float layer."""
    quantize_weight = LayerQuantizer.quantize_weight

    def run(self: LayerQuantizer, weight: Any, factor: Any) -> Any:
        return (weight, np.copy) if self.weight_only else quantize_weight(self, weight, factor)

    patch.setattr(LayerQuantizer, "quantize_weight", run)


@mutant(HERE + "test_calibration_changes_nothing")
def calibration_widens_scales_of_weights(patch: pytest.MonkeyPatch) -> None:
    """Calibration begins with other scales of weights."""
    start_calibration = LayerQuantizer.start_calibration

    def run(self: LayerQuantizer) -> None:
        start_calibration(self)
        self.weight_gain.value[...] = 0.25

    patch.setattr(LayerQuantizer, "start_calibration", run)


@mutant(HERE + "test_float_and_integer_inputs_stand_in_one_model")
def all_layers_are_exported_as_the_first(patch: pytest.MonkeyPatch) -> None:
    """The strategy of the first layer is written for every layer."""
    first: list[Any] = []

    def run(layer: Any, plan: Any, *others: Any) -> Any:
        first.append(plan.strategy)
        return quantize_layer(layer, changed(plan, strategy=first[0]), *others)

    replace(patch, "quantize_layer", run)
