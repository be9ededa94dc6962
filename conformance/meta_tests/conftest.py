"""What the tests of the suite share: backends and harnesses that are installed for one test, and the table of kills."""

from __future__ import annotations

import pytest
from installed import Installer

from dopt_api import manager

KILLS = pytest.StashKey[list]()


@pytest.fixture
def install(tmp_path_factory, monkeypatch):
    """Return a function that installs a backend called ``mine``, see :class:`installed.Installer`."""
    manager._loaded.cache_clear()
    yield Installer(tmp_path_factory.mktemp("site"), monkeypatch)
    manager._loaded.cache_clear()


@pytest.fixture
def record_kill(pytestconfig):
    """Return a function that takes a killed mutant and all tests that failed into the table."""
    rows = pytestconfig.stash.setdefault(KILLS, [])
    return lambda mutant, failed: rows.append((mutant.what, mutant.killer, len(failed) - 1))


def pytest_terminal_summary(terminalreporter, config):
    """Show which mutant was killed by which test."""
    if rows := config.stash.get(KILLS, None):
        terminalreporter.section("mutants")
        terminalreporter.write_line("| wrong backend | killed by | and by |\n|---|---|---|")
        for what, killer, others in rows:
            terminalreporter.write_line(f"| {what} | `{killer}` | {others} more of the file |")
