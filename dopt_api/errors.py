"""The exception tree: every error the toolkit raises on purpose is a :class:`DoptError`.

An error is a full sentence for a person and a set of facts for a program: what went wrong, where
(file, line, layer), what was expected, and how to fix it. The facts are attributes of the same names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DoptError",
    "ExtensionError",
    "FormatError",
    "ModelError",
    "NumbersError",
    "OutputError",
    "ParamsError",
    "PlotError",
    "SearchError",
    "StrategyError",
    "closest",
    "most_of",
    "never_calibrated",
]


class DoptError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: What went wrong, as a sentence without a final full stop.
        where: File, line, layer or argument the error is about.
        expected: What would have been right.
        fix: What the user can do now.

    Example:
        >>> print(DoptError("There is no layer 'conv9'", where="config.json", fix="Remove it."))
        There is no layer 'conv9'. Where: config.json. Fix: Remove it.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        super().__init__(what, where, expected, fix)
        self.what = what
        self.where = where
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        parts = [
            self.what,
            f"Where: {self.where}" if self.where else "",
            f"Expected: {self.expected}" if self.expected else "",
            f"Fix: {self.fix}" if self.fix else "",
        ]
        return " ".join(part if part.endswith((".", "?", "\n")) else f"{part}." for part in parts if part)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.fix))


def _rebuild(kind: type[DoptError], what: str, where: str, expected: str, fix: str) -> DoptError:
    return kind(what, where=where, expected=expected, fix=fix)


class ConfigError(DoptError):
    """The strategy file cannot be read, or does not fit the model."""


class StrategyError(ConfigError):
    """A quantization strategy is unknown, or not supported for a kind of layer."""


class ModelError(DoptError):
    """The model cannot be handled: foreign, already quantized, wrapped, or its input is wrong."""


class BackendError(DoptError):
    """A backend is missing, broken, or breaks the hook contract."""


class ExtensionError(DoptError):
    """A strategy, range method or format that an installed distribution adds is broken, or comes from two of them."""


class CalibrationError(DoptError):
    """Statistics are missing or unusable (never run, NaN, infinite)."""


def most_of(failures: Sequence[CalibrationError]) -> CalibrationError:
    """Return one error for the layers that could not be calibrated: that of the first, with the number of others.

    Example:
        >>> most_of([CalibrationError("No data", where="a"), CalibrationError("NaN", where="b")]).what
        'No data (and 1 other layers could not be calibrated)'
    """
    first, more = failures[0], len(failures) - 1
    what = first.what + (f" (and {more} other layers could not be calibrated)" if more else "")
    return CalibrationError(what, where=first.where, expected=first.expected, fix=first.fix)


def never_calibrated(layers: Sequence[str]) -> CalibrationError:
    """Return the error for layers whose ranges are not decided when a model is exported.

    Example:
        >>> never_calibrated(["conv1/Conv2D"]).what
        "Layer 'conv1/Conv2D' was neither calibrated nor trained"
    """
    more = f" and {len(layers) - 1} other layers were" if len(layers) > 1 else " was"
    return CalibrationError(
        f"Layer {layers[0]!r}{more} neither calibrated nor trained",
        where=f"layer {layers[0]!r}",
        expected="a checkpoint saved after calibration or retraining",
        fix="Switch calibration on by set_calibrate_state, run the calibration set through the quantized model, switch "
        "it off, then save the checkpoint.",
    )


class CheckpointError(DoptError):
    """A checkpoint is missing, unreadable, unsafe, or does not fit the model."""


class OutputError(DoptError):
    """A result cannot be written."""


class FormatError(DoptError):
    """A model cannot be written in a format: unknown, not for this model, or a package is missing."""


class SearchError(DoptError):
    """There is no choice of strategies as asked for."""


class PlotError(DoptError):
    """A picture cannot be drawn: there is nothing to draw, its format is unknown, or a package is missing."""


class ParamsError(DoptError):
    """A parameter file does not follow its format."""


class NumbersError(DoptError, ValueError):
    """A number that cannot be quantized: NaN, infinite, or a scale that is not positive."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ``"Did you mean 'conv1/Conv2D'?"``, or an empty string.

    Example:
        >>> closest("conv1/Conv2d", ["conv1/Conv2D", "fc/Linear"])
        "Did you mean 'conv1/Conv2D'?"
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {found[0]!r}?" if found else ""
