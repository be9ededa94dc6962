"""Pictures: what they show, and what is refused."""

import re
import sys

import matplotlib as mpl
import pytest

from dopt_api import plots
from dopt_api.errors import OutputError, SearchError
from dopt_api.plots import plot_sensitivity, plot_trade_off
from dopt_api.search import Choice, Point

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


def test_what_cannot_be_drawn_or_written(tmp_path, monkeypatch):
    with pytest.raises(SearchError, match="no point with damage"):
        plot_trade_off(POINTS[2:], tmp_path / "a.png")
    with pytest.raises(SearchError, match="no damage to draw"):
        plot_sensitivity(CHOICES[3:], tmp_path / "a.png")
    with pytest.raises(SearchError, match=r"cannot be written as .\.bmpx.") as caught:
        plot_trade_off(POINTS, tmp_path / "a.bmpx")
    assert ".png" in caught.value.expected
    with pytest.raises(OutputError, match="does not exist"):
        plot_trade_off(POINTS, tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SearchError, match=r"dopt-api\[plots\]"):
        plot_trade_off(POINTS, tmp_path / "a.png")
