"""The backend as an installed plugin."""

import subprocess
import sys

from networks import make_network

import dopt_api
from dopt_api import manager


def test_it_is_listed_with_what_it_can_do():
    (status,) = [status for status in dopt_api.backends() if status.name == "numpy"]
    assert status.error == ""
    assert status.distribution.startswith("dopt-numpy ")
    claimed = {name for name, value in vars(status.info.capabilities).items() if value}
    assert claimed == {"retraining", "quant_loss", "dynamic_batch", "weight_only"}


def test_it_is_found_by_the_type_of_the_model():
    assert manager.select(make_network()).name == "numpy"


def test_listing_backends_imports_no_part_of_it_but_the_hooks():
    code = "import sys, dopt_api; dopt_api.backends(); print(*[m for m in sys.modules if m.startswith('dopt_numpy')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["dopt_numpy", "dopt_numpy._version", "dopt_numpy.plugin"]
