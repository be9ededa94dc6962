"""The code of the pages about TensorFlow runs as it stands there, and ends in what the pages promise."""

import numpy as np
import pytest
import tensorflow as tf
from snippets import name_of, pages, run

from dopt_api.params import read_params

v1 = tf.compat.v1


def tensorflow(names, folder):
    assert [layer.strategy for layer in read_params(folder / "out" / "quant_params.json").layers] == [
        "Quant_INT8-8"
    ] * 2
    assert [one.reason for one in names["report"]] == ["", ""]
    assert np.isfinite(names["sess"].run(names["loss"], {names["x"]: names["calibration_set"][0]}))


PROMISES = {"docs/tensorflow.md": tensorflow}


@pytest.mark.parametrize("page", pages("tf"), ids=name_of)
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with v1.Graph().as_default():
        names = run(page, "tf", tmp_path)
        PROMISES.get(name_of(page), lambda *_: None)(names, tmp_path)


def test_pages_are_found():
    assert set(PROMISES) <= {name_of(page) for page in pages("tf")}
