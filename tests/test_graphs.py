"""Ways to ONNX that other distributions bring: found by the model's suffix, and what is missing is said."""

import shutil

import pytest
from quantized_chain import network

from dopt_api.errors import ExtensionError, FormatError
from dopt_api.formats import convert
from dopt_api.graphs import as_onnx, read_export

CODE = """
import shutil
from dataclasses import replace
def to_onnx(model, params, file):
    shutil.copy(model, file)
    return replace(params, model=file.name, layers=params.layers[:1])
"""


@pytest.fixture
def export(tmp_path, monkeypatch):
    """Install ways from some kinds of model, and return a function that exports a model of a kind."""
    site = tmp_path / "site"
    info = site / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    monkeypatch.syspath_prepend(site)
    (site / "graphs_mine.py").write_text(CODE)
    (site / "graphs_without.py").write_text("import tf2onnx_gone")
    (site / "graphs_needy.py").write_text("raise ModuleNotFoundError('gone', name='tf2onnx')")
    (site / "graphs_broken.py").write_text("1 / 0")
    ways = "".join(f"{name} = graphs_{name}:to_onnx\n" for name in ("mine", "without", "needy", "broken"))
    (info / "entry_points.txt").write_text(f"[dopt.graphs]\n{ways}")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")

    def make(suffix):
        network(tmp_path)
        file = tmp_path / "quant_params.json"
        file.write_text(file.read_text().replace("model.onnx", f"model.{suffix}"))
        (tmp_path / "model.onnx").rename(tmp_path / f"model.{suffix}")
        return file

    return make


def test_a_graph_is_converted_by_who_knows_its_suffix(export, tmp_path):
    (tmp_path / "made").mkdir()
    model, params = as_onnx(*read_export(export("mine")), tmp_path / "made")
    assert (model, params.model, len(params.layers)) == (tmp_path / "made" / "model.onnx", "model.onnx", 1)
    assert as_onnx(model, params, tmp_path) == (model, params)
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "made").mkdir()
    made = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path / "made")
    assert [file.name for file in made] == ["model.qdq.onnx"]


@pytest.mark.parametrize(
    ("suffix", "error", "message"),
    [
        ("without", FormatError, "needs the package 'tf2onnx_gone'.*pip install tf2onnx_gone"),
        ("needy", FormatError, r"needs the package 'tf2onnx'.*pip install 'dopt-tf\[onnx\]'"),
        ("broken", ExtensionError, "mine 1.0"),
        ("unknown", FormatError, r"no way from 'model\.unknown' to ONNX.*dopt-tf\[onnx\]"),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_written(export, tmp_path, suffix, error, message):
    file = export(suffix)
    (tmp_path / "made").mkdir()
    with pytest.raises(error, match=message):
        convert(file, "onnx_qdq", tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())
