"""Cross-layer equalization: the float network stays what it is, to the bit; the channels become of one size."""

import copy

import onnxruntime
import pytest
import torch
from padded_network import sqnr
from torch import nn
from torch.nn import functional

import dopt_api
from dopt_api.errors import CalibrationError
from dopt_torch.equalization import _columns, _rows, equalize


class Chain(nn.Module):
    """Every way from one layer to the next: a folded norm, in-place ReLU, depthwise, pooling, ReLU6, a residual sum."""

    input_shape = "x:1,3,16,16"

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, groups=8)
        self.point = nn.Conv2d(8, 16, 1)
        self.six = nn.Conv2d(16, 8, 1)
        self.back = nn.ConvTranspose2d(8, 8, 2)
        self.side = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.fc = nn.Linear(8, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        x = functional.max_pool2d(functional.leaky_relu(self.depth(x), 0.1), 2)
        x = functional.relu6(self.point(functional.pad(x, (1, 1, 1, 1))))
        x = self.back(torch.relu(self.six(x)))
        x = self.grouped(torch.relu(x + torch.relu(self.side(x))))
        return self.out(functional.dropout(torch.relu(self.fc(x.mean((2, 3)))), 0.5, self.training))


PAIRS = [
    ("stem/Conv2D", "depth/Conv2D"),
    ("depth/Conv2D", "point/Conv2D"),
    ("six/Conv2D", "back/ConvTranspose2D"),
    ("fc/Linear", "out/Linear"),
]


@pytest.fixture
def chain():
    model = Chain().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    nn.init.uniform_(model.norm.bias, -0.5, 0.5)
    nn.init.uniform_(model.norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    with torch.no_grad():  # channels of very different sizes, which the next layer makes up for
        ways = (model.norm, model.depth, 0), (model.depth, model.point, 1), (model.six, model.back, 0)
        for first, second, axis in (*ways, (model.fc, model.out, 1)):
            sizes = torch.logspace(-2, 2, len(first.weight))[torch.randperm(len(first.weight))]
            first.weight.mul_(sizes.view(-1, *[1] * (first.weight.dim() - 1)))
            first.bias.mul_(sizes)
            second.weight.div_(sizes.view([-1 if i == axis else 1 for i in range(second.weight.dim())]))
    return model


def test_the_float_network_stays_to_the_bit(chain, config_of):
    x = torch.randn(2, 3, 16, 16)
    quantized = dopt_api.optimize(chain, config_of(chain, chain.input_shape)).eval()
    wanted = quantized(x).clone()  # not calibrated: float
    assert equalize(quantized) == PAIRS
    torch.testing.assert_close(quantized(x), wanted, rtol=0, atol=0)
    for name in ("side", "grouped"):
        assert torch.equal(getattr(quantized, name).weight, getattr(chain, name).weight)


def test_channels_have_one_size_in_both_layers(chain, config_of):
    quantized = dopt_api.optimize(chain, config_of(chain, chain.input_shape))
    equalize(quantized)
    for first, second in (
        (quantized.stem, quantized.depth),
        (quantized.six, quantized.back),
        (quantized.fc, quantized.out),
    ):
        with torch.no_grad():
            ratio = _rows(first).abs().amax(1) / _columns(second).abs().amax(1)
        assert ratio.max() / ratio.min() <= 4 * (1 + 1e-5)  # factors are powers of two
    assert equalize(quantized) == []


def test_what_is_quantized_is_closer_to_float(chain, quantize, config_of):
    data = [torch.randn(8, 3, 16, 16) for _ in range(4)]
    ratios = []
    for balanced in (False, True):
        model = dopt_api.optimize(chain, config_of(chain, chain.input_shape))
        if balanced:
            equalize(model)
        dopt_api.set_calibrate_state(model, True)
        for x in data:
            model(x)
        dopt_api.set_calibrate_state(model, False)
        ratios.append(sqnr(model.eval(), chain, data))
    assert ratios[1] > ratios[0] + 6


def test_the_export_has_the_balanced_weights(chain, config_of, tmp_path):
    file = config_of(chain, chain.input_shape)
    model = dopt_api.optimize(chain, file)
    equalize(model)
    x = torch.randn(1, 3, 16, 16)
    dopt_api.set_calibrate_state(model, True)
    model(x)
    dopt_api.set_calibrate_state(model, False)
    torch.save(model.state_dict(), tmp_path / "quant.pth")
    result = dopt_api.export(chain, config_file=file, checkpoint=tmp_path / "quant.pth", output_dir=tmp_path)
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    assert sqnr(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), chain, [x]) > 25


def test_what_was_calibrated_is_forgotten(chain, quantize):
    model = quantize(chain, chain.input_shape, torch.randn(2, 3, 16, 16))
    equalize(model)
    assert not model.depth.dopt_quantizer.is_ready()
    assert model.side.dopt_quantizer.is_ready()


def test_shared_weights_and_layers_left_float_are_no_pairs(chain, config_of):
    shared = copy.deepcopy(chain)
    shared.side.weight = shared.grouped.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
    shared.grouped = nn.Conv2d(8, 8, 1)
    shared.six.bias = shared.back.bias
    names = {name for pair in PAIRS for name in pair} - {"fc/Linear"}
    model = dopt_api.optimize(shared, config_of(shared, shared.input_shape, only=names))
    assert equalize(model) == PAIRS[:2]


def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(chain, config_of):
    model = dopt_api.optimize(chain, config_of(chain, chain.input_shape))
    with torch.no_grad():
        model.out.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="'out/Linear' has NaN or infinity"):
        equalize(model)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
