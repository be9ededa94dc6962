"""Retrain the graph of a session with 4-bit weights: calibration, training, Saver, export.

With the packages of ``examples/README.md`` installed::

    python examples/tf_fashion_mnist/retrain.py --smoke
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only; read when TensorFlow is imported

import tensorflow.compat.v1 as tf

from dopt.dopt_tf.opt_main import (
    generate_config_file,
    generate_final_model,
    get_quant_loss,
    optimize_model,
    restore_float_checkpoint,
    set_calibrate_state,
)
from examples.fashion_mnist.program import choose_strategy, options, show
from examples.tf_fashion_mnist.network import BATCH, accuracy, build, fit, frozen_accuracy, session, training_of


def main() -> None:
    """Train in float, calibrate, retrain."""
    tf.logging.set_verbosity(tf.logging.ERROR)
    tf.disable_v2_behavior()
    given = options(__doc__, "example_output/tf_retraining")
    config_file = given.folder / "config.json"
    float_checkpoint, quant_checkpoint = str(given.folder / "float.ckpt"), str(given.folder / "quant.ckpt")
    with session() as opened:
        net = build()
        training = training_of(net, 0.1)
        opened.run(tf.global_variables_initializer())
        fit(opened, net, training, given.train, given.epochs)
        tf.train.Saver().save(opened, float_checkpoint)
        found = {"float": accuracy(opened, net, given.test)}

    # 1. Which layers there are: a strategy file to edit
    with session() as opened:
        build()
        generate_config_file(opened, config_file)
        choose_strategy(config_file, "Quant_INT8-4")

    with session() as opened:
        # 2. Rewrite the graph before there are gradients. Scales follow training where the network itself is trained
        net = build()
        quant_flag = tf.placeholder(tf.int32, [], name="quant_flag")
        optimize_model(opened, config_file, is_train_flag=net.training, quant_flag=quant_flag)
        training = training_of(net, 0.02, 0.05 * get_quant_loss(opened))
        opened.run(tf.global_variables_initializer())  # before the restore, which it would undo
        restore_float_checkpoint(opened, float_checkpoint)

        # 3. Calibrate: scales begin from what some hundred pictures say
        set_calibrate_state(opened, True)
        for batch in given.train.part(0, 512).batches(BATCH):
            opened.run(net.logits, {net.x: batch.x[..., None], net.training: False, quant_flag: 1})
        set_calibrate_state(opened, False)
        found["calibrated, quant_flag 1"] = accuracy(opened, net, given.test, {quant_flag: 1})

        # 4. Retrain by the same loop, and save by a plain Saver: scales are variables as weights are
        fit(opened, net, training, given.train, given.epochs, {quant_flag: 1})
        tf.train.Saver().save(opened, quant_checkpoint)
        found["retrained, quant_flag 1"] = accuracy(opened, net, given.test, {quant_flag: 1})

    # 5. Export: a frozen graph of float operations, weights on their grid, and the parameters of the integers
    with session() as opened:
        build()
        exported = generate_final_model(opened, config_file, ["logits"], quant_checkpoint, given.folder)
    found["frozen graph, weights alone quantized"] = frozen_accuracy(exported.model, given.test)
    show(found)


if __name__ == "__main__":
    main()
