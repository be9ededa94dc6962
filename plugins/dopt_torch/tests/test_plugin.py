"""The hook module: what it says of itself, without importing torch."""

import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

import dopt_api
from dopt_api import manager
from dopt_torch import _version


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_listing_the_backends_describes_torch_without_importing_it():
    done = run(
        "import sys, dopt_api\n"
        "(status,) = [s for s in dopt_api.backends() if s.name == 'torch']\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules\n"
        "print(status.info.framework_version, status.error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [metadata.version("torch")]


def test_importing_the_vendor_path_does_not_import_torch():
    done = run("import sys, dopt.dopt_torch.opt_main; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_vendor_path_is_a_namespace_package():
    import dopt

    assert isinstance(dopt, types.ModuleType)
    assert getattr(dopt, "__file__", None) is None
    assert not any((Path(folder) / "__init__.py").exists() for folder in dopt.__path__)


def test_the_backend_claims_what_it_can_do_and_owns_modules_only():
    info = manager.load("torch").info
    assert info.capabilities.retraining
    assert info.capabilities.quant_loss
    assert info.capabilities.distributed_calibration
    assert info.capabilities.dynamic_batch
    assert not info.capabilities.session_graph
    assert info.owns(torch.nn.Linear(2, 2))
    assert not info.owns(torch.zeros(1))
    assert not info.owns(torch.nn.Linear)


def test_all_distributions_have_one_version():
    assert (
        _version.__version__ == dopt_api.__version__ == metadata.version("dopt-torch") == metadata.version("dopt-api")
    )


@pytest.mark.parametrize("given", ["model.pth", {"weight": torch.zeros(1)}, torch.nn.Linear, None])
def test_what_is_no_module_is_declined_with_its_type(given, tmp_path):
    with pytest.raises(dopt_api.DoptError, match=rf"{type(given).__qualname__}"):
        dopt_api.generate_config(given, "x:1,2", tmp_path / "c.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_torch_is_named_with_the_command_that_mends_it():
    done = run(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from dopt_torch.plugin import dopt_find_layers\n"
        "try:\n    dopt_find_layers(object(), 'x:1')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    assert done.stdout.startswith("BackendError"), done.stderr
    assert "pip install torch" in done.stdout
