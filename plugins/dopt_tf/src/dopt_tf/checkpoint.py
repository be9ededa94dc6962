"""Checkpoints: reading values without adding to a graph, and loading float ones into a quantized graph."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from dopt_api.errors import CheckpointError
from dopt_tf.find_layers import graph_of
from dopt_tf.optimize import start
from dopt_tf.quantizer import SCOPE, restore_values

__all__ = ["Checkpoint", "float_variables", "restore_float_checkpoint"]

Array = NDArray[np.generic]


class Checkpoint:
    """A checkpoint that ``tf.compat.v1.train.Saver`` wrote."""

    def __init__(self, path: str | Path) -> None:
        """Open the checkpoint with the prefix ``path``; nothing in it is executed.

        Raises:
            CheckpointError: It is missing or cannot be read.
        """
        self.path = str(path)
        try:
            self._reader = tf.train.load_checkpoint(_existing(self.path))
            self._names = self._reader.get_variable_to_shape_map()
        except CheckpointError:
            raise
        except Exception as error:  # the reader has many kinds for damaged data
            raise CheckpointError(
                f"The checkpoint {self.path!r} cannot be read: {str(error).strip().splitlines()[0]}",
                where=str(Path(self.path).absolute()),
                expected="a checkpoint written by tf.compat.v1.train.Saver().save(sess, path)",
                fix="Save it again.",
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def quantized(self) -> set[str]:
        """The names of the layers whose quantizers it holds."""
        start, end = f"{SCOPE}/", "/input_scale"
        return {name[len(start) : -len(end)] for name in self._names if name.startswith(start) and name.endswith(end)}

    def check_layers(self, wanted: Iterable[str]) -> None:
        """Raise if the checkpoint does not hold the quantizers of these layers and no others.

        Raises:
            CheckpointError: It was saved from a float graph, or with another strategy file.
        """
        where, names, present = str(Path(self.path).absolute()), set(wanted), self.quantized
        if names and not present:
            raise CheckpointError(
                f"The checkpoint {self.path!r} is that of a float model",
                where=where,
                expected="a checkpoint of the quantized session, saved after calibration or retraining",
                fix="tf.compat.v1.train.Saver().save(sess, path), with a saver made after optimize_model.",
            )
        if names != present:
            layer = min(names ^ present)
            how = "does not hold" if layer in names else "holds"
            raise CheckpointError(
                f"The checkpoint {self.path!r} {how} the quantizer of {layer!r}, unlike the strategy file says",
                where=where,
                expected="a checkpoint made with the same strategy file",
                fix="Use the strategy file that was given to optimize_model.",
            )

    def get(self, name: str) -> Array:
        """Return the value of a variable.

        Raises:
            CheckpointError: It is not there, or its data are damaged.
        """
        if name not in self._names:
            objects = any(key.endswith("/.ATTRIBUTES/VARIABLE_VALUE") for key in self._names)
            raise CheckpointError(
                f"The checkpoint {self.path!r} has no variable {name!r}",
                where=str(Path(self.path).absolute()),
                expected="a checkpoint of the same graph, written by tf.compat.v1.train.Saver",
                fix="Convert it: tf.train.Checkpoint names variables otherwise than the graph does."
                if objects
                else "Build the graph with the same arguments as for training, or check the path.",
            )
        try:
            return np.asarray(self._reader.get_tensor(name))
        except Exception as error:  # the reader has many kinds for damaged data
            raise CheckpointError(
                f"The variable {name!r} cannot be read from the checkpoint {self.path!r}: {str(error).splitlines()[0]}",
                where=str(Path(self.path).absolute()),
                fix="Save the checkpoint again; its data are damaged.",
            ) from error

    def value_of(self, variable: Any) -> Array:
        """Return the value of a variable of a graph, its own part of a partitioned one.

        Raises:
            CheckpointError: It is not there, or has another shape.
        """
        part = getattr(variable, "_save_slice_info", None)
        value = self.get(part.full_name if part else variable.op.name)
        if part:
            value = value[tuple(slice(o, o + s) for o, s in zip(part.var_offset, part.var_shape, strict=True))]
        if not variable.shape.is_compatible_with(value.shape):
            raise CheckpointError(
                f"The variable {variable.op.name!r} has the shape {list(value.shape)} in the checkpoint {self.path!r}, "
                f"but {variable.shape.as_list()} in the graph",
                where=str(Path(self.path).absolute()),
                expected="a checkpoint of the same model",
                fix="Build the graph with the same arguments as for training.",
            )
        return value


def float_variables(graph: tf.Graph) -> list[tf.Variable]:
    """Return the global variables of a graph other than those of quantizers, as for a saver of float checkpoints.

    Example:
        A saver whose checkpoints the float graph can load::

            saver = tf.compat.v1.train.Saver(float_variables(sess.graph))
    """
    with graph.as_default():
        return [variable for variable in tf.compat.v1.global_variables() if not _of_quantizer(variable)]


def restore_float_checkpoint(sess: Any, path: str | Path) -> None:
    """Load a checkpoint of the float model into a session, whose graph may be quantized; quantizers stay as they are.

    Every variable of the model is loaded. What an optimizer keeps beside a variable (``kernel/Adam``) and counters
    are loaded where the checkpoint has them.

    Args:
        sess: The session.
        path: What was given to ``Saver.save``, with the step number if there was one.

    Raises:
        CheckpointError: It is missing or unreadable, or lacks a variable of the model.
    """
    checkpoint = Checkpoint(path)
    variables = float_variables(graph_of(sess))
    names = {variable.op.name for variable in variables}
    values: list[tuple[tf.Variable, Array]] = []
    for variable in variables:
        part = getattr(variable, "_save_slice_info", None)
        if (part.full_name if part else variable.op.name) in checkpoint or not _is_auxiliary(variable, names):
            values.append((variable, checkpoint.value_of(variable)))
    restore_values(sess, values)
    start(sess)


def _existing(path: str) -> str:
    """Return the path of a checkpoint that is there.

    Raises:
        CheckpointError: It is not.
    """
    if path and not Path(path).is_dir() and tf.compat.v1.train.checkpoint_exists(path):
        return path
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    found = _prefixes(folder)
    raise CheckpointError(
        f"The checkpoint {path!r} {'is a directory' if path and Path(path).is_dir() else 'does not exist'}",
        where=str(Path(path).absolute()),
        expected="what Saver.save(sess, path) returned",
        fix=f"Pass one of those in this directory: {', '.join(map(repr, found))}." if found else "Check the path.",
    )


def _prefixes(folder: Path) -> list[str]:
    """Return the checkpoints in a folder, at most three."""
    if not folder.is_dir():
        return []
    return sorted(str(file)[: -len(".index")] for file in folder.glob("*.index"))[:3]


def _of_quantizer(variable: tf.Variable) -> bool:
    return str(variable.op.name).startswith(f"{SCOPE}/") or f"/{SCOPE}/" in str(variable.op.name)


def _is_auxiliary(variable: tf.Variable, names: Iterable[str]) -> bool:
    """Say whether a variable belongs to an optimizer or counts steps."""
    name = str(variable.op.name)
    if variable.trainable:
        return False
    return variable.shape.rank == 0 or any(name != other and name.startswith(f"{other}/") for other in names)
