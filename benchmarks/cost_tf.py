"""Measure what quantization costs in a TensorFlow session, as ratios to float in one interleaved run.

Prints JSON. The network is EfficientNet-Lite0 built for inference, with the weights of its initializers, since times do
not depend on them. ``--smoke`` takes few pictures and rounds, to see that everything runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from dopt.dopt_tf.opt_main import generate_config_file, optimize_model, set_calibrate_state
from examples.efficientnet_lite.pictures import SIZE
from examples.efficientnet_lite.program import choose_strategy
from examples.efficientnet_lite_tf import network

__all__ = ["main", "measure"]

TARGETS = {
    "flag 0 / float forward": 1.05,
    "calibration / float forward": 1.3,
    "quantized / float forward": 1.5,
    "training / float training step": 1.6,
}
THREADS = 2


def measure(batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return for each ratio its median over the rounds, quartiles, and the target.

    Args:
        batch: Pictures a step.
        rounds: How often each comparison is made.
    """
    v1 = tf.compat.v1
    config = v1.ConfigProto(intra_op_parallelism_threads=THREADS, inter_op_parallelism_threads=THREADS)
    pictures = np.random.default_rng(0).standard_normal((batch, SIZE, SIZE, 3)).astype(np.float32)
    labels = np.arange(batch) % 1000

    def step_of(logits: tf.Tensor) -> tf.Operation:
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        return v1.train.MomentumOptimizer(1e-6, 0.9).minimize(tf.reduce_mean(loss))

    with tempfile.TemporaryDirectory() as folder:
        plain = v1.Session(graph=tf.Graph(), config=config)
        with plain.graph.as_default():
            net = network.build()
            file = generate_config_file(plain, Path(folder) / "config.json")
            choose_strategy(file, "Quant_INT8-8", "min_max")
            step = step_of(net.logits)
            plain.run(v1.global_variables_initializer())
        quantized = v1.Session(graph=tf.Graph(), config=config)
        with quantized.graph.as_default():
            other = network.build()
            is_train, quant = v1.placeholder(tf.bool, []), v1.placeholder(tf.int32, [])
            optimize_model(quantized, file, is_train, quant)
            other_step = step_of(other.logits)
            quantized.run(v1.global_variables_initializer())

    def float_run(fetch: str) -> Callable[[], object]:
        return lambda: plain.run(fetch, {net.pictures.name: pictures})

    def run(fetch: str, flag: int, train: bool) -> Callable[[], object]:
        feeds = {other.pictures.name: pictures, quant.name: flag, is_train.name: train}
        return lambda: quantized.run(fetch, feeds)

    forward, logits = float_run(net.logits.name), other.logits.name
    found = {}
    set_calibrate_state(quantized, True)
    found["calibration / float forward"] = _ratios(forward, run(logits, 1, False), rounds)
    set_calibrate_state(quantized, False)
    found["quantized / float forward"] = _ratios(forward, run(logits, 1, False), rounds)
    found["flag 0 / float forward"] = _ratios(forward, run(logits, 0, False), rounds)
    trained = run(other_step.name, 1, True)
    found["training / float training step"] = _ratios(float_run(step.name), trained, max(1, rounds // 2))
    return {name: _figure(ratios, TARGETS[name]) for name, ratios in found.items()}


def _ratios(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[float]:
    """Return the ratio of the seconds of ``other`` to those of ``one`` for each round, after one that warms up."""
    result = []
    for number in range(rounds + 1):
        seconds = {}
        for action in (one, other) if number % 2 else (other, one):
            begin = time.perf_counter()
            action()
            seconds[action] = time.perf_counter() - begin
        result.append(seconds[other] / seconds[one])
    return result[1:]


def _figure(ratios: list[float], target: float) -> dict[str, float]:
    low, median, high = statistics.quantiles(ratios * 2, n=4)
    return {"median": median, "low": low, "high": high, "target": target}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few pictures and rounds")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each comparison (%(default)s)")
    options = parser.parse_args(argv)
    tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)
    figures = measure(1, 1) if options.smoke else measure(options.batch, options.rounds)
    print(json.dumps({"tensorflow": tf.__version__, "threads": THREADS, "figures": figures}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
