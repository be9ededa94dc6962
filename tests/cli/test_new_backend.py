"""``dopt new-backend``: the project that it writes, and what it says where it cannot."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dopt_api import errors, hookspec
from dopt_api.cli.group import COMMANDS, dopt
from dopt_api.cli.names import names_of
from dopt_api.cli.new_backend import new_backend
from dopt_api.manager import HOOKS


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(dopt, arguments)


def test_a_project_is_written(run, tmp_path):
    result = run("new-backend", "my-engine", "--framework", "engine", "--model-type", "engine.nn.Model")
    assert result.exit_code == 0, result.output
    assert "pytest --pyargs dopt_conformance --dopt-backend my-engine" in result.output
    project = tmp_path / "dopt-my-engine"
    assert [path.name for path in tmp_path.iterdir()] == ["dopt-my-engine"]
    plugin = (project / "src" / "dopt_my_engine" / "plugin.py").read_text()
    assert 'model_types=("engine.nn.Model",)' in plugin
    assert "class MyEngineHarness(Harness)" in (project / "src" / "dopt_my_engine" / "conformance.py").read_text()
    assert 'my-engine = "dopt_my_engine.plugin"' in (project / "pyproject.toml").read_text()


def test_a_framework_that_is_not_installed_is_told(run):
    assert "'mine' is not installed here" in run("new-backend", "mine").output
    assert "is not installed" not in run("new-backend", "other", "--framework", "numpy").output


def test_nothing_of_a_template_is_left(run, tmp_path):
    run("new-backend", "mine")
    files = [path for path in (tmp_path / "dopt-mine").rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        text = file.read_text()
        assert file.suffix != ".j2"
        assert not any(sign in text + str(file) for sign in ("{{", "{%", "my-engine", "my_engine"))
        assert text == "" or (text.endswith("\n") and not text.endswith("\n\n"))
        if file.suffix == ".py":
            ast.parse(text)


def test_it_implements_every_hook(run, tmp_path):
    run("new-backend", "mine")
    tree = ast.parse((tmp_path / "dopt-mine" / "src" / "dopt_mine" / "plugin.py").read_text())
    written = {node.name: [a.arg for a in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
    for hook in HOOKS:
        assert set(written[hook]) <= set(inspect.signature(getattr(hookspec, hook)).parameters), hook


def test_json_for_scripts(run, tmp_path):
    result = run("new-backend", "mine", "--json")
    written = json.loads(result.output)
    assert written["folder"] == "dopt-mine"
    assert {file.as_posix() for file in map(Path, written["files"])} == {
        path.relative_to(tmp_path / "dopt-mine").as_posix()
        for path in (tmp_path / "dopt-mine").rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["My_Engine"], "cannot be called 'My_Engine'", "Use 'my-engine'"),
        (["dopt-mine"], None, None),
        (["class"], "keyword of Python", "class-engine"),
        (["torch"], "a distribution 'dopt-torch' of its own", "my-torch"),
        (["1st"], "cannot be called '1st'", "Choose a name"),
        (["mine", "--framework", "a.b"], "cannot be imported as 'a.b'", "with which programs import"),
        (["mine", "--model-type", "Model"], "class of models cannot be called 'Model'", "__qualname__"),
        (["mine", "--output-dir", "nowhere"], "folder 'nowhere' does not exist", "Create it"),
        ([], "Missing argument 'NAME'", "--help"),
    ],
)
def test_mistakes_are_answered(run, tmp_path, arguments, what, fix):
    result = run("new-backend", *arguments)
    if what is None:
        assert result.exit_code == 0
        return
    assert result.exit_code in (1, 2)
    said = " ".join(result.output.split())
    assert what in said
    assert fix in said
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(run, tmp_path):
    run("new-backend", "mine")
    (tmp_path / "dopt-mine" / "README.md").write_text("mine")
    result = run("new-backend", "mine")
    assert result.exit_code == 1
    assert "exists already" in result.output
    assert (tmp_path / "dopt-mine" / "README.md").read_text() == "mine"


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def full(self, *arguments, **options):
        if self.name == "plugin.py":
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **options)

    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(errors.OutputError, match="No space left"):
        new_backend("mine", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names():
    assert vars(names_of("my-2nd-engine")) == {
        "backend": "my-2nd-engine",
        "distribution": "dopt-my-2nd-engine",
        "package": "dopt_my_2nd_engine",
        "prefix": "My2ndEngine",
    }


# ---- the command line itself


def test_an_unknown_command_is_answered(run):
    result = run("new-backnd", "mine")
    assert result.exit_code == 2
    assert "new-backend" in result.output


def test_every_command_has_help(run):
    listing = run("--help").output
    for name in COMMANDS:
        assert name in listing
        assert run(name, "--help").exit_code == 0


def test_the_installed_command_runs_and_imports_no_framework(tmp_path):
    code = (
        "import sys; from dopt_api.cli import main; sys.argv = ['dopt', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end\n"
        "assert not {'torch', 'tensorflow', 'numpy', 'jinja2'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    program = Path(sys.executable).with_name("dopt")
    done = subprocess.run([program, "--version"], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert "0.1.0" in done.stdout


def test_without_the_extra_it_says_how_to_install_it(tmp_path):
    code = "import sys; sys.modules['click'] = None; from dopt_api.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'dopt-api[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
