"""Which tests of a suite a backend runs, and which runs do not succeed although no test has failed.

The suite here is a small one of its own, in place of the real one.
"""

from __future__ import annotations

import json

import pytest
from installed import HOOKS

from dopt_conformance import plugin

SUITE = """
import pytest

pytestmark = pytest.mark.since("1.0")

def test_core(): pass

@pytest.mark.parametrize("name", ["a", "b"])
def test_named(name): pass

@pytest.mark.capability("quant_loss")
def test_loss(): pass

@pytest.mark.capability("retraining")
def test_training(): raise AssertionError
"""

BROKEN = SUITE.replace("def test_core(): pass", "def test_core(): raise ValueError")

GAP = """
[[gap]]
test = "laws/test_small.py::{}"
kind = "upstream"
raises = "{}"
reason = "The framework cannot."
"""


@pytest.fixture
def suite(pytester, install, monkeypatch):
    """Return a function that runs a small suite with a list of known gaps."""
    monkeypatch.setattr(plugin, "PACKAGE", pytester.path)

    def run(*arguments, content=SUITE, gaps="", hooks=HOOKS):
        install(hooks)
        (pytester.path / "laws").mkdir(exist_ok=True)
        (pytester.path / "laws" / "test_small.py").write_text(content)
        if gaps:
            (pytester.path / "conformance.toml").write_text(gaps)
        return pytester.runpytest_inprocess("--dopt-backend", "mine", "-p", "no:cacheprovider", *arguments)

    return run


def errors(result):
    """Return what is said to be wrong with the run as a whole."""
    return [line for line in result.outlines if line.startswith("ERROR: ")]


def test_what_is_claimed_runs_and_the_rest_is_declared(suite):
    result = suite("--dopt-report", "report.json")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=4, skipped=1)
    assert not errors(result)
    assert "claims core, quant_loss" in result.stdout.str()


def test_the_report_counts_each_test_once(suite, pytester):
    suite("--dopt-report", "report.json", content=BROKEN, gaps=GAP.format("test_named[a]", "ValueError"))
    report = json.loads((pytester.path / "report.json").read_text())
    counts = {name: [c[o] for o in ("passed", "declared", "failed")] for name, c in report["capabilities"].items()}
    assert counts["core"] == [1, 0, 2]
    assert counts["quant_loss"] == [1, 0, 0]
    assert counts["retraining"] == [0, 1, 0]
    assert report["complete"]
    assert ["test_named[a] passes in spite" in error for error in report["errors"]] == [True]


def test_a_claim_of_a_newer_hook_api_is_not_due(suite):
    newer = SUITE.replace('@pytest.mark.capability("quant_loss")', '@pytest.mark.since("1.1")')
    result = suite(content=newer)
    result.assert_outcomes(passed=3, skipped=2)


def test_a_known_gap_is_expected_to_fail(suite):
    result = suite(content=BROKEN, gaps=GAP.format("test_core", "ValueError"))
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=3, skipped=1, xfailed=1)


def test_a_known_gap_that_fails_otherwise_is_a_failure(suite):
    result = suite(content=BROKEN, gaps=GAP.format("test_core", "AssertionError"))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=3, skipped=1, failed=1)


def test_a_known_gap_that_is_about_no_test_is_an_error(suite):
    result = suite(gaps=GAP.format("test_cores", "ValueError"))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    (error,) = errors(result)
    assert "'laws/test_small.py::test_cores' is about no test" in error
    assert "Fix: correct its name" in error


def test_a_known_gap_that_passes_is_an_error(suite):
    result = suite(gaps=GAP.format("test_core", "ValueError"))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    (error,) = errors(result)
    assert "test_core passes in spite of a known gap. Fix: remove its entry" in error


def test_a_known_gap_about_all_parameters_must_fail_with_each(suite):
    content = SUITE.replace("def test_named(name): pass", "def test_named(name): assert name == 'a'")
    result = suite(content=content, gaps=GAP.format("test_named", "AssertionError"))
    (error,) = errors(result)
    assert "test_named[a] passes" in error


def test_a_known_gap_about_what_is_not_claimed_is_an_error(suite):
    result = suite(gaps=GAP.format("test_training", "AssertionError"))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    (error,) = errors(result)
    assert "the capability 'retraining', which the backend does not claim" in error


def test_a_skipped_test_of_a_claimed_capability_is_an_error(suite):
    result = suite(content=SUITE.replace("def test_loss(): pass", "def test_loss(): pytest.skip('no time')"))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert any("1 tests of the claimed capability 'quant_loss' were skipped" in error for error in errors(result))


def test_a_claimed_capability_without_any_test_is_an_error(suite):
    result = suite(content=SUITE.replace('@pytest.mark.capability("quant_loss")', ""))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    (error,) = errors(result)
    assert "No test of the claimed capability 'quant_loss' ran" in error


def test_a_run_without_tests_of_the_core_is_an_error(suite):
    result = suite("-k", "test_loss")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    (error,) = errors(result)
    assert "No test of the core ran" in error
    assert "pytest --pyargs dopt_conformance" in error


def test_a_run_of_a_part_with_the_core_succeeds(suite, pytester):
    (pytester.path / "laws").mkdir()
    (pytester.path / "laws" / "test_other.py").touch()
    assert suite("laws/test_small.py::test_core").ret == pytest.ExitCode.OK


@pytest.mark.parametrize("damage", [('pytestmark = pytest.mark.since("1.0")', ""), ('"quant_loss"', '"quantloss"')])
def test_a_test_of_the_suite_says_what_it_belongs_to(suite, damage):
    result = suite(content=SUITE.replace(*damage))
    assert result.ret != pytest.ExitCode.OK
    assert "has no mark 'since', or one of an unknown capability" in result.stdout.str() + result.stderr.str()


@pytest.mark.parametrize(
    ("gaps", "cause"),
    [
        ("[[gap]", "is not TOML"),
        ("[[gaps]]", "has other content than gaps: gaps"),
        ('[[gap]]\ntest = "a"', "is incomplete"),
        (GAP.format("test_core", "").replace('""', "3"), "The 'raises' is 3"),
        (GAP.format("test_core", "ValueError").replace("upstream", "later"), "The kind is 'later'"),
        (GAP.format("test_core", "NoError"), "The exception 'NoError' is not known"),
    ],
)
def test_a_wrong_list_of_gaps_is_told(suite, gaps, cause):
    result = suite(gaps=gaps)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert cause in result.stderr.str()
    assert "conformance.toml" in result.stderr.str()


def test_a_named_list_of_gaps_must_be_there(suite):
    result = suite("--dopt-known-gaps", "nowhere.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "nowhere.toml' cannot be read" in result.stderr.str()


def test_without_a_backend_the_plugin_does_nothing(pytester):
    pytester.makepyfile("def test_own(): pass")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1)
    assert "dopt" not in result.stdout.str().replace(str(pytester.path), "").replace("dopt-conformance-", "")
