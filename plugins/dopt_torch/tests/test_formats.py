"""An exported network as ONNX with integers: ONNX Runtime gives what the simulation gives."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from padded_network import Net, batches

import dopt_api
from dopt.dopt_torch.opt_main import generate_final_model
from dopt_api.errors import FormatError
from dopt_api.formats import convert


def run(file, x, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("strategy", ["Quant_INT8-8", "Quant_INT8-7", "Quant_INT8-4", "Quant_INT16-8"])
def test_onnx_runtime_gives_what_the_simulation_gives(make, tmp_path, strategy):
    model = make(strategy=strategy).eval()
    torch.save(model.state_dict(), tmp_path / "quant.pth")
    result = generate_final_model(
        Net().eval(), str(tmp_path / "config.json"), str(tmp_path / "quant.pth"), str(tmp_path), dynamic_batch=True
    )
    (file,) = convert(result.params, "onnx_qdq", tmp_path)
    initializers = onnx.load(str(file)).graph.initializer
    assert sum(tensor.data_type == TensorProto.INT8 for tensor in initializers if "integers" in tensor.name) == 4
    x = torch.cat(batches(seed=9))
    with torch.no_grad():
        wanted = model(x).numpy()
    found = run(file, x.numpy(), "ORT_DISABLE_ALL")
    assert 10 * math.log10(np.square(wanted).sum() / np.square(found - wanted).sum()) > 45
    assert np.isfinite(run(file, x.numpy(), "ORT_ENABLE_ALL")).all()


def export(make, folder, strategy, formats):
    folder.mkdir()
    model = make(strategy=strategy)
    torch.save(model.state_dict(), folder.parent / "quant.pth")
    return dopt_api.export(
        Net().eval(), folder.parent / "config.json", folder.parent / "quant.pth", folder, formats=formats
    )


def test_an_export_writes_other_formats_at_once(make, tmp_path):
    result = export(make, tmp_path / "output", "Quant_INT8-8", ["onnx_qdq", "csv"])
    assert sorted(file.name for file in (tmp_path / "output").iterdir()) == [
        "model.onnx",
        "model.qdq.onnx",
        "quant_params.csv",
        "quant_params.json",
    ]
    assert result.model == tmp_path / "output" / "model.onnx"
    assert result.params == tmp_path / "output" / "quant_params.json"
    assert result.others == (tmp_path / "output" / "model.qdq.onnx", tmp_path / "output" / "quant_params.csv")
    assert all(file.is_file() for file in result.others)


def test_a_format_that_cannot_be_written_leaves_nothing_behind(make, tmp_path):
    with pytest.raises(FormatError, match="'onnx_qqd'"):
        export(make, tmp_path / "unknown", "Quant_INT8-8", ["onnx_qqd"])
    with pytest.raises(FormatError, match="no activations of 4 bits"):
        export(make, tmp_path / "narrow", "Quant_INT4-4", ["csv", "onnx_qdq"])
    assert not list((tmp_path / "unknown").iterdir())
    assert not list((tmp_path / "narrow").iterdir())
