"""Recorded outputs of layers: calibrated, simulated, kept in checkpoints, learned and exported."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import dopt_api
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.params import read_params


class Network(nn.Module):
    """A residual block: rectified and plain outputs, with and without a batch normalization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = nn.functional.relu6(self.norm(self.stem(x)))
        return self.head((x + self.body(x)).mean((2, 3)))


RECORDED = ("stem/Conv2D", "body/Conv2D", "head/Linear")


def configured(tmp_path, model=None, outputs=RECORDED):
    file = dopt_api.generate_config(model or Network().eval(), "x:1,3,6,6", tmp_path / "config.json")
    content = json.loads(file.read_text())
    for name, entry in content["layer_strategy"].items():
        entry["quant_strategy"] = "Quant_INT8-8"
        if name in outputs:
            entry["output"] = True
    file.write_text(json.dumps(content))
    return file


def data(seed=1):
    return 2 * torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def calibrated(file, model=None):
    quant_model = dopt_api.optimize(model or Network().eval(), file)
    dopt_api.set_calibrate_state(quant_model, True)
    with torch.no_grad():
        quant_model(data())
    dopt_api.set_calibrate_state(quant_model, False)
    return quant_model


def exported(file, quant_model, tmp_path, model=None):
    torch.save(quant_model.state_dict(), tmp_path / "quant.pth")
    result = dopt_api.export(model or Network().eval(), file, tmp_path / "quant.pth", tmp_path)
    return {layer.name: layer for layer in read_params(result.params).layers}


def test_the_range_is_that_of_the_tensor_behind_norm_and_rectifier(tmp_path):
    file = configured(tmp_path)
    layers = exported(file, calibrated(file), tmp_path)
    model = Network().eval()
    with torch.no_grad():
        x = model.norm(model.stem(data())).clamp(0, 6)
        body = model.body(x)
        for name, values in (("stem/Conv2D", x), ("body/Conv2D", body)):
            low, high = min(float(values.min()), 0.0), float(values.max())
            output = layers[name].output
            assert np.float32(output.scale[0]) == np.float32((high - low) / 255)
            assert output.zero_point == (round(-low / output.scale[0]),)
    assert layers["stem/Conv2D"].output.zero_point == (0,)
    assert [layers[name].output.tensor for name in RECORDED] == ["/stem/output", "/body/output", "output"]


def test_outputs_are_simulated(tmp_path):
    quant_model = calibrated(configured(tmp_path))
    seen = {}
    hook = quant_model.body.register_forward_hook(lambda _m, _i, made: seen.update(body=made))
    with torch.no_grad():
        logits = quant_model(data(2))
    hook.remove()
    for values, output in ((logits, quant_model.head.dopt_output), (seen["body"], quant_model.body.dopt_output)):
        steps = values / output.scale
        assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert len(steps.round().unique()) <= 256


def test_nothing_changes_where_no_output_is_recorded(tmp_path):
    quant_model = calibrated(configured(tmp_path, outputs=()))
    assert not [key for key in quant_model.state_dict() if "dopt_output" in key]
    text = exported(tmp_path / "config.json", quant_model, tmp_path)
    assert all(layer.output is None for layer in text.values())


def test_copies_and_checkpoints_keep_the_outputs(tmp_path):
    file = configured(tmp_path)
    quant_model = calibrated(file)
    with torch.no_grad():
        wanted = quant_model(data(2))
        for other in (copy.deepcopy(quant_model), pickle.loads(pickle.dumps(quant_model))):  # our own
            assert torch.equal(other(data(2)), wanted)
        loaded = dopt_api.optimize(Network().eval(), file)
        loaded.load_state_dict(Network().state_dict(), strict=False)
        loaded.load_state_dict(quant_model.state_dict())
        assert torch.equal(loaded(data(2)), wanted)
        replaced, norm = copy.deepcopy(quant_model), nn.BatchNorm2d(4).eval()  # as convert_sync_batchnorm does
        norm.load_state_dict(replaced.norm.state_dict())
        replaced.norm = norm
        assert torch.equal(replaced(data(2)), wanted)


def test_a_float_checkpoint_loads_strictly(tmp_path):
    quant_model = dopt_api.optimize(Network().eval(), configured(tmp_path))
    quant_model.load_state_dict(Network().state_dict(), strict=True)


def test_training_decides_and_learns_the_scale_of_the_output(tmp_path):
    file = configured(tmp_path)
    quant_model = dopt_api.optimize(Network(), file).train()
    quant_model(data()).square().sum().backward()
    for layer in (quant_model.stem, quant_model.body, quant_model.head):
        assert bool(layer.dopt_output.ready)
        assert layer.dopt_output.gain.grad is not None
        assert float(layer.dopt_output.gain.grad.abs()) > 0
    with torch.no_grad():
        quant_model.body.dopt_output.gain.fill_(0.5)
    before = float(quant_model.body.dopt_output.scale)
    layers = exported(file, quant_model, tmp_path)
    assert layers["body/Conv2D"].output.scale[0] > before


def test_an_output_that_was_never_calibrated_is_refused(tmp_path):
    file = configured(tmp_path, outputs=())
    quant_model = calibrated(file)
    torch.save(quant_model.state_dict(), tmp_path / "quant.pth")
    file = configured(tmp_path, outputs=("body/Conv2D",))
    with pytest.raises(CalibrationError, match="body/Conv2D"):
        dopt_api.export(Network().eval(), file, tmp_path / "quant.pth", tmp_path)


def test_data_that_is_not_finite_is_refused_by_name(tmp_path):
    model = Network().eval()
    model.body.bias.data[0] = float("nan")
    with pytest.raises(CalibrationError, match="The output of layer 'body/Conv2D' had NaN"):
        calibrated(configured(tmp_path, model), model)


class Rectified(nn.Conv2d):
    """A layer whose forward does more than its function."""

    def forward(self, x):
        return super().forward(x).relu()


def test_a_layer_that_computes_more_is_refused(tmp_path):
    model = nn.Sequential(Rectified(3, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    file = configured(tmp_path, model, outputs=("0/Conv2D",))
    with pytest.raises(ModelError, match="output of layer '0/Conv2D' cannot be recorded: its forward does more"):
        dopt_api.optimize(model, file)


@pytest.mark.parametrize(
    ("after", "ends"),
    [
        (nn.ReLU(), (0.0, float("inf"))),
        (nn.ReLU(inplace=True), (0.0, float("inf"))),
        (nn.ReLU6(inplace=True), (0.0, 6.0)),
        (nn.Hardtanh(0.0, 4.0), (0.0, 4.0)),
        (nn.Hardtanh(-1.0, 4.0), None),
        (nn.Sigmoid(), None),
    ],
)
def test_rectifiers_are_found(after, ends):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), after, nn.Conv2d(4, 4, 1)).eval()
    backend = dopt_api.manager.load("torch")
    found = backend.find_layers(model, "x:1,3,6,6").structure.rectifiers
    assert found == ({} if ends is None else {"0": ends})


def test_a_rectifier_beside_another_reader_is_none():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return y.relu() + y

    assert dopt_api.manager.load("torch").find_layers(Two().eval(), "x:1,3,6,6").structure.rectifiers == {}
