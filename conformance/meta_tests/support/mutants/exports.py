"""Wrong files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as but
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dopt_numpy import export, find_layers, onnx_graph
from dopt_numpy.network import ReLU
from dopt_numpy.onnx_graph import GraphWriter
from dopt_numpy.optimize import optimize

from dopt_api.files import staged
from dopt_api.params import fold, layer_params, quantize_layer
from mutants.mutant import mutant, replace

HERE = "behaviour/test_export.py::"


def quantizing(patch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any]) -> None:
    """Change a layer as it is exported, by a function of the quantized layer and the float one."""

    def run(layer: Any, *rest: Any) -> Any:
        return change(quantize_layer(layer, *rest), layer)

    replace(patch, "quantize_layer", run)


def entering(patch: pytest.MonkeyPatch, **changes: Callable[[Any], Any]) -> None:
    """Change arguments of what enters a layer into the parameter file."""

    def run(layer: Any, **given: Any) -> Any:
        return layer_params(
            layer, **{name: changes.get(name, lambda value: value)(value) for name, value in given.items()}
        )

    replace(patch, "layer_params", run)


@mutant(HERE + "test_what_it_names_stands_in_the_graph")
def weights_have_another_name_in_the_file(patch: pytest.MonkeyPatch) -> None:
    """The parameter file speaks of a tensor that the graph does not have."""
    entering(patch, weight_tensor="{}_quantized".format)


@mutant(HERE + "test_what_it_names_stands_in_the_graph")
def nodes_have_another_name_in_the_file(patch: pytest.MonkeyPatch) -> None:
    """The parameter file speaks of a node that the graph does not have."""
    entering(patch, calls=lambda calls: [(f"model/{node}", edge) for node, edge in calls])


@mutant(HERE + "test_its_layers_are_those_of_the_strategy_file_each_once")
def layers_have_another_name_in_the_file(patch: pytest.MonkeyPatch) -> None:
    """The parameter file calls a layer otherwise than the strategy file does."""

    def run(layer: Any, **given: Any) -> Any:
        entry = layer_params(layer, **given)
        return but(entry, name=entry.name.partition("/")[0])

    replace(patch, "layer_params", run)


@mutant(HERE + "test_weights_are_on_their_grid")
def weights_are_written_as_they_were_trained(patch: pytest.MonkeyPatch) -> None:
    """The graph has float weights that are not rounded."""
    quantizing(patch, lambda found, layer: but(found, weight=fold(layer)[0]))


@mutant(HERE + "test_weights_are_on_their_grid")
def the_axis_of_the_channels_is_wrong(patch: pytest.MonkeyPatch) -> None:
    """The parameter file says that the channels are on axis 1."""
    entering(patch, weight_axis=lambda _axis: 1)


@mutant(HERE + "test_batch_normalization_is_folded")
def batch_normalization_is_not_folded(patch: pytest.MonkeyPatch) -> None:
    """It stays an operation of the graph."""
    patch.setattr(find_layers._Survey, "pairs", lambda _self: iter(()))


@mutant(HERE + "test_the_graph_by_itself_agrees_with_the_model")
def the_graph_lacks_its_rectifiers(patch: pytest.MonkeyPatch) -> None:
    """An operation is written as another."""
    patch.setitem(onnx_graph._WRITERS, ReLU, onnx_graph._simple("Identity"))


@mutant(HERE + "test_equal_models_give_equal_bytes")
def files_have_a_serial_number(patch: pytest.MonkeyPatch) -> None:
    """Something in the file differs from export to export, as a date would."""
    write, serial = GraphWriter.write, count()

    def run(*arguments: Any) -> Any:
        model = write(*arguments)
        model.doc_string = str(next(serial))
        return model

    patch.setattr(GraphWriter, "write", run)


@mutant(HERE + "test_only_the_two_files_are_written")
def something_is_left_behind(patch: pytest.MonkeyPatch) -> None:
    """A temporary file stays."""

    @contextmanager
    def leaving(folder: Path) -> Iterator[Path]:
        with staged(folder) as aside:
            (aside / "model.tmp").touch()
            yield aside

    replace(patch, "staged", leaving)


@mutant(HERE + "test_a_missing_folder_is_named_and_not_made")
def a_missing_folder_is_made(patch: pytest.MonkeyPatch) -> None:
    """A misspelt path is a new folder."""

    @contextmanager
    def making(folder: Path) -> Iterator[Path]:
        Path(folder).mkdir(exist_ok=True)
        with staged(folder) as aside:
            yield aside

    replace(patch, "staged", making)


@mutant("behaviour/test_checkpoint.py::test_a_damaged_checkpoint_is_refused")
def files_are_begun_before_all_is_known(patch: pytest.MonkeyPatch) -> None:
    """An error leaves half an export."""

    @contextmanager
    def at_once(folder: Path) -> Iterator[Path]:
        (Path(folder) / "model.onnx").touch()
        yield Path(folder)

    patch.setattr(export, "staged", at_once)


@mutant(HERE + "test_wrong_output_names_are_refused")
def superfluous_output_names_are_accepted(patch: pytest.MonkeyPatch) -> None:
    """Only the first of the names is looked at."""
    patch.setattr(export, "_output_name", lambda names: names[0] if names else "output")


@mutant(HERE + "test_the_float_model_stays_as_it_is")
def exporting_changes_the_model(patch: pytest.MonkeyPatch) -> None:
    """The model that was given is rounded."""

    def run(model: Any, plan: Any) -> Any:
        for parameter in model.parameters():
            parameter.value[...] = parameter.value.astype(np.float16)
        return optimize(model, plan)

    patch.setattr(export, "optimize", run)
