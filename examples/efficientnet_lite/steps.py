"""Timing the steps of a run, and showing them on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Steps", "Track"]

_Batch = TypeVar("_Batch")


class Track(Protocol):
    """Wraps the batches of a loop, to show its progress."""

    def __call__(self, batches: Iterable[_Batch], /) -> Iterable[_Batch]:
        """Return the same batches."""
        ...


class Steps:
    """The steps of a run.

    Attributes:
        seconds: How long each finished step took, by its name, in order.

    Example:
        >>> steps = Steps(Console(stderr=True))
        >>> with steps.step("add") as track:
        ...     total = sum(track([1, 2]))
        >>> total, list(steps.seconds)
        (3, ['add'])
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[Track]:
        """Time a block under a name; what it yields wraps the batches of a loop in it."""
        columns = (TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            task = progress.add_task(name, total=None)

            def track(batches: Iterable[_Batch], /) -> Iterable[_Batch]:
                listed = list(batches)
                progress.update(task, total=len(listed))
                for batch in listed:
                    yield batch
                    progress.advance(task)

            start = time.perf_counter()
            yield track
            self.seconds[name] = time.perf_counter() - start
            progress.update(task, total=1, completed=1)
