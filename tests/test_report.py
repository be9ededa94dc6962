"""The page about an export: what it says, that nothing in it is taken for markup, and what is refused."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from quantized_chain import network

from dopt_api import search
from dopt_api.cli.group import dopt
from dopt_api.errors import ParamsError
from dopt_api.params import read_params
from dopt_api.report import details, drawing, write_report
from dopt_api.report.notes import QUANTIZATION, TUNING, write_tuning
from dopt_api.verify import verify

NOTES = {
    "config": {"name": "config.json", "sha256": "0123"},
    "versions": {"dopt-api": "9.8.7"},
    "layers": [
        {"name": "layer0", "nearest": 0.01, "rounded": 0.001, "reason": ""},
        {"name": "layer1", "nearest": 0.0, "rounded": 0.0, "reason": "no time was left for it"},
    ],
    "inputs": {"layer1": {"low": -1.0, "width": 0.25, "counts": [3, 0, 9, 1]}},
    "float": ["head/Linear"],
    "not_quantizable": [{"name": "<lstm>", "op_type": "LSTM", "reason": "weights & <b>states</b>"}],
}


class Page(HTMLParser):
    """The texts of a page, the rows of its tables, and whatever it would load."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.loads, self.tags, self.lines = [], [], [], []
        self.cell = self.script = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.loads += [value for name, value in attrs if name in ("src", "href") and value[:5] != "data:"]
        if tag == "tr":
            self.rows.append([])
        if tag == "li":
            self.lines.append((given.get("class"), []))
        self.script = tag == "script" and given.get("id") == "details"
        self.cell = [] if tag in ("td", "th") else self.cell

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)
        if self.lines and data.strip():
            self.lines[-1][1].append(data.strip())
        if self.script:
            self.details, self.script = json.loads(data), False

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append("".join(self.cell))
            self.cell = None


def call(*arguments):
    return CliRunner().invoke(dopt, ["report", *map(str, arguments)])


@pytest.fixture
def export(tmp_path):
    network(tmp_path, ["Quant_INT8-8", "Quant_INT8-4"])
    return tmp_path


def rows_of(page):
    return {row[0]: dict(zip(page.rows[0], row, strict=True)) for row in page.rows[1:3]}


def test_the_page_has_the_export_without_data(export):
    file = write_report(export)
    text = file.read_text()
    page = Page(text)
    assert file == export / "report.html"
    assert {one[0] for one in page.loads} == {"#"}
    rows = rows_of(page)
    params = json.loads((export / "quant_params.json").read_text())["layers"]
    for layer in params:
        row, given = rows[layer["name"]], layer["input"]
        ends = [(end - given["zero_point"][0]) * given["scale"][0] for end in (0, 255)]
        assert [float(row[name]) for name in ("from", "to")] == pytest.approx(ends, rel=1e-3)
        assert row["strategy"] == layer["strategy"]
        assert row["SQNR"] == row["nearest"] == ""
    assert [row["weights"] for row in rows.values()] == ["108", "144"]
    weights = [one["weights"] for one in page.details]
    assert [sum(one["counts"]) for one in weights] == [108, 144]
    assert [one["levels"] for one in weights] == [[-128, 127], [-8, 7]]
    assert len(weights[0]["counts"]) <= details.BINS
    assert [one["inputs"] for one in page.details] == [None, None]
    size = (108 + 144 / 2) / 1e6
    assert f"252, {size * 1e3:.1f} kB in place of {252 * 4 / 1e3:.1f} kB" in text
    assert write_report(export, export / "again.html").read_text() == text


def test_what_quantizing_noted_and_verifying_found_is_there(export):
    (export / QUANTIZATION).write_text(json.dumps(NOTES))
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)
    np.savez(export / "x.npz", x0=x)
    options = ("--data", export / "x.npz", "--output", export / "page.html", "--fact", "top-1=75 %", "--json")
    result = call(export, *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {"files": [str(export / "page.html")]}
    text = (export / "page.html").read_text()
    page, found = Page(text), verify(export / "quant_params.json", [{"x0": x}])
    rows = rows_of(page)
    for check in found.layers:
        assert float(rows[check.name]["SQNR"]) == pytest.approx(check.sqnr_db, rel=1e-3)
        assert rows[check.name]["overflow"] == f"{check.hazard:.1%}"
    given = {name: (row["nearest"], row["rounded"]) for name, row in rows.items()}
    assert given == {"layer0": ("20", "30"), "layer1": ("", "")}
    assert [one["reason"] for one in page.details] == ["", "no time was left for it"]
    seen, noted = (one["inputs"] for one in page.details)  # by verify, and by dopt quantize
    assert (sum(seen["counts"]), sum(noted["counts"])) == (x.size, 13)
    layer = read_params(export / "quant_params.json").layers[1]
    assert noted["step"] == layer.input.scale[0]
    assert noted["levels"] == [-layer.input.zero_point[0], 255 - layer.input.zero_point[0]]
    assert noted["range"] == pytest.approx([level * noted["step"] for level in noted["levels"]])
    assert page.rows[-1] == ["<lstm>", "LSTM", "weights & <b>states</b>"]
    assert not {"lstm"} & set(page.tags)
    assert "svg" in page.tags
    for word in ("9.8.7", "sha256 0123", "head/Linear", f"{found.sqnr_db:.2f} dB", "<dt>top-1</dt><dd>75 %</dd>"):
        assert word in text


def test_a_tuning_is_drawn_and_said_to_be_old_where_the_file_was_edited(export):
    choices = [search.Choice("layer0", f"Quant_INT8-{bits}", 0.1 / bits, bits) for bits in (4, 8)]
    config = export / "config.json"
    config.write_text("{}")
    points = search.trade_off(choices, [4.0, 8.0])
    file = write_tuning(export / "mixed.tuning.json", config, choices, points, 8.0, "size")
    assert "Trade-off" not in write_report(export).read_text()
    assert call(export, "--tuning", file).exit_code == 0
    text = (export / "report.html").read_text()
    assert text.count("<figure><figcaption>") == 2
    assert "Quant_INT8-4" in text
    assert "edited afterwards" not in text
    file.rename(export / TUNING)
    (export / QUANTIZATION).write_text(json.dumps(NOTES))
    assert "edited afterwards" in write_report(export).read_text()
    (export / TUNING).write_text('{"choices": [{}]}')
    with pytest.raises(ParamsError, match=r"tuning\.json' cannot be understood.*run dopt tune again"):
        write_report(export)


def node(kind, name, inputs, output):
    return helper.make_node(kind, inputs, [output], name=name)


def test_the_drawing_says_what_is_quantized_and_what_goes_around(tmp_path):
    nodes = [
        node("Conv", "/a/Conv", ["x", "w"], "a"),
        node("Relu", "/r/Relu", ["a"], "b"),
        node("Shape", "/s", ["b"], "shape"),
        node("Conv", "/block.0/b/Conv", ["b", "w"], "c"),
        node("Gemm", "/block.0/c/Gemm", ["c", "w"], "d"),
        node("MatMul", "/m", ["d", "d"], "e"),
        node("Add", "/add", ["e", "b"], "f"),
        node("Reshape", "/reshape", ["f", "shape"], "g"),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    graph = helper.make_graph(nodes, "g", [value], [helper.make_tensor_value_info("g", 1, [1])], [weight])
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    layer = SimpleNamespace(name="a/Conv2D", node="/a/Conv", strategy="Quant_INT8-8", other_calls=())
    about = {"float": ["block.0.b/Conv2D"], "not_quantizable": [{"name": "block.0.c/Linear", "reason": "odd"}]}
    found = drawing.draw(tmp_path / "model.onnx", SimpleNamespace(layers=(layer,)), about)
    assert [(line.state, line.kinds, line.place) for line in found.lines] == [
        ("plain", ["input"], 0),
        ("quantized", ["Conv", "Relu"], 1),
        ("kept", ["Conv"], 0),
        ("refused", ["Gemm"], 0),
        ("float", ["MatMul"], 0),
        ("plain", ["Add", "Reshape"], 0),
    ]
    assert found.joined == {0, 1, 2, 3, 4}
    assert found.arcs == [drawing.Arc(1, 5, 0)]
    assert (found.lines[3].about, found.lines[4].about) == ("odd", "of two activations")
    many = drawing.arcs([(0, 99 - number) for number in range(20)])
    assert max(arc.lane for arc in many) == drawing.LANES - 1


def test_a_model_without_integers_at_hand_has_a_page_too(export):
    content = json.loads((export / "quant_params.json").read_text())
    content["model"] = "model.pb"
    content["layers"][0]["name"] = "</script><i>"
    content["layers"][0]["op_type"] = "<class 'torch.nn.modules.conv.Conv2d'>"
    (export / "quant_params.json").write_text(json.dumps(content))
    page = Page(write_report(export).read_text())
    assert page.rows[1][:2] == ["</script><i>", "Conv2d"]
    assert page.details[0] == {"reason": "", "weights": None, "inputs": None}
    assert [state for state, _ in page.lines] == ["quantized", "quantized"]
    assert page.lines[0][1][0] == "</script><i>"


def test_what_cannot_be_read_is_refused_and_nothing_written(export):
    (export / QUANTIZATION).write_text('{"layers": [{}]}')
    with pytest.raises(ParamsError, match=re.escape("quantization.json' cannot be understood")):
        write_report(export)
    (export / QUANTIZATION).unlink()
    (export / "x.npz").write_bytes(b"no zip")
    assert "cannot be read as .npz" in call(export, "--data", export / "x.npz").output
    assert "'top-1' is no NAME=VALUE" in call(export, "--fact", "top-1").output
    (export / "quant_params.json").unlink()
    result = call(export)
    assert (result.exit_code, "cannot be read" in result.output) == (1, True)
    assert not list(export.glob("*.html"))
