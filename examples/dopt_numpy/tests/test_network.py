"""The framework: gradients against differences, and its state."""

import numpy as np
import pytest
from networks import batch, differences, make_network

from dopt_numpy.network import (
    SGD,
    BatchNorm,
    Chain,
    Conv2D,
    Dense,
    Flatten,
    GlobalAveragePool,
    MaxPool2D,
    Network,
    Parameter,
    ReLU,
    Residual,
    Scale,
    cross_entropy,
)

RNG = np.random.default_rng(7)
LAYERS = {
    "conv": (Conv2D(4, 6, 3, padding=1, rng=RNG), (2, 4, 5, 6)),
    "strided": (Conv2D(4, 6, 3, stride=2, rng=RNG), (2, 4, 6, 7)),
    "grouped": (Conv2D(4, 6, 2, groups=2, padding=1, bias=False, rng=RNG), (2, 4, 4, 4)),
    "dense": (Dense(5, 3, rng=RNG), (4, 5)),
    "relu": (ReLU(), (3, 7)),
    "scale": (Scale(4), (2, 4, 3, 3)),
    "max_pool": (MaxPool2D(2), (2, 3, 5, 4)),
    "average": (GlobalAveragePool(), (2, 3, 4, 4)),
    "flatten": (Flatten(), (2, 3, 2, 2)),
    "norm": (BatchNorm(4), (5, 4, 3, 3)),
    "norm_of_rows": (BatchNorm(4), (6, 4)),
    "residual": (Residual({"a": Dense(4, 4, rng=RNG), "r": ReLU(), "b": Dense(4, 4, rng=RNG)}), (3, 4)),
}


def in_float64(layer):
    for inner in [layer, *layer.children().values()]:
        for parameter in inner.own_parameters().values():
            parameter.value = parameter.value.astype(np.float64)
            parameter.gradient = np.zeros_like(parameter.value)
    return layer


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_differences(name, training):
    layer, shape = LAYERS[name]
    layer = in_float64(layer)
    x = RNG.normal(0, 1, shape)
    y, pullback = layer.forward(x, training)
    dy = RNG.normal(0, 1, y.shape)

    def loss():
        return float((layer.forward(x, training)[0] * dy).sum())

    parameters = [p for inner in [layer, *layer.children().values()] for p in inner.own_parameters().values()]
    for parameter in parameters:
        parameter.gradient[...] = 0
    np.testing.assert_allclose(pullback(dy), differences(loss, x), rtol=1e-5, atol=1e-6)
    if isinstance(layer, BatchNorm) and not training:
        return  # the difference quotient of gamma is that of the passes, whose statistics do not move
    for parameter in parameters:
        np.testing.assert_allclose(parameter.gradient, differences(loss, parameter.value), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_loss_is_that_of_differences():
    logits, labels = RNG.normal(0, 2, (4, 3)), np.array([0, 2, 1, 1])
    _, gradient = cross_entropy(logits, labels)
    np.testing.assert_allclose(gradient, differences(lambda: cross_entropy(logits, labels)[0], logits), atol=1e-8)


def test_a_layer_at_two_places_adds_its_gradients():
    shared = in_float64(Dense(3, 3, rng=RNG))
    network = Network({"a": shared, "b": shared})
    x = RNG.normal(0, 1, (2, 3))
    y, pullback = network.forward(x, training=True)
    pullback(np.ones_like(y))
    wanted = differences(lambda: float(network(x).sum()), shared.weight.value)
    np.testing.assert_allclose(shared.weight.gradient, wanted, rtol=1e-5, atol=1e-7)
    assert list(network.state()) == ["a.weight", "a.bias"]


def test_running_statistics_approach_those_of_the_data():
    norm = BatchNorm(2)
    data = RNG.normal([1.0, -2.0], [0.5, 3.0], (4096, 2)).astype(np.float32)
    for _ in range(100):
        norm.forward(data, training=True)
    np.testing.assert_allclose(norm.mean, data.mean(0), atol=1e-3)
    np.testing.assert_allclose(norm.variance, data.var(0, ddof=1), rtol=1e-3)
    before = norm.mean.copy()
    norm.forward(data + 1)
    assert (norm.mean == before).all()


def test_a_state_moves_a_network_and_is_loaded_whole_or_not_at_all():
    one, other = make_network(0), make_network(1)
    assert not np.allclose(one(batch()), other(batch()))
    other.load_state(one.state())
    assert (one(batch()) == other(batch())).all()
    fresh = make_network(2)
    before = fresh.state()
    for damage in (
        {"fc.bias": np.zeros(3, np.float32)},
        {"fc.bias": np.zeros(5, complex)},
        {"nothing": np.zeros(1)},
    ):
        with pytest.raises(ValueError, match=next(iter(damage))):
            fresh.load_state({**one.state(), **damage})
        assert all((fresh.state()[name] == array).all() for name, array in before.items())
    with pytest.raises(ValueError, match="misses"):
        fresh.load_state({name: array for name, array in before.items() if name != "fc.bias"})


def test_sgd_takes_the_step_of_momentum():
    parameter = Parameter(np.array([1.0, 2.0], np.float32))
    optimizer = SGD([parameter], 0.1, momentum=0.5)
    for _ in range(2):
        parameter.accumulate(np.array([1.0, -1.0]))
        optimizer.step()
    np.testing.assert_allclose(parameter.value, [1 - 0.1 - 0.15, 2 + 0.1 + 0.15], rtol=1e-6)
    assert not parameter.gradient.any()


@pytest.mark.parametrize("layer", [Conv2D(3, 4, 3), Dense(3, 4)])
def test_a_wrong_shape_is_told(layer):
    with pytest.raises(ValueError, match="expected"):
        layer(np.zeros((2, 5), np.float32))


@pytest.mark.parametrize("name", ["", "a.b"])
def test_names_make_paths(name):
    with pytest.raises(ValueError, match="name"):
        Chain({name: ReLU()})
