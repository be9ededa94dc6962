"""Options and report of the examples on Fashion-MNIST."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from examples.fashion_mnist.data import Pictures, made_up, read

__all__ = ["Options", "choose_strategy", "options", "show"]


@dataclass(frozen=True)
class Options:
    """What an example was asked for.

    Attributes:
        folder: An existing folder for its files.
        train: Pictures to train and to calibrate with.
        test: Pictures to judge by, and for nothing else.
        epochs: Of training in float; retraining takes as many.
    """

    folder: Path
    train: Pictures
    test: Pictures
    epochs: int


def options(description: str | None, folder: str) -> Options:
    """Read the command line and the pictures.

    Args:
        description: Of the program.
        folder: For its files, where none is given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few made-up pictures: seconds, no data needed")
    parser.add_argument("--data", type=Path, help="folder with the IDX files of Fashion-MNIST")
    parser.add_argument("--output-dir", type=Path, default=Path(folder), help="for files (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of training, and of retraining (default: %(default)s)")
    given = parser.parse_args()
    train, test = made_up(1600, 400) if given.smoke else read(given.data)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    return Options(given.output_dir, train, test, given.epochs)


def choose_strategy(config_file: Path, strategy: str, range_method: str = "min_max") -> None:
    """Edit a strategy file: the same for every layer; ``dopt config set`` does it from the command line."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for layer in config["layer_strategy"].values():
        layer.update(quant_strategy=strategy, range=range_method)
    config_file.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def show(accuracy: dict[str, float]) -> None:
    """Print the accuracy of each network, from 0 to 1, in percent."""
    for name, value in accuracy.items():
        print(f"{name:<48}{value:8.2%}")
