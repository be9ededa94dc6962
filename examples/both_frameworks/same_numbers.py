"""One strategy file for the same network in PyTorch and in TensorFlow, and the same numbers from both.

With the packages of ``examples/README.md`` installed::

    python examples/both_frameworks/same_numbers.py --smoke
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only; read when TensorFlow is imported

import numpy as np
import tensorflow.compat.v1 as tf

from examples.both_frameworks import by_tf, by_torch
from examples.both_frameworks.network import Array, Quantized, neutral
from examples.fashion_mnist.program import choose_strategy, options


def main() -> None:
    """Quantize the network in each framework: with weights of few bits, and as it was trained."""
    tf.logging.set_verbosity(tf.logging.ERROR)
    tf.disable_v2_behavior()
    given = options(__doc__, "example_output/both_frameworks")
    trained = by_torch.train(given.train, given.epochs)
    calibration, pictures = _in_16_shades(given.train.part(0, 512).x), _in_16_shades(given.test.x)

    # 1. One file for both. Layers are named alike; what kind they are, each framework says in its own words, so that
    # the optional op_type is left out. PyTorch needs the input_shape; TensorFlow's placeholders know theirs
    config_file = given.folder / "config.json"
    by_torch.write_config(config_file)
    choose_strategy(config_file, "Quant_INT8-8")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for layer in config["layer_strategy"].values():
        del layer["op_type"]
    config_file.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")

    # 2. With weights that are multiples of 1/64, all sums of the float network are exact: the frameworks see the same
    # data, and then have the same numbers. With weights of 24 bits, a sum's last bit depends on its order
    short = {name: np.rint(value * 64) / np.float32(64) for name, value in trained.items()}
    for title, weights in (("weights that are multiples of 1/64", short), ("weights as they were trained", trained)):
        folders = given.folder / "torch", given.folder / "tf"
        for folder in folders:
            folder.mkdir(exist_ok=True)
        one = by_torch.quantize(weights, calibration, pictures, config_file, folders[0])
        other = by_tf.quantize(weights, calibration, pictures, config_file, folders[1])
        print(f"{title}:")
        _compare(one, other)


def _in_16_shades(x: Array) -> Array:
    """Return pictures of 4 bits."""
    return np.divide(np.rint(x * 15), 16, dtype=np.float32)


def _compare(one: Quantized, other: Quantized) -> None:
    same = neutral(one.params) == neutral(other.params)
    print(f"  parameter files, names aside: {'equal to the byte' if same else 'not equal'}")
    for first, second in zip(one.params.layers, other.params.layers, strict=True):
        scale, apart = first.input.scale[0], abs(first.input.scale[0] - second.input.scale[0])
        weights = one.integers[first.name]
        print(
            f"  {first.name:<14} input scales apart by {apart / scale:.1e}, "
            f"zero points {first.input.zero_point[0]} and {second.input.zero_point[0]}, "
            f"{int((weights == other.integers[second.name]).sum())} of {weights.size} integers of the weight equal"
        )
    agree = float((one.logits.argmax(1) == other.logits.argmax(1)).mean())
    print(f"  quantized networks agree on {agree:.2%} of {len(one.logits)} pictures")


if __name__ == "__main__":
    main()
