"""Post-training quantization in one call: calibrate, then round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dopt_api import facade
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.files import staged
from dopt_api.quantizer import Statistics
from dopt_tf.find_layers import graph_of
from dopt_tf.optimize import quantized, raw_session, set_calibrate_state
from dopt_tf.quantizer import restore_values
from dopt_tf.rounding import RoundedLayer, round_weights
from dopt_tf.statistics import DeviceStatistics

__all__ = ["calibrate", "post_training", "quantize", "quantized_session"]

Feed = Mapping[Any, Any]


def post_training(
    sess: Any,
    feeds: Iterable[Feed],
    *,
    samples: int = 32,
    short_sums: bool = False,
    seconds: float | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[RoundedLayer]:
    """Calibrate a quantized graph and round its weights for its outputs; variables of the session are changed.

    All feeds are looked at once, for the ranges of the activations; the first ``samples`` samples of them serve
    :func:`dopt_tf.rounding.round_weights`, and are all that is held in memory.

    Args:
        sess: The session that was given to ``optimize_model``, with the float weights loaded. It is calibrated anew.
        feeds: What ``sess.run`` is fed with for inference, one for each batch, the model's own training flag included;
            ``quant_flag`` and ``is_train_flag`` need not be there. Any iterable, passed over once.
        samples: How many samples the rounding looks at; whole batches are taken until they are reached. More are
            slower and, up to some hundreds, better.
        short_sums: For processors with AVX2 and without VNNI; see :func:`~dopt_tf.rounding.round_weights`.
        seconds: The time that all of it may take; the calibration is always done, and layers for which no time is left
            are rounded to nearest.
        progress: Wraps the feeds and then the layers to show progress, such as ``tqdm.tqdm``.

    Returns:
        What rounding did to each quantized layer, in the order of the graph.

    Raises:
        ModelError: The graph is not a quantized one.
        CalibrationError: There are no feeds, or what a layer saw cannot be quantized.

    Example:
        One call stands between ``optimize_model`` and the checkpoint::

            report = post_training(sess, ({x: batch} for batch in batches), seconds=600, progress=tqdm.tqdm)
            tf.compat.v1.train.Saver().save(sess, "quant/model")
    """
    begun = time.monotonic()
    quantized(sess)  # what is not is said before data are drawn
    coming = iter(progress(feeds))
    held: list[Feed] = []
    found = 0
    for feed in coming:
        held.append(feed)
        found += max((len(value) for value in feed.values() if np.ndim(value)), default=1)
        if found >= samples:
            break
    calibrate(sess, chain(held, coming))
    left = None if seconds is None else seconds - (time.monotonic() - begun)
    return round_weights(sess, held, short_sums=short_sums, seconds=left, progress=progress)


def quantize(
    sess: Any,
    config_file: Path,
    feeds: Iterable[Feed],
    folder: Path,
    *,
    samples: int,
    short_sums: bool,
    seconds: float | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> tuple[Path, list[RoundedLayer], dict[str, Statistics]]:
    """Quantize the graph of a session by :func:`post_training` and write the checkpoint: what ``dopt quantize`` calls.

    Args:
        sess: A session of the float graph with the weights loaded; its graph is rewritten.
        config_file: The strategy file.
        feeds: See :func:`post_training`, as the arguments that follow; tensors may be named by text, as ``"x:0"``.
        folder: For the checkpoint.
        samples: Of the rounding.
        short_sums: For kernels with 16-bit sums.
        seconds: The time.
        progress: Shows it.

    Returns:
        The checkpoint's prefix, what rounding did to each layer, and what calibration saw before each whose input is
        quantized.

    Raises:
        ModelError: A variable has no value.
    """
    with quantized_session(sess, config_file) as fresh:
        report = post_training(fresh, feeds, samples=samples, short_sums=short_sums, seconds=seconds, progress=progress)
        with staged(folder) as aside:
            saver = tf.compat.v1.train.Saver(tf.compat.v1.global_variables())
            saver.save(fresh, str(aside / "quantized"), write_meta_graph=False, write_state=False)
        quantizers = [site.quantizer for site in quantized(fresh).sites.values() if not site.quantizer.weight_only]
        values = raw_session(fresh).run([one.statistics.parts for one in quantizers])
    seen = {one.plan.name: DeviceStatistics.to_core(parts) for one, parts in zip(quantizers, values, strict=True)}
    return folder / "quantized", report, seen


@contextmanager
def quantized_session(sess: Any, config_file: Path) -> Iterator[Any]:
    """Open a session of the same graph, quantized, with the same values; a session that has run cannot be quantized.

    Args:
        sess: A session of the float graph with the weights loaded; its graph is rewritten.
        config_file: The strategy file.

    Raises:
        ModelError: A variable has no value.
    """
    v1, graph = tf.compat.v1, graph_of(sess)
    with graph.as_default(), v1.Session(graph=graph) as fresh:
        variables = v1.global_variables()
        try:
            values = raw_session(sess).run(variables)
        except tf.errors.FailedPreconditionError as error:
            raise ModelError(
                "The session has variables without a value",
                where=str(error).splitlines()[0][:200],
                expected="a session with the weights of the trained graph",
                fix="Restore them (tf.compat.v1.train.Saver) in the function that returns the session.",
            ) from error
        facade.optimize(fresh, config_file, is_train_flag=False, quant_flag=1, backend="tf")
        restore_values(fresh, zip(variables, values, strict=True))
        yield fresh


def calibrate(sess: Any, feeds: Iterable[Feed]) -> None:
    """Calibrate a quantized graph anew; a run that fails leaves calibration off.

    Args:
        sess: The session whose graph was quantized.
        feeds: What ``sess.run`` is fed with for inference.

    Raises:
        CalibrationError: What a layer saw cannot be quantized, or it saw nothing.
    """
    quantization, graph = quantized(sess), graph_of(sess)
    layers, mode = [graph.get_operation_by_name(name) for name in quantization.sites], quantization.mode
    _leave_calibration(sess)  # one that was on is begun anew
    set_calibrate_state(sess, True)
    try:
        for feed in feeds:
            raw_session(sess).run(layers, {**feed, mode.quantizing: True, mode.training: False})
    except BaseException:
        _leave_calibration(sess)
        raise
    set_calibrate_state(sess, False)


def _leave_calibration(sess: Any) -> None:
    """Switch calibration off, whatever it has seen."""
    with suppress(CalibrationError):
        set_calibrate_state(sess, False)
