"""Wrong calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dopt_numpy import find_layers, optimize
from dopt_numpy.quantized_layer import QuantizedLayer, QuantizedNetwork
from dopt_numpy.quantizer import LayerQuantizer

from dopt_api.errors import CalibrationError
from dopt_api.quantizer import activation_parameters
from mutants.mutant import mutant, replace

HERE = "behaviour/test_calibration.py::"

switch = optimize.set_calibrate_state


@mutant(HERE + "test_while_it_is_on_the_model_is_float_to_the_bit")
def calibration_is_quantized(patch: pytest.MonkeyPatch) -> None:
    """While calibration is on, weights are quantized already."""
    forward = QuantizedLayer.forward

    def run(self: QuantizedLayer, x: Any, training: bool = False) -> Any:
        if not self.quantizer.calibrating:
            return forward(self, x, training)
        self.quantizer.statistics.update(x)
        return self.layer.forward_with(x, self.quantizer.quantize_weight(self.layer.weight.value, None)[0])

    patch.setattr(QuantizedLayer, "forward", run)


@mutant(HERE + "test_afterwards_the_model_is_quantized")
def the_model_stays_float(patch: pytest.MonkeyPatch) -> None:
    """Calibration is never concluded, so that no layer is quantized."""
    patch.setattr(LayerQuantizer, "prepare", lambda *_: False)


@mutant(HERE + "test_after_it_is_off_nothing_is_collected")
def collecting_goes_on(patch: pytest.MonkeyPatch) -> None:
    """Inference after calibration moves the ranges."""

    def prepare(self: LayerQuantizer, x: Any, _training: bool) -> bool:
        if not self.is_ready():
            return False
        self.statistics.update(x)
        self.conclude()
        return True

    patch.setattr(LayerQuantizer, "prepare", prepare)


@mutant(HERE + "test_every_batch_counts")
def only_the_last_batch_counts(patch: pytest.MonkeyPatch) -> None:
    """The range is that of the last batch."""
    forward = QuantizedLayer.forward

    def run(self: QuantizedLayer, x: Any, training: bool = False) -> Any:
        if self.quantizer.calibrating:
            self.quantizer.start_calibration()
        return forward(self, x, training)

    patch.setattr(QuantizedLayer, "forward", run)


@mutant(HERE + "test_order_of_batches_does_not_matter")
def the_range_is_a_running_mean(patch: pytest.MonkeyPatch) -> None:
    """The extremes are exponential averages over batches."""
    update = LayerQuantizer.start_calibration

    def start(self: LayerQuantizer) -> None:
        update(self)
        statistics = self.statistics
        take_in = statistics.update

        def averaged(x: Any) -> None:
            low, high, first = statistics.minimum, statistics.maximum, not int(statistics.samples)
            take_in(x)
            if not first:
                statistics.minimum = np.asarray(low + 0.1 * (x.min() - low), np.float32)
                statistics.maximum = np.asarray(high + 0.1 * (x.max() - high), np.float32)

        self.statistics = type("Averaged", (type(statistics),), {"update": lambda _, x: averaged(x)})()
        self.statistics.__dict__ = statistics.__dict__

    patch.setattr(LayerQuantizer, "start_calibration", start)


@mutant(HERE + "test_ranges_are_those_of_the_core_to_the_bit")
def the_range_method_is_ignored(patch: pytest.MonkeyPatch) -> None:
    """Every layer has the default method."""

    def run(statistics: Any, grid: Any, *, layer: str, method: str) -> Any:
        return activation_parameters(statistics, grid, layer=layer)

    replace(patch, "activation_parameters", run)


@mutant(HERE + "test_ranges_are_those_of_the_core_to_the_bit")
def the_zero_point_of_the_range_is_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Zero points are one too great."""

    def run(*arguments: Any, **options: Any) -> Any:
        scale, zero_point = activation_parameters(*arguments, **options)
        return scale, min(int(zero_point) + 1, 255)

    replace(patch, "activation_parameters", run)


@mutant(HERE + "test_a_range_contains_zero")
def the_range_need_not_contain_zero(patch: pytest.MonkeyPatch) -> None:
    """Data of one sign get a range without 0."""

    def run(statistics: Any, grid: Any, *, layer: str, method: str) -> Any:
        if method != "min_max":
            return activation_parameters(statistics, grid, layer=layer, method=method)
        statistics.check(layer)
        low, high = float(statistics.minimum), float(statistics.maximum)
        scale = np.float32((high - low) / (grid.qmax - grid.qmin) or 1.0)
        return scale, int(np.clip(np.rint(grid.qmin - low / scale), grid.qmin, grid.qmax))

    replace(patch, "activation_parameters", run)


@mutant(HERE + "test_weight_scales_and_integers_are_those_of_the_core")
def the_weight_of_the_file_has_one_scale(patch: pytest.MonkeyPatch) -> None:
    """The exported weight has the same scale in each channel, the greatest."""
    from dopt_api.params import quantize_layer

    def run(layer: Any, plan: Any, scale: Any, zero_point: Any, gain: Any) -> Any:
        base = quantize_layer(layer, plan, scale, zero_point).weight_scale
        widest = base.max() / base - 1  # the gain that makes every scale the greatest
        return quantize_layer(layer, plan, scale, zero_point, np.asarray(widest, np.float32).reshape(np.shape(gain)))

    replace(patch, "quantize_layer", run)


@mutant(HERE + "test_switching_it_on_again_starts_from_nothing")
def calibrating_again_goes_on_from_before(patch: pytest.MonkeyPatch) -> None:
    """Statistics of an earlier calibration stay."""
    start = LayerQuantizer.start_calibration

    def keep(self: LayerQuantizer) -> None:
        statistics = self.statistics
        start(self)
        self.statistics = statistics

    patch.setattr(LayerQuantizer, "start_calibration", keep)


@mutant(HERE + "test_switching_to_what_is_already_so_changes_nothing")
def switching_on_twice_forgets(patch: pytest.MonkeyPatch) -> None:
    """Switching on what is on starts anew."""

    def run(model: Any, mode: bool) -> None:
        if mode:
            for layer in model.quantized_layers.values():
                layer.quantizer.start_calibration()
        else:
            switch(model, mode)

    patch.setattr(optimize, "set_calibrate_state", run)


@mutant(HERE + "test_no_weight_changes")
def calibration_rounds_the_weights(patch: pytest.MonkeyPatch) -> None:
    """The weights themselves are put on their grid."""

    def run(model: Any, mode: bool) -> None:
        switch(model, mode)
        for layer in () if mode else model.quantized_layers.values():
            weight = layer.layer.weight.value
            weight[...] = layer.quantizer.quantize_weight(weight, None)[0]

    patch.setattr(optimize, "set_calibrate_state", run)


@mutant(HERE + "test_a_layer_that_saw_nothing_is_named")
def calibration_without_data_is_accepted(patch: pytest.MonkeyPatch) -> None:
    """A layer that saw nothing keeps its scale of 1."""
    conclude = LayerQuantizer.conclude

    def run(self: LayerQuantizer) -> None:
        if int(self.statistics.samples) + int(self.statistics.non_finite):
            conclude(self)

    patch.setattr(LayerQuantizer, "conclude", run)


@mutant(HERE + "test_nan_in_the_data_is_told_by_layer")
def errors_of_calibration_name_no_layer(patch: pytest.MonkeyPatch) -> None:
    """What is wrong is said, but not where."""

    def run(model: Any, mode: bool) -> None:
        try:
            switch(model, mode)
        except CalibrationError as error:
            raise CalibrationError("The data had NaN or infinity, or there were none") from error

    patch.setattr(optimize, "set_calibrate_state", run)


@mutant(HERE + "test_a_float_model_has_no_calibration")
def calibration_of_a_float_model_is_ignored(patch: pytest.MonkeyPatch) -> None:
    """Calibrating the wrong one of two models goes unnoticed."""
    patch.setattr(
        optimize,
        "set_calibrate_state",
        lambda model, mode: switch(model, mode) if isinstance(model, QuantizedNetwork) else None,
    )


@mutant(HERE + "test_a_quantized_model_is_not_quantized_again")
def a_quantized_model_is_returned_as_it_is(patch: pytest.MonkeyPatch) -> None:
    """A second call does nothing, and says nothing."""

    def again(model: Any, plan: Any) -> Any:
        return model if isinstance(model, QuantizedNetwork) else first_time(model, plan)

    def listed(model: Any, input_shape: str | None) -> Any:
        return model.plan.model_layers if isinstance(model, QuantizedNetwork) else find(model, input_shape)

    first_time, find = optimize.optimize, find_layers.find_layers
    patch.setattr(optimize, "optimize", again)
    patch.setattr(find_layers, "find_layers", listed)
