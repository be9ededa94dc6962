"""Weights from a torch checkpoint, read without torch; nothing in it is executed.

The file is of the kind that torch wrote before version 1.6: pickles of a header, of the tensors and of the keys of
their storages, then the storages themselves.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_torch_weights"]

_Array = NDArray[np.generic]


def read_torch_weights(path: Path) -> dict[str, _Array]:
    """Return the arrays of a state dictionary by name.

    Raises:
        OSError: The file cannot be read, or is no such checkpoint.
    """
    try:
        with path.open("rb") as file:
            for _ in range(3):  # magic number, version, sizes of C types
                _Unpickler(file).load()
            tensors = _Unpickler(file)
            state: dict[str, _Array] = tensors.load()
            for key in _Unpickler(file).load():
                _fill(tensors.storages[key], file)
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise OSError(f"{path} is not a torch checkpoint of the old kind: {error}") from error
    return state


class _Unpickler(pickle.Unpickler):
    """Makes arrays of tensors, and refuses whatever else is no plain value.

    Attributes:
        storages: The storages by key, flat, to be filled.
    """

    def __init__(self, file: BufferedReader) -> None:
        super().__init__(file)
        self.storages: dict[str, _Array] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _view,
            "torch.FloatStorage": np.float32,
            "torch.LongStorage": np.int64,
        }
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return known[f"{module}.{name}"]

    def persistent_load(self, saved: Any) -> _Array:
        _, dtype, key, _, size, _ = saved
        return self.storages.setdefault(key, np.zeros(size, dtype))


def _fill(storage: _Array, file: BufferedReader) -> None:
    """Read a storage: the number of its elements, then these."""
    if int.from_bytes(file.read(8), "little") != storage.size or file.readinto(storage.data) != storage.nbytes:
        raise ValueError("a storage has another size than its tensors say")


def _view(storage: _Array, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any) -> _Array:
    """Return a tensor as a view of its storage."""
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min([offset, *shape, *strides]) < 0 or last >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
