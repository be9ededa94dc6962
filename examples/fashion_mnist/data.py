"""Fashion-MNIST as Debian packages it; and for smoke runs, made-up pictures that need no file.

70,000 grey pictures of clothes, 28 by 28, in ten classes.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "SIZE", "Pictures", "made_up", "read"]

CLASSES = 10
SIZE = 28
_FOLDERS = (
    Path("/usr/share/datasets/fashion-mnist"),
    Path(__file__).resolve().parents[2] / ".cache/fashion-mnist/usr/share/datasets/fashion-mnist",
)


@dataclass(frozen=True)
class Pictures:
    """Pictures and their classes.

    Attributes:
        x: float32 ``[N, 28, 28]``, from 0 to 1.
        labels: int64 ``[N]``, from 0 to 9.
    """

    x: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.x)

    def part(self, start: int, stop: int | None = None, step: int = 1) -> Pictures:
        """Return some of the pictures."""
        return Pictures(self.x[start:stop:step], self.labels[start:stop:step])

    def batches(self, size: int, seed: int | None = None) -> Iterator[Pictures]:
        """Yield batches of one size, shuffled if there is a seed; an incomplete last one is left out."""
        order = np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(self) - size + 1, size):
            index = order[start : start + size]
            yield Pictures(self.x[index], self.labels[index])


def read(folder: Path | None = None) -> tuple[Pictures, Pictures]:
    """Return the 60,000 pictures for training and the 10,000 for the test.

    Args:
        folder: With the four IDX files; by default where Debian's package or ``make example-data`` puts them.
    """
    folders = _FOLDERS if folder is None else (folder,)
    for place in folders:
        if (place / "train-images-idx3-ubyte.gz").exists():
            return _read(place, "train"), _read(place, "t10k")
    sys.exit(
        f"error: no Fashion-MNIST in {' or '.join(map(str, folders))}. Fix: apt install dataset-fashion-mnist, or "
        "make example-data, or --data FOLDER; or --smoke, which needs no data."
    )


def made_up(training: int, test: int, seed: int = 0) -> tuple[Pictures, Pictures]:
    """Return noisy pictures, so many for training and so many for the test."""
    numbers = np.random.default_rng(seed)
    patterns = np.kron(numbers.random((CLASSES, 7, 7)), np.ones((4, 4)))
    labels = numbers.integers(0, CLASSES, training + test)
    x = np.clip(patterns[labels] + 0.5 * numbers.standard_normal((training + test, SIZE, SIZE)), 0.0, 1.0)
    both = Pictures(x.astype(np.float32), labels)
    return both.part(0, training), both.part(training)


def _read(folder: Path, name: str) -> Pictures:
    x, labels = _idx(folder / f"{name}-images-idx3-ubyte.gz", 3), _idx(folder / f"{name}-labels-idx1-ubyte.gz", 1)
    return Pictures(x.astype(np.float32) / np.float32(255), labels.astype(np.int64))


def _idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the bytes in an IDX file: magic number, sizes as big-endian int32, then the values."""
    content = gzip.decompress(file.read_bytes())
    shape = [int(size) for size in np.frombuffer(content, ">i4", dimensions, 4)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
