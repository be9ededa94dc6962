"""The format ``safetensors``, read back by the library of that name."""

import sys

import numpy as np
import onnx
import pytest
from quantized_chain import network
from safetensors import safe_open

from dopt_api.errors import FormatError, ParamsError
from dopt_api.formats import convert
from dopt_api.params import read_params


def test_integers_times_scales_are_the_weights_and_biases_of_the_graph(tmp_path):
    network(tmp_path, ["Quant_INT8-8", "Quant_INT4-4", "Quant_INT16-8"])
    (file,) = convert(tmp_path / "quant_params.json", "safetensors", tmp_path)
    assert file.name == "model.safetensors"
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    floats = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    with safe_open(str(file), "numpy") as content:
        tensors, metadata = {name: content.get_tensor(name) for name in content.keys()}, content.metadata()  # noqa: SIM118  # no mapping
    for layer in read_params(tmp_path / "quant_params.json").layers:
        weight = tensors[layer.weight.tensor]
        assert weight.dtype == np.int8
        scale = tensors[f"{layer.weight.tensor}.scale"]
        assert np.array_equal(weight * scale[:, None, None, None], floats[layer.weight.tensor])
        bias = tensors[layer.bias.tensor]
        assert bias.dtype == np.int32
        assert np.allclose(bias * tensors[f"{layer.bias.tensor}.scale"], floats[layer.bias.tensor], rtol=1e-6)
        assert tensors[f"{layer.name}.input.scale"] == np.float32(layer.input.scale[0])
        assert tensors[f"{layer.name}.input.zero_point"] == layer.input.zero_point[0]
        assert metadata[f"{layer.weight.tensor}.bits"] == str(layer.weight.bits)
        assert metadata[f"{layer.weight.tensor}.axis"] == "0"
        assert metadata[f"{layer.name}.input.dtype"] == layer.input.dtype


def test_weights_of_another_model_are_refused(tmp_path):
    network(tmp_path)
    text = (tmp_path / "quant_params.json").read_text()
    network(tmp_path, seed=1)
    (tmp_path / "quant_params.json").write_text(text)
    with pytest.raises(ParamsError, match="not on the layer's grid"):
        convert(tmp_path / "quant_params.json", "safetensors", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    network(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.delitem(sys.modules, "dopt_api.formats.integers", raising=False)
    with pytest.raises(FormatError, match=r"dopt-api\[safetensors\]"):
        convert(tmp_path / "quant_params.json", "safetensors", tmp_path)
