"""The format ``aimet_encodings``: its entries, by the rules that AIMET's own loader checks."""

import json

import numpy as np
import pytest
from quantized_chain import edit, network

from dopt_api.errors import FormatError
from dopt_api.formats import convert, get_format
from dopt_api.params import read_params


def test_each_tensor_has_one_entry_with_the_numbers_of_the_parameter_file(tmp_path):
    network(tmp_path, ["Quant_INT8-8", "Quant_INT8-4", "Quant_INT16-8"])
    edit(tmp_path, lambda layer: layer.update(other_calls=[["conv9", "x9"]]))
    (file,) = convert(tmp_path / "quant_params.json", "aimet_encodings", tmp_path)
    assert file.name == "model.encodings"
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["version"] == "2.0.0"
    entries = {entry["name"]: entry for entry in content["encodings"]}
    assert list(entries) == ["x0", "x9", "w0", "x1", "w1", "x2", "w2"]
    assert {**entries["x9"], "name": "x0"} == entries["x0"]
    assert [entries[f"x{i}"]["output_dtype"] for i in range(3)] == ["uint8", "uint8", "uint16"]
    assert [entries[f"w{i}"]["output_dtype"] for i in range(3)] == ["int8", "int4", "int8"]
    for layer in read_params(tmp_path / "quant_params.json").layers:
        given, weight = entries[layer.input.tensor], entries[layer.weight.tensor]
        assert np.float32(given["y_scale"]) == np.float32(layer.input.scale[0])
        assert given["y_zero_point"] == layer.input.zero_point[0]
        assert "axis" not in given
        assert np.array_equal(np.float32(weight["y_scale"]), np.float32(layer.weight.scale))
        assert weight["axis"] == 0
        assert "y_zero_point" not in weight  # symmetric, as the layout has it


def test_one_tensor_with_two_grids_is_refused(tmp_path):
    network(tmp_path)
    edit(tmp_path, lambda layer: layer.update(other_calls=[["conv1", "x1"]]))
    with pytest.raises(FormatError, match=r"'x1' has two.*layer1"):
        convert(tmp_path / "quant_params.json", "aimet_encodings", tmp_path)
    assert not (tmp_path / "model.encodings").exists()


def test_a_graph_of_another_kind_is_refused(tmp_path):
    network(tmp_path)
    file = tmp_path / "quant_params.json"
    file.write_text(file.read_text().replace("model.onnx", "model.other"))
    (tmp_path / "model.onnx").rename(tmp_path / "model.other")
    with pytest.raises(FormatError, match=r"no way from 'model\.other' to ONNX"):
        convert(file, "aimet_encodings", tmp_path)
    with pytest.raises(FormatError, match="for ONNX graphs"):
        get_format("aimet_encodings")(tmp_path / "model.other", read_params(file), tmp_path)
