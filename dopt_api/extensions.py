"""What third parties add without a backend: an entry point, whose name is the name by which it is asked for.

The group says what it is: ``dopt.strategies`` for a :class:`dopt_api.strategy.Strategy`, ``dopt.ranges`` for a function
from statistics and grid to a range, ``dopt.formats`` for a writer (:mod:`dopt_api.formats`). ``dopt.post_training`` has
what ``dopt quantize`` calls for models of the backend of that name: a function of the model, the strategy file, the
batches and a folder for the checkpoint, and of the keywords ``samples``, ``short_sums``, ``seconds`` and ``progress``,
that returns the checkpoint, a list of :class:`dopt_api.quantizer.rounding.RoundedLayer` and, if it likes, what
calibration saw, a mapping from layers to :class:`dopt_api.quantizer.Statistics`; ``dopt.sensitivity`` what
``dopt tune`` calls: a function of the model, the strategy file, the batches and the names of strategies, and of the
keywords ``cost`` and ``output_names``, that returns a list of :class:`dopt_api.search.Choice`. ``dopt.graphs`` has
what makes ONNX of a backend's own graphs, by the suffix of their files (:mod:`dopt_api.graphs`). Names are listed
without importing anything; only what is asked for is loaded.

Example:
    In the ``pyproject.toml`` of a distribution::

        [project.entry-points."dopt.strategies"]
        Quant_INT6-6 = "my_package.strategies:six_bits"
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import metadata
from typing import Any

from dopt_api.errors import ExtensionError

__all__ = ["FORMATS", "GRAPHS", "POST_TRAINING", "RANGES", "SENSITIVITY", "STRATEGIES", "load", "names"]

STRATEGIES = "dopt.strategies"
RANGES = "dopt.ranges"
FORMATS = "dopt.formats"
POST_TRAINING = "dopt.post_training"
SENSITIVITY = "dopt.sensitivity"
GRAPHS = "dopt.graphs"


def names(group: str, own: Collection[str]) -> tuple[str, ...]:
    """Return the toolkit's own names and then those that installed distributions add, in alphabetical order."""
    return (*own, *sorted({point.name for point in metadata.entry_points(group=group)}.difference(own)))


def load(group: str, name: str) -> tuple[Any, str]:
    """Load what is called ``name`` in a group.

    Returns:
        The object, and where it comes from, for messages.

    Raises:
        ExtensionError: Two distributions bring it, or it does not import.
        KeyError: There is none.
    """
    points = {_origin(point): point for point in metadata.entry_points(group=group) if point.name == name}
    if not points:
        raise KeyError(name)
    if len(points) > 1:
        raise ExtensionError(
            f"{name!r} comes from two distributions",
            where=" and ".join(sorted(points)),
            expected=f"one entry point {name!r} in the group {group!r}",
            fix=f"pip uninstall one of them, for example: pip uninstall {max(points).split(maxsplit=1)[0]}",
        )
    ((origin, point),) = points.items()
    try:
        return point.load(), f"{origin}, entry point {point.value!r}"
    except Exception as error:  # another's module can fail to import in any way
        raise ExtensionError(
            f"{name!r} does not import: {type(error).__name__}: {error}",
            where=f"{origin}, entry point {point.value!r}",
            fix=f"Reinstall it: pip install --force-reinstall {origin.split(maxsplit=1)[0]}",
        ) from error


def _origin(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
