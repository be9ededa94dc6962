"""The golden cases of the core, the whole way: the same parameter file to the byte, names aside."""

import pytest
from cases import cases, named_alike, reference, render
from networks import calibrate, write_config

import dopt_api
from dopt_api.params import read_params
from dopt_numpy.checkpoint import save_checkpoint
from dopt_numpy.network import BatchNorm, Conv2D, Dense, Network

KINDS = ("conv", "depthwise", "linear")


def build(case):
    if case.kind == "linear":
        layer = Dense(case.weight.shape[1], case.weight.shape[0], bias=case.bias is not None)
    else:
        outputs, own, size, _ = case.weight.shape
        groups = outputs if case.kind == "depthwise" else 1
        layer = Conv2D(own * groups, outputs, size, groups=groups, bias=case.bias is not None)
    layer.weight.value[...] = case.weight
    if case.bias is not None:
        layer.bias.value[...] = case.bias
    if case.norm is None:
        return Network({"layer": layer})
    norm = BatchNorm(len(case.norm.mean), epsilon=case.norm.epsilon)
    norm.gamma.value[...], norm.beta.value[...] = case.norm.gamma, case.norm.beta
    norm.mean[...], norm.variance[...] = case.norm.mean, case.norm.variance
    return Network({"layer": layer, "norm": norm})


@pytest.mark.parametrize("case", [case for case in cases() if case.kind in KINDS], ids=lambda case: case.name)
def test_the_golden_case_is_reproduced_to_the_byte(case, tmp_path):
    shape = "x:" + ",".join(map(str, (1, *case.batches[0].shape[1:])))
    config = write_config(build(case), tmp_path / "config.json", shape, range=case.range_method)
    quantized = calibrate(dopt_api.optimize(build(case), config), *case.batches)
    path = save_checkpoint(quantized, tmp_path / "quant.npz")
    (found,) = read_params(dopt_api.export(build(case), config, path, tmp_path).params).layers
    assert render([named_alike(found, reference(case))]) == render([reference(case)])
