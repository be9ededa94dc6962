"""Running a user's model on a user's batches, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["evaluation", "run", "taking_over"]


def run(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch: a tensor, a tuple of arguments, or a dictionary of keyword arguments."""
    args: tuple[Any, ...] = batch if isinstance(batch, tuple) else () if isinstance(batch, dict) else (batch,)
    return model(*args, **(batch if isinstance(batch, dict) else {}))


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode for the time of the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def taking_over(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let functions take the place of the modules' ``forward`` for the time of the block."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]
