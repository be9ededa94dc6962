"""Every strategy that a model's layers list goes the whole way; file, graph and simulation have its grids."""

import numpy as np
import pytest

from dopt_api.params import quantize_layer
from dopt_api.strategy import STRATEGIES
from dopt_conformance.way import HEADER, sqnr

pytestmark = pytest.mark.since("1.0")


@pytest.fixture
def deployments(way, main):
    """The model deployed by each of the strategies that all its layers can have, with the strategy."""
    content = way.read(way.float_config(main))
    lists = [content[HEADER.format(entry["op_type"])] for entry in content["layer_strategy"].values()]
    shared = [
        strategy
        for name, strategy in STRATEGIES.items()
        if strategy.activation is not None and all(name in one for one in lists)
    ]
    return [(way.deploy(main, strategy.name), strategy) for strategy in shared]


def test_every_strategy_goes_the_whole_way(harness, way, main, deployments):
    floats = harness.float_layers(main)
    assert deployments
    for deployed, strategy in deployments:
        activation, weight = strategy.activation, strategy.weight
        for layer, plan in way.plans(main, strategy=strategy.name).items():
            entry = deployed.layers[layer]
            assert entry.strategy == strategy.name
            assert (entry.input.bits, entry.input.dtype) == (activation.bits, activation.dtype)
            assert (entry.weight.bits, entry.weight.dtype) == (weight.bits, weight.dtype)
            wanted = quantize_layer(floats[layer], plan, np.float32(entry.input.scale[0]), entry.input.zero_point[0])
            np.testing.assert_array_equal(np.float32(entry.weight.scale), wanted.weight_scale, err_msg=layer)
        found = deployed.outputs()  # weights on their grid, activations float
        assert sqnr(deployed.exact, found) > 6 * weight.bits - 22, strategy.name
        bits = min(weight.bits, activation.bits)
        assert sqnr(deployed.exact, deployed.simulated) > 6 * bits - 28, strategy.name
        if activation.bits == 16:  # the graph then differs only where rounded weights carry an activation out of range
            assert sqnr(deployed.simulated, found) > 40, strategy.name
