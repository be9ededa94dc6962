"""Every operation is accounted for."""

import json

import numpy as np
import pytest
from networks import SHAPE, make_network

import dopt_api
from dopt_api.errors import ConfigError, ModelError
from dopt_numpy.find_layers import find_layers
from dopt_numpy.network import BatchNorm, Chain, Conv2D, Dense, Layer, Network, ReLU, Residual


class Twice(Layer):
    """A layer that the backend does not know, with one inside that it does."""

    def __init__(self):
        self.inner = Dense(4, 4)

    def children(self):
        return {"inner": self.inner}

    def forward(self, x, training=False):
        y, back = self.inner.forward(x, training)
        return 2 * y, lambda dy: back(2 * dy)


class MyDense(Dense):
    def multiply(self, x, weight):
        return super().multiply(x, weight * 2)


def names(found):
    return [layer.name for layer in found.layers]


def test_layers_stand_in_execution_order_and_the_rest_with_its_reason():
    found = find_layers(make_network(), SHAPE)
    assert names(found) == [
        "conv/Conv2D",
        "block.depthwise/Conv2D",
        "block.pointwise/Conv2D",
        "head.conv/Conv2D",
        "fc/Dense",
    ]
    assert [(layer.name, bool(layer.reason)) for layer in found.not_quantizable] == [("block.scale/Scale", True)]
    assert found.structure.norms == {"conv": "bn", "block.depthwise": "block.bn"}
    assert found.structure.output_shape == (1, 5)
    assert "'after'" in found.notes[0]
    assert "'bn'" not in found.notes[0]


def test_looking_changes_nothing():
    network = make_network()
    before = network.state()
    find_layers(network, SHAPE)
    assert all((network.state()[name] == array).all() for name, array in before.items())


def test_what_the_backend_cannot_look_into_is_refused_with_all_inside():
    found = find_layers(Network({"a": Dense(4, 4), "t": Twice(), "m": MyDense(4, 4)}), "x:1,4")
    assert names(found) == ["a/Dense"]
    assert {layer.name for layer in found.not_quantizable} == {"t/Twice", "t.inner/Dense", "m/MyDense"}
    assert all(layer.reason for layer in found.not_quantizable)


def test_a_layer_used_inside_the_unknown_is_refused_everywhere():
    twice = Twice()
    found = find_layers(Network({"a": twice.inner, "t": twice, "b": Dense(4, 4)}), "x:1,4")
    assert names(found) == ["b/Dense"]


@pytest.mark.parametrize(
    "layers",
    [
        lambda conv, norm: {"conv": conv, "relu": ReLU(), "norm": norm},
        lambda conv, norm: {"conv": conv, "norm": norm, "again": conv},
        lambda conv, norm: {"conv": conv, "norm": norm, "again": norm},
        lambda conv, norm: {"block": Residual({"conv": conv}), "norm": norm},
        lambda conv, norm: {"conv": conv, "block": Residual({"norm": norm})},
    ],
)
def test_a_normalization_is_folded_only_where_one_layer_alone_feeds_it(layers):
    network = Network(layers(Conv2D(2, 2, 1), BatchNorm(2)))
    found = find_layers(network, "x:1,2,4,4")
    assert found.structure.norms == {}
    assert "norm" in found.notes[0]


def test_a_layer_at_two_places_is_one_layer():
    conv = Conv2D(2, 2, 1)
    found = find_layers(Network({"a": conv, "inner": Chain({"b": conv})}), "x:1,2,4,4")
    assert names(found) == ["a/Conv2D"]


@pytest.mark.parametrize("shape", [None, "x:1,3,8,8;y:1,2", "x:1,3,8,8:int64", "x"])
def test_a_wrong_input_shape_is_told(shape):
    with pytest.raises(ConfigError):
        find_layers(make_network(), shape)


def test_a_network_that_does_not_run_on_its_shape_is_told():
    with pytest.raises(ModelError, match="Conv2D got"):
        find_layers(make_network(), "x:1,4,8,8")


def test_a_network_with_a_forward_of_its_own_is_refused():
    class Own(Network):
        def forward(self, x, training=False):
            return super().forward(np.abs(x), training)

    with pytest.raises(ModelError, match="forward"):
        find_layers(Own({"a": Dense(2, 2)}), "x:1,2")


def test_the_strategy_file_lists_all_of_it(tmp_path):
    path = dopt_api.generate_config(make_network(), SHAPE, tmp_path / "config.json")
    content = json.loads(path.read_text())
    assert set(content["layer_strategy"]) == set(names(find_layers(make_network(), SHAPE)))
    assert list(content["not_quantizable"]) == ["block.scale/Scale"]
