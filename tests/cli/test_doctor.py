"""``dopt doctor`` and ``dopt backends``: what is found, what is in the way, and what mends it."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dopt_api import manager
from dopt_api.cli import doctor
from dopt_api.cli.group import COMMANDS, dopt
from dopt_api.types import BackendInfo, Capabilities


def info(name="alpha", version="1.2"):
    return BackendInfo(name, "alphaflow", version, "0.1", ("alpha.Model",), "1.0", Capabilities(retraining=True))


@pytest.fixture
def installed(monkeypatch):
    def set_(*statuses):
        monkeypatch.setattr(manager, "statuses", lambda: list(statuses))

    set_(manager.BackendStatus("alpha", "dopt-alpha 0.1", info()))
    return set_


def call(*arguments):
    return CliRunner().invoke(dopt, arguments)


def findings():
    result = call("doctor", "--json")
    return result.exit_code, {row["what"]: row for row in json.loads(result.output)}


def test_what_works_is_ok_and_what_is_missing_has_a_command(installed, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1.0" if name in ("dopt-api", "onnx") else None)
    status, rows = findings()
    assert status == 0
    assert (rows["dopt-api"]["state"], rows["backend alpha"]["finding"]) == ("ok", "alphaflow 1.2")
    assert rows["backend torch"] == {
        "state": "absent",
        "what": "backend torch",
        "finding": "not installed",
        "fix": "pip install dopt-torch",
    }
    assert rows["onnxruntime"]["fix"] == "pip install 'dopt-api[verify]'"
    assert "absent" in call("doctor").output


def test_a_backend_that_does_not_load_is_broken(installed):
    installed(manager.BackendStatus("alpha", "dopt-alpha 0.1", None, "ImportError: no alphaflow"))
    status, rows = findings()
    assert status == 1
    assert rows["backend alpha"]["finding"] == "ImportError: no alphaflow"
    assert rows["backend alpha"]["fix"] == "pip install --force-reinstall dopt-alpha"
    installed(manager.BackendStatus("alpha", "dopt-alpha 0.1", info(version=None)))
    status, rows = findings()
    assert (status, rows["backend alpha"]["fix"]) == (1, "pip install 'dopt-alpha[alphaflow]'")


def test_versions_that_differ_are_broken(installed, monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"dopt-api": "0.2.0", "dopt-torch": "0.1.0"}.get)
    status, rows = findings()
    assert (status, rows["dopt-torch"]["fix"]) == (1, "pip install dopt-torch==0.2.0")


def test_a_package_that_shadows_the_namespace_is_named(installed, monkeypatch, tmp_path):
    (tmp_path / "dopt").mkdir()
    (tmp_path / "dopt" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name == "dopt" or name.startswith("dopt.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    status, rows = findings()
    monkeypatch.delitem(sys.modules, "dopt")
    assert status == 1
    assert str(tmp_path / "dopt" / "__init__.py") in rows["import dopt"]["finding"]
    assert rows["import dopt"]["fix"]


def test_backends_are_listed_with_what_they_can(installed):
    lines = call("backends").output.splitlines()
    assert lines[1].split() == ["alpha", "dopt-alpha", "0.1", "alphaflow", "1.2", "retraining"]
    assert json.loads(call("backends", "--json").output)[0]["info"]["framework"] == "alphaflow"
    installed(manager.BackendStatus("alpha", "dopt-alpha 0.1", None, "ImportError: no alphaflow"))
    assert "ImportError: no alphaflow" in call("backends").output
    installed()
    assert "pip install dopt-torch" in call("backends").output


def test_help_of_every_command_imports_nothing_heavy():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom dopt_api.cli.group import dopt\n"
        "result = CliRunner().invoke(dopt, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "print(result.output)\nprint(sorted({'numpy', 'rich', 'torch', 'onnx', 'jinja2'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in output for name in COMMANDS)
    assert output.splitlines()[-1] == "[]"
