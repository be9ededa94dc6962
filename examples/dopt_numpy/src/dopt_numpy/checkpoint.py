"""Keeping the state of a network in a file: ``.npz`` without pickles, which can hold arrays and run nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dopt_api.errors import CheckpointError
from dopt_api.files import StrPath, staged
from dopt_numpy.network import Network
from dopt_numpy.quantized_layer import QuantizedNetwork

__all__ = ["load_checkpoint", "load_into", "save_checkpoint"]

_MARK = ".dopt_quantizer."
_HOW = "a file written by dopt_numpy.checkpoint.save_checkpoint, or by numpy.savez(path, **model.state())"


def save_checkpoint(model: Network, path: StrPath) -> Path:
    """Write the state of a float or quantized network, whole or not at all, and return the path.

    Raises:
        OutputError: The folder does not exist or cannot be written.
    """
    target = Path(path)
    with staged(target.parent) as aside, (aside / target.name).open("wb") as file:
        np.savez(file, **model.state())  # type: ignore[arg-type]  # the state has no array called 'allow_pickle'
    return target


def load_checkpoint(path: StrPath) -> dict[str, NDArray[Any]]:
    """Return the arrays of a checkpoint by name.

    Raises:
        CheckpointError: The file is missing, or holds anything but arrays of numbers.
    """
    file = Path(path)
    where = str(file.absolute())
    if not file.is_file():
        raise CheckpointError(
            f"The checkpoint {str(file)!r} {'is a directory' if file.is_dir() else 'does not exist'}",
            where=where,
            expected=_HOW,
            fix="Check the path.",
        )
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except Exception as error:  # damaged archives raise many kinds, all of which mean that the file is no good
        raise CheckpointError(
            f"The checkpoint {str(file)!r} cannot be read: {type(error).__name__}: {error}",
            where=where,
            expected=_HOW,
            fix="Save it again. Files that hold more than arrays are refused, since loading them could run code.",
        ) from error


def load_into(model: QuantizedNetwork, state: Mapping[str, NDArray[Any]], path: StrPath) -> None:
    """Load the state of a quantized network, strictly.

    Raises:
        CheckpointError: It was saved from a float network, with another strategy file, or from another network.
    """
    where = str(Path(path).absolute())
    wanted, present = set(model.quantized_layers), {name.partition(_MARK)[0] for name in state if _MARK in name}
    if wanted and not present:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is that of a float model",
            where=where,
            expected="the state of the quantized model, saved after calibration or retraining",
            fix="save_checkpoint(quantized, path), with the model that optimize returned.",
        )
    if different := wanted ^ present:
        layer = min(different)
        how = "does not hold" if layer in wanted else "holds"
        raise CheckpointError(
            f"The checkpoint {str(path)!r} {how} the quantizer of {layer!r}, unlike the strategy file says",
            where=where,
            expected="a checkpoint made with the same strategy file",
            fix="Use the strategy file that was given to optimize.",
        )
    try:
        model.load_state(state)
    except ValueError as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} does not fit the model: {error}",
            where=where,
            expected="a checkpoint of the same model",
            fix="Build the model with the same arguments as for training.",
        ) from error
