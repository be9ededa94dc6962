"""What ``dopt`` costs before it does anything, what it imports, and completion."""

import os
import resource
import subprocess
import sys

import pytest

HEAVY = {"torch", "tensorflow", "jax", "onnx", "onnxruntime", "numpy", "matplotlib", "scipy", "jinja2", "rich"}


def dopt(*arguments, code="", **environment):
    """Run the entry point in an interpreter of its own."""
    program = f"import sys; sys.argv[0] = 'dopt'\nfrom dopt_api.cli import main\n{code or 'main()'}"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def seconds(**environment):
    """Processor time of a call, which does not depend on what else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert dopt("--help", **environment).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_takes_less_than_300_ms(tmp_path):
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    seconds(**compiled)  # compiles
    assert min(seconds(**compiled) for _ in range(5)) < 0.3


SHOW_MODULES = "try:\n    main()\nfinally:\n    print('modules', *{name.partition('.')[0] for name in sys.modules})"


@pytest.mark.parametrize(
    "arguments", ["--help", "quantize --help", "tune --help", "report --help", "config set --help"]
)
def test_help_imports_nothing_heavy(arguments):
    result = dopt(*arguments.split(), code=SHOW_MODULES)
    assert result.returncode == 0, result.stderr
    modules = result.stdout.splitlines()[-1].split()
    assert "click" in modules
    assert not HEAVY.intersection(modules)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("dopt qu", {"quantize"}),
        ("dopt config ", {"new", "show", "set", "check", "diff"}),
        ("dopt quantize --sho", {"--short-sums"}),
        ("dopt tune --cost ", {"size", "bit_operations"}),
    ],
)
def test_words_are_completed(words, wanted):
    result = dopt(_DOPT_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
    assert {line.partition(",")[2] for line in result.stdout.splitlines()} == wanted


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_completion_is_printed(shell):
    result = dopt(_DOPT_COMPLETE=f"{shell}_source")
    assert f"{shell}_complete" in result.stdout, result.stderr
