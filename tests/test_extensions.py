"""Strategies and range methods of other distributions: found by name, loaded when asked for, reported when broken."""

import json
import subprocess
import sys

import pytest

from dopt_api import config, extensions
from dopt_api.errors import ExtensionError, StrategyError
from dopt_api.quantizer import Grid, Statistics, activation_parameters
from dopt_api.quantizer.ranges import get_range_method, range_method_names
from dopt_api.strategy import STRATEGIES, get_strategy, strategy_names
from dopt_api.types import LayerInfo, ModelLayers

CODE = """
from dopt_api.quantizer import Grid
from dopt_api.strategy import Strategy
WEIGHT = Grid(6, signed=True, symmetric=True, narrow=True, per_channel=True)
six = Strategy("Quant_INT6-6", Grid(6), WEIGHT)
skewed = Strategy("skewed", Grid(8), Grid(8))
channels = Strategy("channels", Grid(8, per_channel=True), WEIGHT)
alone = Strategy("alone", None, Grid(5, per_channel=True, group=8))
def half(statistics, grid):
    return float(statistics.minimum) / 2, float(statistics.maximum) / 2
"""
ENTRIES = {
    extensions.STRATEGIES: {
        "Quant_INT6-6": "mine_ext:six",
        "other": "mine_ext:six",
        "nothing": "mine_ext:half",
        "skewed": "mine_ext:skewed",
        "channels": "mine_ext:channels",
        "alone": "mine_ext:alone",
        "gone": "mine_gone:six",
        "Quant_INT8-8": "mine_ext:six",
    },
    extensions.RANGES: {"half": "mine_ext:half", "number": "mine_ext:WEIGHT", "min_max": "mine_ext:half"},
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return a function that installs the extensions as a distribution."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    (site / "mine_ext.py").write_text(CODE)

    def install(distribution="mine"):
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [
            line
            for group, entries in ENTRIES.items()
            for line in (f"[{group}]", *(f"{name} = {where}" for name, where in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        return site

    yield install
    sys.modules.pop("mine_ext", None)


def layers():
    return ModelLayers((LayerInfo("fc/Linear", "Linear"),))


def test_without_extensions_there_are_the_toolkit_s_own():
    assert strategy_names() == tuple(STRATEGIES)
    assert strategy_names()[0] == "Quant_INT8-8"


def test_a_strategy_of_another_distribution_is_listed_checked_and_used(site, tmp_path):
    site()
    file = config.write(tmp_path / "config.json", layers(), None)
    content = json.loads(file.read_text())
    assert "Quant_INT6-6" in content["quant_strategy_for op 'Linear'"]
    content["layer_strategy"]["fc/Linear"].update(quant_strategy="Quant_INT6-6", range="half")
    file.write_text(json.dumps(content))
    plan = config.check(config.read(file), layers())
    assert plan.quantized["fc/Linear"].strategy.weight.bits == 6
    assert plan.quantized["fc/Linear"].range_method == "half"


def test_a_range_method_of_another_distribution_decides(site):
    site()
    statistics = Statistics()
    statistics.update([[0.0, 510.0]])
    assert activation_parameters(statistics, Grid(8), layer="fc", method="half") == (1.0, 0)


def test_names_are_listed_without_importing_anything(site):
    folder = site()
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "from dopt_api.strategy import strategy_names; names = strategy_names()\n"
        "assert 'Quant_INT6-6' in names and 'mine_ext' not in sys.modules, names\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_toolkit_s_own_are_not_replaced(site):
    site()
    assert get_strategy("Quant_INT8-8") is STRATEGIES["Quant_INT8-8"]
    assert strategy_names().count("Quant_INT8-8") == 1
    statistics = Statistics()
    statistics.update([[-1.0, 4.0]])
    assert get_range_method("min_max")(statistics, Grid(8)) == (-1.0, 4.0)
    assert range_method_names().count("min_max") == 1


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("other", "called 'Quant_INT6-6' by itself"),
        ("nothing", "not a Strategy"),
        ("skewed", "asymmetric or grouped weights beside"),
        ("channels", "activations per channel"),
        ("gone", "does not import: ModuleNotFoundError"),
    ],
)
def test_a_broken_strategy_is_named_with_its_distribution(site, name, what):
    site()
    with pytest.raises(ExtensionError, match=what) as caught:
        get_strategy(name)
    assert caught.value.where.startswith("mine 1.0, entry point 'mine_")
    assert caught.value.fix


def test_weights_alone_from_elsewhere_are_refused_where_a_layer_cannot_have_them(site, tmp_path):
    site()
    for able, row in ((False, 16), (True, 0), (True, 12), (True, 16)):
        found = ModelLayers((LayerInfo("fc/Linear", "Linear", weight_only=able, row=row),))
        file = config.write(tmp_path / "config.json", found)
        file.write_text(file.read_text().replace('"float"', '"alone"'))
        if row == 16 and able:
            assert config.check(config.read(file), found).quantized["fc/Linear"].strategy.weight.group == 8
        else:
            with pytest.raises(StrategyError, match=r"'alone', which (leaves|has|gives)"):
                config.check(config.read(file), found)


def test_a_broken_range_method_is_named(site):
    site()
    with pytest.raises(ExtensionError, match="'number' is Grid"):
        get_range_method("number")


def test_two_distributions_of_one_name_are_named(site):
    site("mine")
    site("yours")
    with pytest.raises(ExtensionError, match="two distributions") as caught:
        get_strategy("Quant_INT6-6")
    assert caught.value.where == "mine 1.0 and yours 1.0"
    assert "pip uninstall" in caught.value.fix


def test_what_nobody_brings_is_unknown(tmp_path):
    with pytest.raises(KeyError):
        get_strategy("Quant_INT6-6")
    file = config.write(tmp_path / "config.json", layers(), None)
    file.write_text(file.read_text().replace('"float"', '"Quant_INT6-6"'))
    with pytest.raises(StrategyError, match="does not exist"):
        config.check(config.read(file), layers())
