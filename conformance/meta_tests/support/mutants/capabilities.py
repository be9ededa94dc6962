"""Claims that are not fulfilled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dopt_numpy.onnx_graph import GraphWriter
from dopt_numpy.quant_loss import QuantLoss
from dopt_numpy.quantized_layer import QuantizedLayer
from dopt_numpy.quantizer import LayerQuantizer

from dopt_api.params import quantize_layer
from mutants.mutant import mutant, replace

HERE = "behaviour/test_capabilities.py::"


@mutant(HERE + "test_training_descends_and_moves_weights_and_scales")
def gains_are_not_trained(patch: pytest.MonkeyPatch) -> None:
    """Scales stay as calibrated, since an optimizer does not see their gains."""
    patch.setattr(QuantizedLayer, "own_parameters", lambda self: self.layer.own_parameters())


@mutant(HERE + "test_learned_scales_are_exported")
def learned_scales_of_weights_are_not_exported(patch: pytest.MonkeyPatch) -> None:
    """The file has the scales from before training."""

    def run(layer: Any, plan: Any, scale: Any, zero_point: Any, gain: Any) -> Any:
        return quantize_layer(layer, plan, scale, zero_point, np.zeros_like(gain))

    replace(patch, "quantize_layer", run)


@mutant(HERE + "test_training_descends_and_moves_weights_and_scales")
def gradients_do_not_reach_weights(patch: pytest.MonkeyPatch) -> None:
    """The rounding of weights stops gradients."""
    quantize_weight = LayerQuantizer.quantize_weight

    def run(*arguments: Any) -> Any:
        quantized, _ = quantize_weight(*arguments)
        return quantized, np.zeros_like

    patch.setattr(LayerQuantizer, "quantize_weight", run)


@mutant(HERE + "test_inference_moves_nothing")
def scales_decay_in_inference(patch: pytest.MonkeyPatch) -> None:
    """Each pass of inference changes a gain a little."""
    quantize_input = LayerQuantizer.quantize_input

    def run(self: LayerQuantizer, x: Any, training: bool) -> Any:
        if not training:
            self.input_gain.value[...] += np.float32(1e-3)
        return quantize_input(self, x, training)

    patch.setattr(LayerQuantizer, "quantize_input", run)


@mutant(HERE + "test_without_calibration_scales_start_from_the_first_batch_of_training")
def every_batch_of_training_decides_anew(patch: pytest.MonkeyPatch) -> None:
    """Scales follow the range of the present batch."""
    prepare = LayerQuantizer.prepare

    def run(self: LayerQuantizer, x: Any, training: bool) -> bool:
        if training:
            self.ready[...] = 0
            self.statistics = type(self.statistics)()
        return prepare(self, x, training)

    patch.setattr(LayerQuantizer, "prepare", run)


def losing(patch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the value of the quantization loss by a function of it and of the number of layers."""
    make = QuantLoss.__init__

    def run(self: QuantLoss, network: Any) -> None:
        make(self, network)
        self.value = change(self.value, len(self._layers))

    patch.setattr(QuantLoss, "__init__", run)


@mutant(HERE + "test_the_quantization_loss_is_positive_and_small")
def the_quantization_loss_is_negative(patch: pytest.MonkeyPatch) -> None:
    """It has the wrong sign."""
    losing(patch, lambda value, _count: -value)


@mutant(HERE + "test_the_quantization_loss_is_positive_and_small")
def the_quantization_loss_is_zero(patch: pytest.MonkeyPatch) -> None:
    """It says nothing."""
    losing(patch, lambda _value, _count: 0.0)


@mutant(HERE + "test_the_quantization_loss_is_the_mean_over_layers")
def the_quantization_loss_is_a_sum(patch: pytest.MonkeyPatch) -> None:
    """It grows with the number of layers."""
    losing(patch, lambda value, count: value * count)


@mutant(HERE + "test_the_quantization_loss_of_a_float_model_is_zero")
def the_quantization_loss_of_a_float_model_is_one(patch: pytest.MonkeyPatch) -> None:
    """Where no layer is quantized it is not 0."""
    losing(patch, lambda value, count: value if count else 1.0)


@mutant(HERE + "test_descending_the_quantization_loss_moves_scales")
def the_quantization_loss_has_no_gradient(patch: pytest.MonkeyPatch) -> None:
    """It is a number and nothing to train with."""
    patch.setattr(QuantLoss, "backward", lambda self, weight=1.0: None)


@mutant(HERE + "test_a_graph_with_an_open_batch_size_takes_any")
def the_batch_size_stays_fixed(patch: pytest.MonkeyPatch) -> None:
    """``dynamic_batch`` is ignored."""
    write = GraphWriter.write
    patch.setattr(GraphWriter, "write", lambda self, spec, name, shape, _open: write(self, spec, name, shape, False))
