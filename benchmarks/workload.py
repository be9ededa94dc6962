"""What the benchmarks run: the network, its input, and how it is quantized."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dopt.dopt_torch.opt_main import generate_config_file
from examples.efficientnet_lite.data import INPUT_SHAPE, build_model, calibration_set
from examples.efficientnet_lite.demo import choose_strategy

__all__ = ["THREADS", "Workload", "load"]

THREADS = 2
"""Threads for torch in every measurement."""


@dataclass(frozen=True)
class Workload:
    """A network and its data.

    Attributes:
        name: For the report.
        build: Returns the float network, in evaluation mode.
        input_shape: As the strategy file has it.
        batches: Batches of the same size, float32 ``[N, 3, H, W]``.
        classes: Number of logits.
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: str
    batches: tuple[Tensor, ...]
    classes: int

    def strategy_file(self, model: nn.Module) -> Path:
        """Write the strategy file of ``model``, all layers quantized, into a new folder and return its path."""
        path = Path(tempfile.mkdtemp(prefix="dopt-benchmark-")) / "config.json"
        generate_config_file(model, self.input_shape, path)
        choose_strategy(path, "Quant_INT8-8", "min_max")
        return path


def load(*, smoke: bool) -> Workload:
    """Return EfficientNet-Lite0 with 128 photographs in batches of 32, or a small random network with 8 in two.

    Raises:
        MissingDataError: The packages with the network or the photographs are not installed (not for the small one).
    """
    if smoke:
        pictures = torch.randn(8, 3, 112, 112, generator=torch.Generator().manual_seed(0))
        return Workload("small random network", _small_network, "x:1,3,112,112", torch.split(pictures, 4), 10)
    return Workload("EfficientNet-Lite0", build_model, INPUT_SHAPE, torch.split(calibration_set(128), 32), 1000)


def _small_network() -> nn.Module:
    layers: list[nn.Module] = []
    for given, made in ((3, 32), (32, 32)):
        layers += [nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
