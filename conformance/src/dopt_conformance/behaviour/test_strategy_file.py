"""The strategy file: what it lists, and what is said of one that does not fit."""

import json

import pytest

import dopt_api
from dopt_api.errors import ConfigError, DoptError, StrategyError
from dopt_conformance.way import HEADER

pytestmark = pytest.mark.since("1.0")


def layers_of(file):
    return json.loads(file.read_text(encoding="utf-8"))["layer_strategy"]


def names_in(text):
    """Return the layers' names as the text has them, repetitions included."""
    pairs = json.loads(text, object_pairs_hook=list)
    (layers,) = (value for key, value in pairs if key == "layer_strategy")
    return [name for name, _ in layers]


def test_every_layer_is_listed_once_in_the_order_it_runs(harness, way, name):
    text = way.float_config(name).read_text(encoding="utf-8")
    assert names_in(text) == list(harness.float_layers(name))


def test_every_layer_is_float_until_the_user_says_otherwise(way, name):
    assert {entry["quant_strategy"] for entry in layers_of(way.float_config(name)).values()} == {"float"}


def test_every_kind_of_layer_has_its_strategies(way, name):
    content = json.loads(way.float_config(name).read_text(encoding="utf-8"))
    for entry in content["layer_strategy"].values():
        strategies = content[HEADER.format(entry["op_type"])]
        assert strategies
        assert "float" not in strategies


def test_equal_models_give_equal_files(way, name):
    first, second = way.float_config(name), way.float_config(name)
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_quantized_is_not_listed(harness, way, name):
    assert not set(harness.not_quantizable(name)) & set(layers_of(way.float_config(name)))


def test_a_generated_file_fits_its_model(way, name):
    way.quantized(name, way.float_config(name))


def test_a_file_is_not_half_written(harness, main, tmp_path):
    missing = tmp_path / "nowhere" / "config.json"
    with pytest.raises(DoptError, match="nowhere"):
        dopt_api.generate_config(harness.build(main), harness.input_shape(main), missing, backend=harness.backend)
    assert not missing.parent.exists()


def rename(content):
    layers = content["layer_strategy"]
    first = next(iter(layers))
    layers["no such layer"] = layers.pop(first)


def forget(content):
    content["layer_strategy"].popitem()


def other_kind(content):
    next(iter(content["layer_strategy"].values()))["op_type"] = "Unheard"


def unknown_strategy(content):
    next(iter(content["layer_strategy"].values()))["quant_strategy"] = "Quant_INT99-99"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (rename, ConfigError, "no such layer"),
        (forget, ConfigError, "layer"),
        (other_kind, ConfigError, "Unheard"),
        (unknown_strategy, StrategyError, "Quant_INT99-99"),
    ],
    ids=["layer that is not there", "layer that is left out", "other kind", "unknown strategy"],
)
def test_a_file_that_does_not_fit_is_refused_by_name(way, main, change, error, message):
    config = way.edit(way.config(main), change)
    with pytest.raises(error, match=message) as caught:
        way.quantized(main, config)
    assert str(config) in str(caught.value)


def test_a_file_that_is_no_json_is_refused_with_its_line(way, main):
    config = way.config(main)
    config.write_text(config.read_text(encoding="utf-8").replace(",\n", "\n", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="line"):
        way.quantized(main, config)
