"""The calls of the vendor's tool, under its names: a script written for it changes its ``sys.path`` line at most.

Example:
    Calibration, from a float graph and its checkpoint to a deployable model::

        with tf.compat.v1.Session(graph=tf.Graph()) as sess:
            with sess.graph.as_default():
                build_model()
                generate_config_file(sess, "config.json")    # then edit the file

        with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
            x, logits = build_model()
            quant_flag = tf.compat.v1.placeholder(tf.int32, [])
            is_train = tf.compat.v1.placeholder(tf.bool, [])
            optimize_model(sess, "config.json", is_train, quant_flag)
            restore_float_checkpoint(sess, "float/model.ckpt")
            set_calibrate_state(sess, True)
            for batch in calibration_set:
                sess.run(logits, {x: batch, quant_flag: 1, is_train: False})
            set_calibrate_state(sess, False)
            tf.compat.v1.train.Saver().save(sess, "quant/model.ckpt")

        with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
            build_model()
            generate_final_model(sess, "config.json", ["logits"], "quant/model.ckpt", "out")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dopt_api
from dopt_tf.plugin import require_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

    from dopt_api.files import StrPath
    from dopt_api.types import ExportResult

__all__ = [
    "float_variables",
    "generate_config_file",
    "generate_final_model",
    "get_quant_loss",
    "optimize_model",
    "restore_float_checkpoint",
    "set_calibrate_state",
]


def generate_config_file(sess: Any, dst_path: StrPath = "./config_gen.json") -> Path:
    """Write the strategy file of a float graph, every layer ``float``.

    Args:
        sess: The session that holds the float graph; nothing is run.
        dst_path: The JSON file to write.

    Returns:
        The path of the file.

    Raises:
        ModelError: The graph is already quantized, or has no layer that can be quantized.
        OutputError: The file cannot be written.
    """
    return dopt_api.generate_config(sess, None, dst_path, backend="tf")


def optimize_model(sess: Any, config_file: StrPath, is_train_flag: Any, quant_flag: Any) -> None:
    """Rewrite the graph of a session in place, before weights are loaded and before gradients are built.

    Args:
        sess: The session that holds the float graph; it must not have run anything yet.
        config_file: The edited strategy file.
        is_train_flag: Scalar boolean tensor or Python value: whether scales follow training.
        quant_flag: Scalar integer tensor or Python value: 0 for the float path, positive for the quantized one.

    Raises:
        ConfigError: The file cannot be read or does not fit the graph.
        ModelError: The graph is already quantized, finalized, has gradients, or has run.
    """
    dopt_api.optimize(sess, config_file, is_train_flag=is_train_flag, quant_flag=quant_flag, backend="tf")


def set_calibrate_state(sess: Any, calibration_mode: bool) -> None:
    """Switch calibration (training-free quantization) on or off.

    While it is on, steps with a positive ``quant_flag`` compute in float and collect statistics.

    Args:
        sess: The session whose graph was quantized.
        calibration_mode: On or off.

    Raises:
        CalibrationError: On switching off: a layer saw no data, or saw NaN or infinity.
    """
    dopt_api.set_calibrate_state(sess, calibration_mode, backend="tf")


def get_quant_loss(sess: Any) -> tf.Tensor:
    """Return the quantization loss, a differentiable dimensionless scalar of the graph.

    Add it to the task's loss with a small weight (about 1:20), before the optimizer; simple tasks do without.

    Args:
        sess: The session whose graph was quantized.
    """
    return dopt_api.get_quant_loss(sess, backend="tf")


def generate_final_model(
    sess: Any,
    config_file: StrPath,
    output_name_list: Sequence[str],
    ckpt_file: StrPath,
    output_dir: StrPath = "./",
) -> ExportResult:
    """Write ``model.pb`` (frozen, folded, weights on their grid) and ``quant_params.json``, both or neither.

    Args:
        sess: The session that holds the float graph, built anew; unchanged.
        config_file: The strategy file that was given to :func:`optimize_model`.
        output_name_list: Names of the output nodes.
        ckpt_file: The checkpoint saved after calibration or retraining; nothing in it is executed.
        output_dir: An existing folder.

    Returns:
        The paths of the two files.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable, or does not fit.
        CalibrationError: A quantized layer was neither calibrated nor trained.
        ConfigError: The graph has no such output.
        OutputError: The folder does not exist or cannot be written.
    """
    return dopt_api.export(sess, config_file, ckpt_file, output_dir, output_names=output_name_list, backend="tf")


def float_variables(graph: tf.Graph) -> list[tf.Variable]:
    """Return the variables of a graph other than those of quantizers; see :mod:`dopt_tf.checkpoint`."""
    require_tensorflow()
    from dopt_tf import checkpoint  # noqa: PLC0415  # TensorFlow is imported when it is needed

    return checkpoint.float_variables(graph)


def restore_float_checkpoint(sess: Any, path: StrPath) -> None:
    """Load a checkpoint of the float model into a session whose graph is quantized; see :mod:`dopt_tf.checkpoint`.

    Raises:
        CheckpointError: It is missing or unreadable, or lacks a variable of the model.
    """
    require_tensorflow()
    from dopt_tf import checkpoint  # noqa: PLC0415  # see above

    checkpoint.restore_float_checkpoint(sess, Path(path))
