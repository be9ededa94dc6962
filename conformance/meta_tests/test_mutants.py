"""The suite finds wrong backends: every mutant is killed by the test that is meant to."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from mutants import MUTANTS

from dopt_api import manager
from dopt_conformance.plugin import PACKAGE

KILLERS = sorted({mutant.killer for mutant in MUTANTS.values()})


class Quick:
    """A plugin of the runs of the suite: the same examples each time, and no time is spent on making failures small."""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self):
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("quick", settings.get_profile("dopt-ci"), phases=phases, max_examples=25)
        settings.load_profile("quick")


@pytest.fixture
def suite(pytester, monkeypatch):
    """Return a function that runs files or tests of the suite and returns outcomes by the names of tests."""
    pytester.makeini("[pytest]")

    def run(*tests):
        manager._loaded.cache_clear()
        result = pytester.runpytest_inprocess(
            *(str(PACKAGE / test) for test in tests),
            *("--dopt-backend", "numpy", "--dopt-profile", "ci"),
            *("--rootdir", str(PACKAGE), "--confcutdir", str(PACKAGE), "-p", "no:cacheprovider", "-q", "--tb=line"),
            plugins=[Quick()],
        )
        failed = [report for report in result.reprec.getfailures() if report.when == "call"]
        passed = {report.nodeid.partition("[")[0] for report in result.reprec.listoutcomes()[0]}
        return passed, {report.nodeid.partition("[")[0] for report in failed}

    yield run
    monkeypatch.undo()
    manager._loaded.cache_clear()


def test_the_backend_passes_without_a_change(suite):
    passed, failed = suite(*KILLERS)
    assert not failed
    assert passed == set(KILLERS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(suite, monkeypatch, name, record_kill):
    mutant = MUTANTS[name]
    with monkeypatch.context() as patch:
        mutant.change(patch)
        _, failed = suite(mutant.killer.partition("::")[0])
    assert failed, "the mutant survives all tests of this file"
    assert mutant.killer in failed, f"the mutant survives the test that is meant to kill it; killed by {failed}"
    record_kill(mutant, failed)
