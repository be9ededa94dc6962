"""Reading checkpoints without running anything in them."""

from __future__ import annotations

import collections
import hashlib
import inspect
import json
import pickle
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dopt_api.errors import CheckpointError
from dopt_api.files import staged

__all__ = ["KeptWork", "load_checkpoint", "load_into"]


_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""


def load_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a file that ``torch.save`` wrote.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is missing, is no checkpoint, holds anything but tensors, or asks to run code.
    """
    where = str(path.absolute())
    if not path.is_file():
        raise CheckpointError(
            f"The checkpoint {str(path)!r} {'is a directory' if path.is_dir() else 'does not exist'}",
            where=where,
            expected="a file written by torch.save(quant_model.state_dict(), path)",
            fix="Check the path.",
        )
    try:
        content = _load(path)
    except Exception as error:  # torch.load raises many kinds, all of which mean that the file is no good
        first_line = re.sub(r"\x1b\[\d*m", "", str(error)).strip().split("\n")[0].split(", **do")[0]
        raise CheckpointError(
            f"The checkpoint {str(path)!r} cannot be read: {type(error).__name__}: {first_line}",
            where=where,
            expected="a file written by torch.save(quant_model.state_dict(), path)",
            fix="Save it again. Files that hold more than tensors are refused, since loading them could run code.",
        ) from error
    if not _is_state(content):
        inner = [key for key, value in content.items() if _is_state(value)] if isinstance(content, Mapping) else []
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is not a state dict",
            where=where,
            expected="a mapping of names to tensors",
            fix=f"Save only the entry {inner[0]!r} of it." if inner else "torch.save(quant_model.state_dict(), path)",
        )
    state: Mapping[str, Tensor] = content
    return state


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load the state of a quantized model, strictly; one saved from a wrapper of the model will do.

    Raises:
        CheckpointError: It was saved from a float model, with another strategy file, or from another model.
    """
    where = str(path.absolute())
    own = model.state_dict()
    for prefix in _WRAPPERS:
        if state and own.keys().isdisjoint(state) and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    wanted, present = _quantizers(own), _quantizers(state)
    if wanted and not present:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is that of a float model",
            where=where,
            expected="the state dict of the quantized model, saved after calibration or retraining",
            fix="torch.save(quant_model.state_dict(), path), with the model that optimize_model returned.",
        )
    if wanted - present or present - wanted:
        layer = min((wanted - present) or (present - wanted))
        how = "does not hold" if wanted - present else "holds"
        raise CheckpointError(
            f"The checkpoint {str(path)!r} {how} the quantizer of {layer!r}, unlike the strategy file says",
            where=where,
            expected="a checkpoint made with the same strategy file",
            fix="Use the strategy file that was given to optimize_model.",
        )
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} does not fit the model: {' '.join(str(error).split())[:400]}",
            where=where,
            expected="a checkpoint of the same model",
            fix="Build the model with the same arguments as for training.",
        ) from error


class KeptWork:
    """What is done of a long piece of work on a model, in a file, so that it need not be done again.

    The file is a checkpoint: the model's state and, under a name of its own, what the caller notes, as JSON. It is
    that of one model before the work and of one set of arguments; another's is refused.
    """

    _NOTES = "dopt_kept_work"
    _SECONDS = 5.0  # between two writes

    def __init__(self, path: Path, model: nn.Module, arguments: object) -> None:
        self.path, self.model, self._written = path, model, 0.0
        digest = hashlib.sha256(repr(arguments).encode())
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.begun_from = digest.hexdigest()

    def restore(self) -> list[list[Any]]:
        """Bring the model to the kept state and return what was noted; nothing if there is no file.

        Raises:
            CheckpointError: The file is damaged, or is that of other work.
        """
        if not self.path.exists():
            return []
        state = dict(load_checkpoint(self.path))
        try:
            kept = json.loads(bytes(state.pop(self._NOTES).tolist()))
            begun_from, notes = kept["begun_from"], list(kept["notes"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"The file {str(self.path)!r} does not hold unfinished work",
                where=str(self.path.absolute()),
                expected="a file that an interrupted call wrote, or none",
                fix="Remove it, or give another path.",
            ) from error
        if begun_from != self.begun_from:
            raise CheckpointError(
                f"The unfinished work in {str(self.path)!r} was begun on another model or with other arguments",
                where=str(self.path.absolute()),
                expected="the same model, calibrated with the same data, and the same arguments",
                fix="Remove the file to begin anew.",
            )
        load_into(self.model, state, self.path)
        return notes

    def keep(self, notes: list[Any]) -> None:
        """Write the state and the notes, unless that was done moments ago."""
        if time.monotonic() - self._written < self._SECONDS:
            return
        text = json.dumps({"begun_from": self.begun_from, "notes": notes})
        state = {**self.model.state_dict(), self._NOTES: torch.tensor(list(text.encode()), dtype=torch.uint8)}
        with staged(self.path.absolute().parent) as aside:
            torch.save(state, aside / self.path.name)
        self._written = time.monotonic()

    def forget(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _quantizers(state: Mapping[str, Tensor]) -> set[str]:
    """Return the module paths of the layers whose quantizers a state dict holds."""
    return {key.rpartition("dopt_quantizer.")[0].rstrip(".") for key in state if "dopt_quantizer." in key}


def _is_state(content: object) -> bool:
    """Say whether this is a state dict: names to tensors, and what modules put there as extra state."""
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))
        for key, value in content.items()
    )


def _load(path: Path) -> Any:
    if "weights_only" in inspect.signature(torch.load).parameters:
        return torch.load(path, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", pickle_module=_restricted_pickle())  # before torch 1.13


def _restricted_pickle() -> ModuleType:
    """Return a stand-in for ``pickle`` that builds tensors and nothing else."""
    allowed = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("torch", "Size"): torch.Size,
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in allowed:
                return allowed[module, name]
            if module == "torch" and name.endswith("Storage"):
                return getattr(torch, name)
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")

    restricted = ModuleType("restricted_pickle")
    restricted.__dict__.update(
        Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load(), __name__="pickle"
    )
    return restricted
