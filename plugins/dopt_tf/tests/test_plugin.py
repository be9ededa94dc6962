"""The hook module: what it says of itself, without importing TensorFlow."""

import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import tensorflow as tf

import dopt_api
from dopt_api import manager
from dopt_tf import _version, plugin

v1 = tf.compat.v1


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_listing_the_backends_describes_tensorflow_without_importing_it():
    done = run(
        "import sys, dopt_api\n"
        "(status,) = [s for s in dopt_api.backends() if s.name == 'tf']\n"
        "assert 'tensorflow' not in sys.modules and 'keras' not in sys.modules\n"
        "print(status.info.framework_version, status.error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [tf.__version__]


def test_importing_the_vendor_path_does_not_import_tensorflow():
    done = run("import sys, dopt.dopt_tf.opt_main; assert 'tensorflow' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_vendor_path_is_a_namespace_package():
    import dopt

    assert isinstance(dopt, types.ModuleType)
    assert getattr(dopt, "__file__", None) is None
    assert not any((Path(folder) / "__init__.py").exists() for folder in dopt.__path__)


def test_the_backend_claims_what_it_can_do_and_owns_sessions_only():
    info = manager.load("tf").info
    assert info.capabilities.retraining
    assert info.capabilities.quant_loss
    assert info.capabilities.session_graph
    assert not info.capabilities.distributed_calibration
    with tf.Graph().as_default() as graph:
        for session in (v1.Session(), v1.InteractiveSession(), v1.train.MonitoredSession()):
            assert info.owns(session)
            session.close()
    assert not info.owns(graph)
    assert not info.owns(v1.Session)


def test_all_distributions_have_one_version():
    assert _version.__version__ == dopt_api.__version__ == metadata.version("dopt-tf") == metadata.version("dopt-api")


@pytest.mark.parametrize("given", ["model.pb", {"kernel": 1}, v1.Session, tf.Graph(), None], ids=str)
def test_what_is_no_session_is_declined_with_its_type(given, tmp_path):
    with pytest.raises(dopt_api.DoptError, match=type(given).__qualname__):
        dopt_api.generate_config(given, None, tmp_path / "c.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("installed", ["tensorflow", "tensorflow-cpu", "tensorflow-gpu"])
def test_whichever_distribution_is_installed_gives_the_version(installed, monkeypatch):
    def version(name):
        if name == installed:
            return "2.8.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(plugin.metadata, "version", version)
    assert plugin.dopt_describe_backend().framework_version == "2.8.0"


def test_no_distribution_of_tensorflow_is_pulled_in_beside_the_user_s():
    required = [line for line in metadata.requires("dopt-tf") if "extra ==" not in line]
    assert not any("tensorflow" in line for line in required)


@pytest.mark.parametrize(
    "call",
    [
        "plugin.dopt_find_layers(object(), None)",
        "opt_main.restore_float_checkpoint(object(), 'model')",
        "opt_main.float_variables(object())",
    ],
)
def test_a_missing_tensorflow_is_named_with_the_commands_that_mend_it(call):
    done = run(
        "import sys\n"
        "sys.modules['tensorflow'] = None\n"
        "from dopt.dopt_tf import opt_main\n"
        "from dopt_tf import plugin\n"
        f"try:\n    {call}\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    assert done.stdout.startswith("BackendError"), done.stdout + done.stderr
    assert "pip install tensorflow, or tensorflow-cpu" in done.stdout
