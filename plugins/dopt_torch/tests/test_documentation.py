"""The code of the README and of the pages about PyTorch runs as it stands there, and ends in what the pages promise."""

import json

import numpy as np
import pytest
import torch
from snippets import name_of, pages, run

from dopt_api.params import read_params


def readme(names, folder):
    assert [path.name for path in (names["result"].model, names["result"].params)] == [
        "model.onnx",
        "quant_params.json",
    ]
    layers = [layer.name for layer in read_params(folder / "quant_params.json").layers]
    assert layers == list(json.loads((folder / "config.json").read_text())["layer_strategy"])
    assert layers == ["0/Conv2D", "5/Linear"]


def mixed_precision(names, folder):
    layers = json.loads((folder / "mixed.json").read_text())["layer_strategy"]
    assert {entry["quant_strategy"] for entry in layers.values()} == {"Quant_INT8-8", "Quant_INT8-4"}
    for name in ("sensitivity.png", "trade_off.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def pytorch(names, folder):
    assert [one.reason for one in names["report"]] == ["", ""]
    assert names["smoothed"] == ["4/Linear"]
    assert names["pairs"] == []
    assert names["loss"].isfinite()
    assert (folder / "quant.pth").stat().st_size > 1000


def deploy(names, folder):
    assert names["layer"].name == "3/Linear"
    model, x = names["quant_model"], torch.from_numpy(names["x"])
    simulated = model(x).detach().numpy()
    np.testing.assert_allclose(names["linear"](model[:3](x).detach().numpy()), simulated, atol=1e-5)
    np.testing.assert_allclose(names["found"], simulated, atol=1e-2)  # sums in another order may move a rounding


PROMISES = {
    "docs/deploy.md": deploy,
    "README.md": readme,
    "docs/mixed-precision.md": mixed_precision,
    "docs/pytorch.md": pytorch,
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # what a page opens by the way
@pytest.mark.parametrize("page", pages("torch"), ids=name_of)
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = run(page, "torch", tmp_path)
    PROMISES.get(name_of(page), lambda *_: None)(names, tmp_path)


def test_pages_are_found():
    assert set(PROMISES) <= {name_of(page) for page in pages("torch")}
