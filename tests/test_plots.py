"""Pictures: what they show, and what is refused."""

import math
import re
import sys

import matplotlib as mpl
import pytest

from dopt_api import plots
from dopt_api.errors import OutputError, PlotError
from dopt_api.plots import plot_sensitivity, plot_trade_off, plot_verification
from dopt_api.search import Choice, Point
from dopt_api.verify import LayerCheck, Verification

POINTS = [Point({"a": "x"}, 0.1, 100.0), Point({"a": "y"}, 0.01, 200.0), Point({"a": "float"}, 0.0, 800.0)]
CHOICES = [
    Choice("first/Conv2D", "Quant_INT8-8", 1e-4, 8.0),
    Choice("first/Conv2D", "Quant_INT8-4", 1e-2, 4.0),
    Choice("second/Linear", "Quant_INT8-8", 1e-3, 8.0),
    Choice("second/Linear", "float", 0.0, 32.0),
]


@pytest.fixture(autouse=True)
def _text_in_svg():
    with mpl.rc_context({"svg.fonttype": "none"}):
        yield


def test_a_trade_off_has_its_points_in_db(tmp_path, monkeypatch):
    drawn = []
    real = plots._write
    monkeypatch.setattr(plots, "_write", lambda figure, file: (drawn.append(figure), real(figure, file))[1])
    file = plot_trade_off(POINTS, tmp_path / "points.svg", measured={100.0: 9.5}, cost="bits")
    (axis,) = drawn[0].axes
    predicted, measured = axis.lines
    assert predicted.get_xydata().tolist() == [[100.0, 10.0], [200.0, 20.0]]
    assert measured.get_xydata().tolist() == [[100.0, 9.5]]
    text = file.read_text()
    for word in ("bits", "predicted", "measured", "SQNR"):
        assert word in text


def test_sensitivity_has_the_most_damaged_layer_first(tmp_path):
    text = plot_sensitivity(CHOICES, tmp_path / "layers.svg").read_text()
    assert "Quant_INT8-4" in text
    places = {
        name: float(
            re.search(rf'y="([\d.]+)"[^>]*>{name}|translate\([\d.]+ ([\d.]+)\)[^>]*>{name}', text).group(1) or 0
        )
        for name in ("first/Conv2D", "second/Linear")
    }
    assert places["first/Conv2D"] < places["second/Linear"]
    few = plot_sensitivity(CHOICES, tmp_path / "few.svg", most=1).read_text()
    assert "second/Linear" not in few
    assert plot_sensitivity(CHOICES, tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_a_verification_has_its_layers_in_execution_order(tmp_path, monkeypatch):
    drawn = []
    real = plots._write
    monkeypatch.setattr(plots, "_write", lambda figure, file: (drawn.append(figure), real(figure, file))[1])
    layers = (
        LayerCheck("first/Conv2D", 30.0, 0.99, 0.0, 0.25),
        LayerCheck("same/Conv2D", math.inf, 1.0, 0.0, 0.0),
        LayerCheck("last/Linear", 20.0, 0.98, 0.0, 1.0),
    )
    found = Verification(layers, 20.0, 0.98, 8.5, 8.6, {"QLinearConv": 3})
    text = plot_verification(found, tmp_path / "layers.svg").read_text()
    ratio, overflow = drawn[0].axes
    assert ratio.lines[0].get_xydata().tolist() == [[30.0, 0.0], [20.0, 2.0]]  # without the one that is exact
    assert [bar.get_width() for bar in overflow.patches] == [25.0, 0.0, 100.0]
    for word in ("first/Conv2D", "same/Conv2D", "outputs, optimized: 8.5 dB"):
        assert word in text
    with pytest.raises(PlotError, match="no quantized layer"):
        plot_verification(Verification((), 20.0, 0.98, 8.5, 8.6, {}), tmp_path / "none.svg")


def test_what_cannot_be_drawn_or_written(tmp_path, monkeypatch):
    with pytest.raises(PlotError, match="no point with damage"):
        plot_trade_off(POINTS[2:], tmp_path / "a.png")
    with pytest.raises(PlotError, match="no damage to draw"):
        plot_sensitivity(CHOICES[3:], tmp_path / "a.png")
    with pytest.raises(PlotError, match=r"cannot be written as .\.bmpx.") as caught:
        plot_trade_off(POINTS, tmp_path / "a.bmpx")
    assert ".png" in caught.value.expected
    with pytest.raises(OutputError, match="does not exist"):
        plot_trade_off(POINTS, tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match=r"dopt-api\[plots\]"):
        plot_trade_off(POINTS, tmp_path / "a.png")
