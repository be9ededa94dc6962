"""The whole way on real data: the 8 by 8 handwritten digits that scikit-learn brings (from the UCI repository).

A network with batch normalization, a residual block and a depthwise convolution is trained, calibrated, retrained and
exported, and the exported files are run by ONNX Runtime.
"""

import numpy as np
import onnxruntime
import pytest
from networks import calibrate, write_config
from sklearn.datasets import load_digits

import dopt_api
from dopt_api.params import read_params
from dopt_numpy.checkpoint import load_checkpoint, save_checkpoint
from dopt_numpy.network import (
    SGD,
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    GlobalAveragePool,
    MaxPool2D,
    Network,
    ReLU,
    Residual,
    cross_entropy,
)

TRAINED = 1200


def build():
    rng = np.random.default_rng(0)
    block = {
        "depthwise": Conv2D(16, 16, 3, padding=1, groups=16, bias=False, rng=rng),
        "bn1": BatchNorm(16),
        "relu": ReLU(),
        "pointwise": Conv2D(16, 16, 1, bias=False, rng=rng),
        "bn2": BatchNorm(16),
    }
    return Network(
        {
            "conv1": Conv2D(1, 16, 3, padding=1, bias=False, rng=rng),
            "bn1": BatchNorm(16),
            "relu1": ReLU(),
            "block": Residual(block),
            "pool": MaxPool2D(2),
            "conv2": Conv2D(16, 32, 3, bias=False, rng=rng),
            "bn2": BatchNorm(32),
            "relu2": ReLU(),
            "average": GlobalAveragePool(),
            "flatten": Flatten(),
            "fc": Dense(32, 10, rng=rng),
        }
    )


def train(model, x, labels, *, epochs, rate, quant_loss=0.0):
    rng = np.random.default_rng(1)
    optimizer = SGD(model.parameters(), rate)
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(x)), len(x) // 40):
            logits, pullback = model.forward(x[rows], training=True)
            _, gradient = cross_entropy(logits, labels[rows])
            if quant_loss:
                dopt_api.get_quant_loss(model).backward(quant_loss)
            pullback(gradient)
            optimizer.step()


def accuracy(logits, labels):
    return float((logits.argmax(axis=1) == labels).mean())


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)[order]
    return x[:TRAINED], labels[order][:TRAINED], x[TRAINED:], labels[order][TRAINED:]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The float network after training: its checkpoint, its accuracy, and a strategy file that quantizes all of it."""
    folder, (x, labels, test_x, test_labels) = tmp_path_factory.mktemp("digits"), digits
    model = build()
    train(model, x, labels, epochs=12, rate=0.05)
    config = write_config(build(), folder / "config.json", "image:1,1,8,8")
    return save_checkpoint(model, folder / "float.npz"), accuracy(model(test_x), test_labels), config


def quantize(trained):
    checkpoint, _, config = trained
    quantized = dopt_api.optimize(build(), config)
    quantized.load_state(load_checkpoint(checkpoint))
    return quantized


def deployed_accuracy(quantized, trained, digits, folder):
    """Export, and run the written graph by ONNX Runtime."""
    path = save_checkpoint(quantized, folder / "quant.npz")
    result = dopt_api.export(build(), trained[2], path, folder, dynamic_batch=True)
    assert len(read_params(result.params).layers) == 5
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    return accuracy(session.run(None, {"image": digits[2]})[0], digits[3])


def test_the_float_network_learns(trained):
    assert trained[1] > 0.97


@pytest.mark.parametrize("method", ["min_max", "moving_average", "mse"])
def test_calibration_keeps_the_accuracy(trained, digits, tmp_path, method):
    config = write_config(build(), tmp_path / "config.json", "image:1,1,8,8", range=method)
    quantized = calibrate(quantize((*trained[:2], config)), *np.array_split(digits[0][:256], 4))
    assert accuracy(quantized(digits[2]), digits[3]) > trained[1] - 0.01
    assert deployed_accuracy(quantized, (*trained[:2], config), digits, tmp_path) > trained[1] - 0.01


def test_retraining_repairs_a_bad_calibration(trained, digits, tmp_path):
    quantized = calibrate(quantize(trained), 100 * digits[0][:64])
    broken = accuracy(quantized(digits[2]), digits[3])
    assert broken < trained[1] - 0.3
    train(quantized, digits[0], digits[1], epochs=12, rate=0.02, quant_loss=0.1)
    repaired = accuracy(quantized(digits[2]), digits[3])
    assert repaired > trained[1] - 0.03
    assert deployed_accuracy(quantized, trained, digits, tmp_path) > trained[1] - 0.03
    gains = [layer.quantizer.input_gain.value for layer in quantized.quantized_layers.values()]
    assert min(gains) < -0.1  # the ranges that were far too wide have shrunk


def test_training_quantized_without_calibration(digits, tmp_path):
    x, labels, test_x, test_labels = digits
    config = write_config(build(), tmp_path / "config.json", "image:1,1,8,8")
    quantized = dopt_api.optimize(build(), config)
    train(quantized, x, labels, epochs=8, rate=0.05)
    assert accuracy(quantized(test_x), test_labels) > 0.95
    assert deployed_accuracy(quantized, (None, None, config), digits, tmp_path) > 0.95
