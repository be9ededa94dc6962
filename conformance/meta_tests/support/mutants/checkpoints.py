"""Wrong checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dopt_numpy.network import Network
from dopt_numpy.quantized_layer import QuantizedLayer, QuantizedNetwork
from dopt_numpy.quantizer import LayerQuantizer

from dopt_api.quantizer import Statistics
from mutants.mutant import mutant, replace

HERE = "behaviour/test_checkpoint.py::"

state_of = LayerQuantizer.state


@mutant(HERE + "test_the_float_model_s_keys_and_values_stay")
def keys_of_the_float_model_are_renamed(patch: pytest.MonkeyPatch) -> None:
    """``conv.weight`` becomes ``conv.layer.weight``."""
    state, load = QuantizedLayer.own_state, QuantizedLayer.load_own_state
    mine = ("weight", "bias")

    def renamed(self: QuantizedLayer) -> Any:
        return {f"layer.{name}" if name in mine else name: array for name, array in state(self).items()}

    patch.setattr(QuantizedLayer, "own_state", renamed)
    patch.setattr(
        QuantizedLayer,
        "load_own_state",
        lambda self, given: load(self, {name.removeprefix("layer."): array for name, array in given.items()}),
    )


@mutant(HERE + "test_a_float_checkpoint_loads_into_a_calibrated_model")
def a_float_checkpoint_ends_calibration(patch: pytest.MonkeyPatch) -> None:
    """Loading float weights forgets the scales."""
    load = QuantizedNetwork.load_state

    def run(self: QuantizedNetwork, state: Any) -> None:
        load(self, state)
        if not any(".dopt_quantizer." in name for name in state):
            for layer in self.quantized_layers.values():
                layer.quantizer.ready[...] = 0
                layer.quantizer.statistics = Statistics()

    patch.setattr(QuantizedNetwork, "load_state", run)


@mutant(HERE + "test_a_checkpoint_brings_everything_to_another_model")
def checkpoints_lose_the_scales(patch: pytest.MonkeyPatch) -> None:
    """The scale of an input is saved as 1."""
    patch.setattr(LayerQuantizer, "state", lambda self: {**state_of(self), "input_scale": np.ones((), np.float32)})


@mutant(HERE + "test_a_calibration_that_was_never_switched_off_exports_the_same")
def checkpoints_lose_the_statistics(patch: pytest.MonkeyPatch) -> None:
    """Statistics are saved empty."""
    empty = {f"statistics.{name}": array for name, array in Statistics().arrays().items()}
    patch.setattr(LayerQuantizer, "state", lambda self: {**state_of(self), **empty})


@mutant(HERE + "test_what_was_never_calibrated_is_not_exported")
def what_was_never_calibrated_is_exported(patch: pytest.MonkeyPatch) -> None:
    """With a scale of 1."""
    patch.setattr(LayerQuantizer, "is_ready", lambda self: True)


@mutant(HERE + "test_a_checkpoint_of_the_float_model_is_not_exported_as_quantized")
def a_float_checkpoint_is_exported_as_quantized(patch: pytest.MonkeyPatch) -> None:
    """With a scale of 1."""
    patch.setattr(LayerQuantizer, "is_ready", lambda self: True)
    replace(patch, "load_into", lambda model, state, _path: model.load_state(state))


@mutant(HERE + "test_a_missing_checkpoint_is_named")
def a_missing_checkpoint_is_an_empty_one(patch: pytest.MonkeyPatch) -> None:
    """The weights that the model was built with are exported."""
    patch.setattr(LayerQuantizer, "is_ready", lambda self: True)
    replace(patch, "load_checkpoint", lambda path: _load(path) if Path(path).exists() else {})
    replace(patch, "load_into", lambda model, state, _path: Network.load_state(model, {**model.state(), **state}))


@mutant(HERE + "test_a_damaged_checkpoint_is_refused")
def the_framework_s_own_errors_get_out(patch: pytest.MonkeyPatch) -> None:
    """A damaged file gives an error of a zip library."""
    replace(patch, "load_checkpoint", _load)


def _load(path: Any) -> Any:
    with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as content:
        return dict(content)
