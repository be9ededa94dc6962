"""The golden cases of the core, the whole way: the same parameter file to the byte, names aside."""

import json

import torch
from cases import FILE, cases, named_alike, reference, render
from torch import nn

import dopt_api
from dopt_api.params import read_params

LAYERS = {
    "conv": lambda w, bias: nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], bias=bias),
    "depthwise": lambda w, bias: nn.Conv2d(w.shape[0], w.shape[0], w.shape[2:], groups=w.shape[0], bias=bias),
    "transposed": lambda w, bias: nn.ConvTranspose2d(w.shape[0], w.shape[1], w.shape[2:], bias=bias),
    "conv3d": lambda w, bias: nn.Conv3d(w.shape[1], w.shape[0], w.shape[2:], bias=bias),
    "linear": lambda w, bias: nn.Linear(w.shape[1], w.shape[0], bias=bias),
}


def build(case):
    layer = LAYERS[case.kind](case.weight, case.bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(case.weight))
        if case.bias is not None:
            layer.bias.copy_(torch.from_numpy(case.bias))
    if case.norm is None:
        return nn.Sequential(layer).eval()
    norm = nn.BatchNorm2d(len(case.norm.mean), eps=case.norm.epsilon)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(case.norm.gamma))
        norm.bias.copy_(torch.from_numpy(case.norm.beta))
        norm.running_mean.copy_(torch.from_numpy(case.norm.mean))
        norm.running_var.copy_(torch.from_numpy(case.norm.variance))
    return nn.Sequential(layer, norm).eval()


def test_the_golden_file_is_reproduced_to_the_byte(tmp_path):
    layers = []
    for case in cases():
        shape = "x:" + ",".join(map(str, (1, *case.batches[0].shape[1:])))
        config = dopt_api.generate_config(build(case), shape, tmp_path / "config.json")
        content = json.loads(config.read_text())
        for entry in content["layer_strategy"].values():
            entry.update(quant_strategy="Quant_INT8-8", range=case.range_method)
        config.write_text(json.dumps(content))
        quantized = dopt_api.optimize(build(case), config)
        dopt_api.set_calibrate_state(quantized, True)
        for batch in case.batches:
            quantized(torch.from_numpy(batch))
        dopt_api.set_calibrate_state(quantized, False)
        torch.save(quantized.state_dict(), tmp_path / "quant.pth")
        (found,) = read_params(dopt_api.export(build(case), config, tmp_path / "quant.pth", tmp_path).params).layers
        layers.append(named_alike(found, reference(case)))
    assert render(layers) == FILE.read_text(encoding="utf-8")
