"""The way from a float model to its deployed files, as a user goes it; every step is kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import dopt_api
from dopt_api.params import LayerParams, QuantParams, read_params
from dopt_api.quantizer import DEFAULT_RANGE
from dopt_api.strategy import get_strategy
from dopt_api.types import ExportResult, LayerPlan
from dopt_conformance.harness import Batch, Float32, Harness, WrittenGraph

__all__ = ["BATCH", "Deployed", "Way", "sqnr"]

BATCH = 4
"""How many samples a batch has, unless a test says otherwise; what is exported runs on as many."""

HEADER = "quant_strategy_for op '{}'"
"""The key of a strategy file that lists the strategies of a kind of layer."""


def sqnr(wanted: Sequence[Float32], found: Sequence[Float32]) -> float:
    """Return the ratio of signal to error over all outputs, in dB.

    Example:
        >>> round(sqnr([np.float32([10.0, 0.0])], [np.float32([10.0, 1.0])]))
        20
    """
    signal = sum(float(np.square(one.astype(np.float64)).sum()) for one in wanted)
    pairs = zip(wanted, found, strict=True)
    error = sum(float(np.square(one.astype(np.float64) - other).sum()) for one, other in pairs)
    return float("inf") if error == 0 else 10 * float(np.log10(signal / error))


@dataclass(frozen=True)
class Deployed:
    """A model that went the whole way.

    Attributes:
        harness: The harness.
        name: The model's name.
        config: The strategy file, every layer quantized.
        batches: The calibration batches.
        exact: The float model's outputs for the first of them.
        simulated: The quantized model's outputs for it.
        checkpoint: The quantized model's checkpoint.
        files: What was exported.
    """

    harness: Harness
    name: str
    config: Path
    batches: tuple[Batch, ...]
    exact: list[Float32]
    simulated: list[Float32]
    checkpoint: Path
    files: ExportResult

    @cached_property
    def params(self) -> QuantParams:
        """The parameter file."""
        return read_params(self.files.params)

    @cached_property
    def layers(self) -> dict[str, LayerParams]:
        """Its layers by name."""
        return {layer.name: layer for layer in self.params.layers}

    @cached_property
    def graph(self) -> WrittenGraph:
        """What stands in the exported graph."""
        return self.harness.read_file(self.files.model)

    def outputs(self) -> list[Float32]:
        """Return what the exported graph computes from the first batch."""
        return self.harness.run_file(self.files.model, self.batches[0], self.harness.output_names(self.name))


class Way:
    """The steps of the way, each with the usual choices."""

    def __init__(self, harness: Harness, folder: Path) -> None:
        """Go with the models of ``harness``; write into ``folder``."""
        self.harness, self.folder = harness, folder
        self._folders = 0

    def new_folder(self) -> Path:
        """Return a folder that is new and empty."""
        self._folders += 1
        folder = self.folder / f"step{self._folders}"
        folder.mkdir()
        return folder

    def batches(self, name: str, count: int = 3, size: int = BATCH) -> tuple[Batch, ...]:
        """Return batches of calibration data, all different."""
        return tuple(self.harness.batch(name, size, seed) for seed in range(count))

    def float_config(self, name: str) -> Path:
        """Write the strategy file of a model as it is generated, every layer ``float``."""
        shape = self.harness.input_shape(name)
        file = self.new_folder() / "config.json"
        return dopt_api.generate_config(self.harness.build(name), shape, file, backend=self.harness.backend)

    def config(
        self, name: str, only: Collection[str] | None = None, *, strategy: str | None = None, **extra: str
    ) -> Path:
        """Write a strategy file with layers (all, or those named) set to a strategy.

        Args:
            name: The model.
            only: The layers to quantize.
            strategy: The strategy of each of them; by default the first that its kind of layer lists.
            extra: More keys for each of them, such as ``range``.
        """

        def choose(content: dict[str, Any]) -> None:
            for layer, entry in content["layer_strategy"].items():
                if only is None or layer in only:
                    entry["quant_strategy"] = strategy or content[HEADER.format(entry["op_type"])][0]
                    entry.update(extra)

        return self.edit(self.float_config(name), choose)

    def plans(self, name: str, method: str = DEFAULT_RANGE, *, strategy: str | None = None) -> dict[str, LayerPlan]:
        """Return what :meth:`config` says of each layer, as the core reads it."""
        content = json.loads(self.config(name, strategy=strategy).read_text(encoding="utf-8"))
        return {
            layer: LayerPlan(layer, entry["op_type"], get_strategy(entry["quant_strategy"]), method)
            for layer, entry in content["layer_strategy"].items()
        }

    def read(self, file: Path) -> Any:
        """Return the content of a strategy file."""
        return json.loads(file.read_text(encoding="utf-8"))

    def edit(self, file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
        """Change the content of a strategy file in place."""
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        file.write_text(json.dumps(content, indent=4), encoding="utf-8")
        return file

    def quantized(self, name: str, config: Path) -> Any:
        """Return a new quantized model."""
        return self.harness.optimize(self.harness.build(name), config)

    def switch(self, model: Any, on: bool) -> None:
        """Switch calibration on or off."""
        dopt_api.set_calibrate_state(model, on, backend=self.harness.backend)

    def calibrate(self, model: Any, batches: Iterable[Batch]) -> Any:
        """Calibrate a quantized model on batches; return it."""
        self.switch(model, True)
        for batch in batches:
            self.harness.run(model, batch)
        self.switch(model, False)
        return model

    def calibrated(self, name: str, config: Path, batches: Iterable[Batch] | None = None) -> Any:
        """Return a new quantized model, calibrated."""
        return self.calibrate(self.quantized(name, config), self.batches(name) if batches is None else batches)

    def save(self, model: Any) -> Path:
        """Save a checkpoint in a folder of its own."""
        return self.harness.save(model, self.new_folder())

    def export(
        self, name: str, config: Path, checkpoint: Path, folder: Path | None = None, **options: Any
    ) -> ExportResult:
        """Export a checkpoint from a new float model."""
        given: dict[str, Any] = {"output_names": self.harness.output_names(name), **options}
        folder = self.new_folder() if folder is None else folder
        model = self.harness.build(name)
        return dopt_api.export(model, config, checkpoint, folder, backend=self.harness.backend, **given)

    def params_of(self, name: str, config: Path, model: Any) -> str:
        """Return the text of the parameter file that a quantized model gives."""
        return self.export(name, config, self.save(model)).params.read_text(encoding="utf-8")

    def deploy(self, name: str, strategy: str | None = None) -> Deployed:
        """Go the whole way with all layers of a model, by one strategy."""
        config, batches = self.config(name, strategy=strategy), self.batches(name)
        exact = self.harness.run(self.harness.build(name), batches[0])
        model = self.calibrated(name, config, batches)
        simulated = self.harness.run(model, batches[0])
        checkpoint = self.save(model)
        files = self.export(name, config, checkpoint)
        return Deployed(self.harness, name, config, batches, exact, simulated, checkpoint, files)
