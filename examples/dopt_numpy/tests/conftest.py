"""What the tests share."""

from __future__ import annotations

import pytest
from networks import batch, calibrate, make_network, write_config

import dopt_api
from dopt_numpy.checkpoint import save_checkpoint


@pytest.fixture
def config(tmp_path):
    """A strategy file for ``make_network`` that quantizes everything."""
    return write_config(make_network(), tmp_path / "config.json")


@pytest.fixture
def quantized(config):
    """The quantized network, calibrated."""
    return calibrate(dopt_api.optimize(make_network(), config), batch())


@pytest.fixture
def checkpoint(quantized, tmp_path):
    """The saved state of ``quantized``."""
    return save_checkpoint(quantized, tmp_path / "quant.npz")
