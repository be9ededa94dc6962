"""Rounding by what the outputs lose: nearer to float, exported as chosen, and nothing else changed."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from padded_network import Net, Padded, batches, sqnr
from torch import nn

from dopt.dopt_torch.opt_main import (
    generate_final_model,
)
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.params import read_params
from dopt_api.quantizer import rounding as core
from dopt_api.strategy import STRATEGIES
from dopt_api.verify import verify
from dopt_torch import rounding
from dopt_torch.rounding import round_weights


@pytest.mark.parametrize(("strategy", "gain"), [("Quant_INT8-4", 3.0), ("Quant_INT8-8", 0.5)])
def test_the_outputs_come_nearer_to_float_on_other_data(make, strategy, gain):
    model, other = make(strategy=strategy).eval(), batches(seed=9)
    before = sqnr(model, Net().eval(), other)
    report = round_weights(model, batches(), positions=32)
    assert [layer.name for layer in report] == ["stem/Conv2D", "deep/Conv2D", "wide/Conv2D", "head/Linear"]
    assert all(layer.reason == "" and 0 < layer.rounded <= layer.nearest < 1 for layer in report)
    assert sqnr(model, Net().eval(), other) > before + gain


@pytest.mark.parametrize("search", [True, False], ids=["searched scales", "scales that reach no end of the grid"])
@pytest.mark.parametrize("strategy", ["Quant_INT8-4", "Quant_INT8-8"])
def test_exporting_gives_the_integers_and_scales_that_were_chosen(make, tmp_path, monkeypatch, strategy, search):
    chosen, scales = [], []

    def spy(weight, scale, *args, **options):
        chosen.append(real(weight, scale, *args, **options))
        scales.append(scale.reshape(-1))
        return chosen[-1]

    real = core.round_weight
    monkeypatch.setattr(core, "round_weight", spy)
    if not search:
        monkeypatch.setattr(core, "best_scale", lambda weight, scale, *_: scale * 1.2)
    model = make(strategy=strategy)
    round_weights(model, batches(), positions=32)
    torch.save(model.state_dict(), tmp_path / "rounded.pth")
    result = generate_final_model(
        Net().eval(), str(tmp_path / "config.json"), str(tmp_path / "rounded.pth"), str(tmp_path)
    )
    graph = onnx.load(str(result.model)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    layers = read_params(result.params).layers
    kept = []  # a channel that comes out worse than with rounding to nearest is rounded to nearest
    for entry, integers, scale in zip(layers, chosen, scales, strict=True):
        weight = stored[entry.weight.tensor]
        weight = np.moveaxis(weight, entry.weight.axis, 0).reshape(len(entry.weight.scale), -1)
        found = weight / np.float32(entry.weight.scale)[:, None]
        np.testing.assert_allclose(found, np.rint(found), atol=1e-4)
        same = np.isclose(entry.weight.scale, scale, rtol=1e-6)
        np.testing.assert_array_equal(np.rint(found)[same], integers.reshape(found.shape)[same], err_msg=entry.name)
        kept += list(np.abs(found[same]).max(axis=1).round())
    assert len(kept) >= (56 if search else 10)
    assert search or max(kept) < STRATEGIES[strategy].weight.qmax


@pytest.mark.parametrize("short_sums", [True, False])
def test_short_sums_overflow_in_no_channel(make, tmp_path, short_sums):
    net = Net().eval()
    with torch.no_grad():
        net.wide.weight.abs_().add_(0.2)  # neighbours of one sign
        net.head.weight[0].abs_().add_(0.2)
    model = make(net, strategy="Quant_INT8-8").eval()
    report = round_weights(model, batches(), positions=32, short_sums=short_sums)
    assert all(layer.reason == "" and layer.rounded <= layer.nearest for layer in report)
    assert sqnr(model, net, batches(seed=9)) > 25
    torch.save(model.state_dict(), tmp_path / "rounded.pth")
    generate_final_model(net, str(tmp_path / "config.json"), str(tmp_path / "rounded.pth"), str(tmp_path))
    found = verify(tmp_path / "quant_params.json", [{"x": batches(1, 1)[0].numpy()}])
    hazards = {layer.name: layer.hazard for layer in found.layers}
    assert hazards["deep/Conv2D"] == 0.0  # depthwise
    if short_sums:
        assert not any(hazards.values())
    else:
        assert hazards["wide/Conv2D"] > 0.9
        assert hazards["head/Linear"] > 0.0


def test_the_mean_of_the_outputs_is_that_of_float(make):
    model = make()
    round_weights(model, batches(), positions=256)
    with torch.no_grad():
        exact, found = (torch.cat([one(x) for x in batches()]) for one in (Net().eval(), model.eval()))
    spread = (found - exact).std(0)
    assert ((found - exact).mean(0).abs() < 0.35 * spread).all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), bias=False),
        nn.Conv2d(4, 8, (3, 2), dilation=(1, 2), groups=2, padding="valid"),
        nn.Conv2d(4, 8, (3, 2), dilation=(1, 2), groups=4, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        Padded(4, 6, 3, stride=2),
        nn.Linear(9, 5),
    ],
    ids=["plain", "stride", "dilation", "same", "circular", "own", "linear"],
)
def test_patches_times_weight_are_the_layers_outputs(layer):
    watched = torch.randn(3, 4, 8, 9).as_subclass(rounding._Watched)
    watched.calls = []
    function = "linear" if isinstance(layer, nn.Linear) else "conv2d"
    with torch.no_grad():
        y = layer(watched).as_subclass(torch.Tensor)
    call = rounding._call_of(watched.calls, function)
    sampler = rounding._Sampler.__new__(rounding._Sampler)
    sampler.function, sampler.positions, sampler.seed = function, 7, 5
    sampler.restart()
    patches = sampler.patches(call)
    weight = layer.weight.detach().reshape(patches.shape[1], -1, patches.shape[2])
    found = torch.einsum("ngk,gok->ngo", patches, weight).reshape(len(patches), -1)
    if layer.bias is not None:
        found = found + layer.bias.detach()
    generator = torch.Generator().manual_seed(5)
    if function == "linear":
        wanted = y.reshape(-1, 5)[torch.randint(96, (21,), generator=generator)]
    else:
        top, left = (torch.randint(size, (3, 7), generator=generator) for size in y.shape[2:])
        wanted = y[torch.arange(3)[:, None], :, top, left].reshape(21, -1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


class Odd(nn.Module):
    """Layers that cannot be rounded, and one that is called twice a pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.up = nn.ConvTranspose2d(3, 4, 2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(self.up(x)))).mean((2, 3))
        return self.other(torch.relu(self.one(x)))


def test_what_is_left_alone_is_listed_with_the_reason(make):
    model = make(Odd())
    weights = {name: value.clone() for name, value in model.named_parameters()}
    report = {layer.name: layer.reason for layer in round_weights(model, batches())}
    assert report["up/ConvTranspose2D"] == "ConvTranspose2D is not rounded by this method"
    assert report["twice/Conv2D"] == ""
    assert "another layer's too" in report["one/Linear"]
    assert torch.equal(model.up.weight, weights["up.weight"])
    assert torch.equal(model.one.weight, weights["one.weight"])
    assert not torch.equal(model.twice.weight, weights["twice.weight"])


def test_modes_keys_and_everything_else_stay(make):
    model = make().train()
    model.norm.eval()
    keys, modes = list(model.state_dict()), [module.training for module in model.modules()]
    scale = model.deep.dopt_quantizer.input_scale.clone()
    round_weights(model, batches())
    assert list(model.state_dict()) == keys
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.deep.dopt_quantizer.input_scale, scale)
    assert "forward" not in model.deep.__dict__


def test_equal_calls_give_equal_weights(make):
    first, second = make(), make()
    round_weights(first, batches(), seed=3)
    round_weights(second, batches(), seed=3)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_failure_leaves_the_model_as_it_was(make):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop_at_the_third(layers):
        for number, layer in enumerate(layers):
            if number == 3:
                raise KeyboardInterrupt
            yield layer

    with pytest.raises(KeyboardInterrupt):
        round_weights(model, batches(), progress=stop_at_the_third)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in model.deep.__dict__


def test_mistakes_are_answered(make):
    with pytest.raises(ModelError, match="not a quantized model"):
        round_weights(Net(), batches())
    with pytest.raises(CalibrationError, match="There are no batches"):
        round_weights(make(), [])
    with pytest.raises(CalibrationError, match="stem/Conv2D"):
        round_weights(make(calibrate=False), batches())
