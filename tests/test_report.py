"""The page about an export: what it says, that nothing in it is taken for markup, and what is refused."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from quantized_chain import network

from dopt_api import report
from dopt_api.cli.group import dopt
from dopt_api.errors import ParamsError
from dopt_api.report import write_report
from dopt_api.verify import verify

NOTES = {
    "config": {"name": "config.json", "sha256": "0123"},
    "versions": {"dopt-api": "9.8.7"},
    "layers": [
        {"name": "layer0", "nearest": 0.01, "rounded": 0.001, "reason": ""},
        {"name": "layer1", "nearest": 0.0, "rounded": 0.0, "reason": "no time was left for it"},
    ],
    "float": ["head/Linear"],
    "not_quantizable": [{"name": "<lstm>", "op_type": "LSTM", "reason": "weights & <b>states</b>"}],
}


class Page(HTMLParser):
    """The texts of a page, the rows of its tables, and whatever it would load."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.loads, self.tags, self.attributes = [], [], [], []
        self.cell = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith(("data:", "#"))
        ]
        if tag == "tr":
            self.rows.append([])
            self.attributes.append(dict(attrs))
        self.cell = [] if tag in ("td", "th") else self.cell

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)

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
    assert (file, page.loads) == (export / "report.html", [])
    rows = rows_of(page)
    params = json.loads((export / "quant_params.json").read_text())["layers"]
    for layer in params:
        row, given = rows[layer["name"]], layer["input"]
        ends = [(end - given["zero_point"][0]) * given["scale"][0] for end in (0, 255)]
        assert [float(row[name]) for name in ("from", "to")] == pytest.approx(ends, rel=1e-3)
        assert row["strategy"] == layer["strategy"]
        assert row["SQNR"] == row["nearest"] == ""
    assert [row["weights"] for row in rows.values()] == ["108", "144"]
    bins = [json.loads(one["data-bins"]) for one in page.attributes[1:3]]
    assert [(sum(one), len(one)) for one in bins] == [(108, report.BINS), (144, 16)]
    size = (108 + 144 / 2) / 1e6
    assert f"252, {size:.2f} MB in place of {252 * 4 / 1e6:.2f} MB" in text


def test_what_quantizing_noted_and_verifying_found_is_there(export):
    (export / "quantization.json").write_text(json.dumps(NOTES))
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)
    np.savez(export / "x.npz", x0=x)
    result = call(export, "--data", export / "x.npz", "--output", export / "page.html")
    assert (result.exit_code, result.output) == (0, f"{export / 'page.html'}\n"), result.output
    text = (export / "page.html").read_text()
    page, found = Page(text), verify(export / "quant_params.json", [{"x0": x}])
    rows = rows_of(page)
    for check in found.layers:
        assert float(rows[check.name]["SQNR"]) == pytest.approx(check.sqnr_db, rel=1e-3)
        assert rows[check.name]["overflow"] == f"{check.hazard:.1%}"
    assert [(row["nearest"], row["rounded"]) for row in rows.values()] == [("20", "30"), ("", "")]
    assert page.attributes[2]["data-reason"] == "no time was left for it"
    assert page.rows[-1] == ["<lstm>", "LSTM", "weights & <b>states</b>"]
    assert not {"lstm", "b"} & set(page.tags)
    assert "svg" in page.tags
    for word in ("9.8.7", "sha256 0123", "head/Linear", f"{found.sqnr_db:.2f} dB"):
        assert word in text


def test_a_model_without_integers_at_hand_has_a_page_too(export):
    content = json.loads((export / "quant_params.json").read_text())
    content["model"] = "model.pb"
    content["layers"][0]["name"] = "</script><i>"
    content["layers"][0]["op_type"] = "<class 'torch.nn.modules.conv.Conv2d'>"
    (export / "quant_params.json").write_text(json.dumps(content))
    page = Page(write_report(export).read_text())
    assert page.rows[1][:2] == ["</script><i>", "Conv2d"]
    assert page.attributes[1]["data-bins"] == "[]"


def test_what_cannot_be_read_is_refused_and_nothing_written(export):
    (export / "quantization.json").write_text('{"layers": [{}]}')
    with pytest.raises(ParamsError, match=re.escape("quantization.json' cannot be understood")):
        write_report(export)
    (export / "quantization.json").unlink()
    (export / "x.npz").write_bytes(b"no zip")
    assert "cannot be read as .npz" in call(export, "--data", export / "x.npz").output
    (export / "quant_params.json").unlink()
    result = call(export)
    assert (result.exit_code, "cannot be read" in result.output) == (1, True)
    assert not list(export.glob("*.html"))
