"""Running a quantized graph on one of its paths, and reading what its layers are made of; nothing is added to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from dopt_api.errors import CalibrationError, never_calibrated
from dopt_api.quantizer import BatchNorm
from dopt_tf.find_layers import Layer, graph_of
from dopt_tf.inference_graph import source_of
from dopt_tf.optimize import quantized, raw_session, start

__all__ = ["Array", "Feed", "Runner", "given", "require_calibrated"]

Array = NDArray[Any]
Feed = Mapping[Any, Any]


class Runner:
    """A session of a quantized graph, run as inference whatever the flags of the script are."""

    def __init__(self, sess: Any) -> None:
        """Make sure that the quantizers' variables have values.

        Raises:
            ModelError: The graph is not a quantized one.
        """
        self.quantization = quantized(sess)
        start(sess)
        self.session, self.graph = raw_session(sess), graph_of(sess)
        with self.graph.as_default():
            self._variables = {variable.op.name: variable for variable in tf.compat.v1.global_variables()}

    def run(self, fetches: Any, feed: Feed, *, quantizing: bool) -> Any:
        """Return what is fetched; feeds of the two flags are overruled."""
        mode = self.quantization.mode
        return self.session.run(fetches, {**feed, mode.quantizing: quantizing, mode.training: False})

    def values(self, variables: Sequence[tf.Variable]) -> list[Array]:
        """Return the values of variables."""
        found: list[Array] = self.session.run(list(variables))
        return found

    def variable(self, tensor: str | None) -> tf.Variable | None:
        """Return the variable that a tensor of the float graph has the value of, or ``None``."""
        node = None if tensor is None else source_of(self.quantization.structure.graph, tensor)
        return None if node is None else self._variables.get(node.name)

    def norm_factor(self, layer: Layer) -> Array | None:
        """Return what folding multiplies a layer's weight by, ``[C]``, with 1 for 0; ``None`` without a normalization.

        The normalization is one of variables.
        """
        norm = layer.norm
        if norm is None:
            return None
        read = [self.variable(tensor) for tensor in (norm.variance, norm.gamma)]
        values = self.values([variable for variable in read if variable is not None])
        variance, *gamma = (value.reshape(-1) for value in values)
        factor = BatchNorm(gamma[0] if gamma else None, None, variance, variance, norm.epsilon).factor
        return np.where(factor == 0, np.float32(1.0), factor)

    def has_variable_norm(self, layer: Layer) -> bool:
        """Say whether :meth:`norm_factor` can tell."""
        norm = layer.norm
        if norm is None:
            return True
        return self.variable(norm.variance) is not None and (not norm.gamma or self.variable(norm.gamma) is not None)


def given(feeds: Any) -> list[dict[Any, Any]]:
    """Return feeds as a list.

    Raises:
        CalibrationError: There are none.
    """
    data = [dict(feed) for feed in feeds]
    if not data:
        raise CalibrationError("There are no feeds", expected="one or more of what sess.run is fed with")
    return data


def require_calibrated(runner: Runner) -> None:
    """Raise if a layer has no input range.

    Raises:
        CalibrationError: Layers were never calibrated.
    """
    sites = runner.quantization.sites
    ready = runner.values([site.quantizer.ready for site in sites.values()])
    undecided = zip(sites.items(), ready, strict=True)
    if missing := [name for (name, site), done in undecided if not (done or site.quantizer.weight_only)]:
        raise never_calibrated(missing)
