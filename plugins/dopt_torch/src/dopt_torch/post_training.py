"""Post-training quantization in one call: smooth where asked, calibrate, then round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dopt_api import facade
from dopt_api.errors import CalibrationError
from dopt_api.files import StrPath, staged
from dopt_api.quantizer import Statistics
from dopt_torch.optimize import root_of, set_calibrate_state
from dopt_torch.quantized_layer import quantized_layers
from dopt_torch.rounding import RoundedLayer, round_weights
from dopt_torch.running import run
from dopt_torch.smoothing import smooth

__all__ = ["calibrate", "post_training", "quantize"]


def post_training(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int = 32,
    smoothing: float | None = None,
    short_sums: bool = False,
    seconds: float | None = None,
    resume: StrPath | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[RoundedLayer]:
    """Calibrate a quantized model and round its weights for its outputs; the model is changed in place.

    All batches are looked at once, for the ranges of the activations; the first ``samples`` of them serve
    :func:`dopt_torch.rounding.round_weights` (and :func:`dopt_torch.smoothing.smooth`), and are all that is held in
    memory.

    Args:
        model: What ``optimize_model`` returned. It is calibrated anew.
        batches: Inputs as the model takes them: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
            Any iterable, such as a generator; passed over once.
        samples: How many samples the rounding looks at; whole batches are taken until they are reached. More are
            slower and, up to some hundreds, better.
        smoothing: For transformers: the strength with which outliers of activations go over to the weights before
            calibration, such as 0.75. By default there is no smoothing.
        short_sums: For processors with AVX2 and without VNNI; see :func:`~dopt_torch.rounding.round_weights`.
        seconds: The time that all of it may take; the calibration is always done, and layers for which no time is left
            are rounded to nearest.
        resume: A file that keeps what is done; see :func:`~dopt_torch.rounding.round_weights`.
        progress: Wraps the batches and then the layers to show progress, such as ``tqdm.tqdm``.

    Returns:
        What rounding did to each quantized layer, in execution order.

    Raises:
        ModelError: The model is not a quantized one.
        CalibrationError: There are no batches, or what a layer saw cannot be quantized.
        CheckpointError: The file to resume from is damaged, or is that of another call.
        OutputError: That file cannot be written.

    Example:
        One call stands between ``optimize_model`` and the export::

            quant_model = optimize_model(model, "config.json")
            report = post_training(quant_model, loader, seconds=600, resume="rounding.pth", progress=tqdm.tqdm)
            torch.save(quant_model.state_dict(), "quant.pth")
    """
    begun = time.monotonic()
    coming = iter(progress(batches))
    held: list[Any] = []
    found = 0
    for batch in coming:
        held.append(batch)
        found += _size(batch)
        if found >= samples:
            break
    if smoothing is not None:
        smooth(model, held, strength=smoothing)
    calibrate(model, chain(held, coming))
    left = None if seconds is None else seconds - (time.monotonic() - begun)
    return round_weights(model, held, short_sums=short_sums, seconds=left, resume=resume, progress=progress)


def quantize(
    model: nn.Module,
    config_file: Path,
    batches: Iterable[Any],
    folder: Path,
    *,
    samples: int,
    short_sums: bool,
    seconds: float | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> tuple[Path, list[RoundedLayer], dict[str, Statistics]]:
    """Quantize a float model by :func:`post_training` and write the checkpoint: what ``dopt quantize`` calls.

    Args:
        model: The float model; unchanged.
        config_file: The strategy file.
        batches: See :func:`post_training`, as the arguments that follow.
        folder: For the checkpoint and, meanwhile, for what is done; an interrupted call goes on from there.
        samples: Of the rounding.
        short_sums: For kernels with 16-bit sums.
        seconds: The time.
        progress: Shows it.

    Returns:
        The checkpoint, what rounding did to each layer, and what calibration saw before each whose input is quantized.
    """
    quantized = facade.optimize(model, config_file, backend="torch")
    report = post_training(
        quantized,
        batches,
        samples=samples,
        short_sums=short_sums,
        seconds=seconds,
        resume=folder / "unfinished.pth",
        progress=progress,
    )
    with staged(folder) as aside:
        torch.save(quantized.state_dict(), aside / "quantized.pth")
    quantizers = [layer.dopt_quantizer for layer in quantized_layers(root_of(quantized))]
    seen = {one.plan.name: one.statistics.to_core() for one in quantizers if not one.weight_only}
    return folder / "quantized.pth", report, seen


def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Calibrate a quantized model anew; a pass that fails leaves calibration off.

    Args:
        model: What ``optimize_model`` returned.
        batches: Inputs as the model takes them.

    Raises:
        CalibrationError: What a layer saw cannot be quantized, or it saw nothing.
    """
    _leave_calibration(model)  # one that was on is begun anew
    set_calibrate_state(model, True)
    try:
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
    except BaseException:
        _leave_calibration(model)
        raise
    set_calibrate_state(model, False)


def _leave_calibration(model: nn.Module) -> None:
    """Switch calibration off, whatever it has seen."""
    with suppress(CalibrationError):
        set_calibrate_state(model, False)


def _size(batch: Any) -> int:
    """Return how many samples a batch has: the first dimension of its first tensor."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.dim()), 1)


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
    return (part for part in parts if isinstance(part, torch.Tensor))
