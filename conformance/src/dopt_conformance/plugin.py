"""The plugin of pytest: options, which tests a backend runs, known gaps, and what is said at the end.

It does nothing in a run without ``--dopt-backend``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from dopt_api.types import BackendInfo
from dopt_conformance.gaps import DEFAULT_FILE, Gap, read_gaps
from dopt_conformance.harness import Harness
from dopt_conformance.loading import find_harness, load_backend
from dopt_conformance.profiles import PROFILES, load_profile
from dopt_conformance.report import CORE, Tally, claimed

__all__ = ["HARNESS", "INFO"]

INFO = pytest.StashKey[BackendInfo]()
"""Where the configuration keeps the description of the backend under test."""

HARNESS = pytest.StashKey[Harness]()
"""Where it keeps the harness."""

PACKAGE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suite."""
    group = parser.getgroup("dopt", "conformance of a backend of dopt (pytest --pyargs dopt_conformance)")
    group.addoption("--dopt-backend", metavar="NAME", help="the backend to test, by the name of its entry point")
    group.addoption(
        "--dopt-harness", metavar="MODULE:CLASS", help="its harness, unless the group dopt.conformance has one"
    )
    group.addoption(
        "--dopt-profile", choices=PROFILES, default="dev", help="how many examples of each law, and models: %(choices)s"
    )
    group.addoption(
        "--dopt-known-gaps", metavar="FILE", type=Path, help=f"tests that are known to fail (default: ./{DEFAULT_FILE})"
    )
    group.addoption("--dopt-report", metavar="FILE", type=Path, help="write the result as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Load backend, harness and gaps; whatever is wrong with them ends the run with a sentence."""
    config.addinivalue_line("markers", "capability(name): run only for backends that claim this capability")
    config.addinivalue_line("markers", "since(version): the version of the hooks that brought what is tested")
    name: str | None = config.getoption("--dopt-backend")
    if name is None:
        if any(argument.split("::")[0].split(".")[0] == PACKAGE.name for argument in config.args):
            raise pytest.UsageError("The suite needs a backend to test. Fix: pass --dopt-backend NAME.")
        return
    profile: str = config.getoption("--dopt-profile")
    info = config.stash[INFO] = load_backend(name).info
    config.stash[HARNESS] = find_harness(name, config.getoption("--dopt-harness"))
    given: Path | None = config.getoption("--dopt-known-gaps")
    file = config.invocation_params.dir / (given or DEFAULT_FILE)
    gaps = read_gaps(file) if given or file.is_file() else ()
    load_profile(profile)
    config.pluginmanager.register(Conformance(Tally(info, profile, gaps)), "dopt-conformance-run")


class Conformance:
    """The hooks of a run with a backend."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.errors: list[str] = []

    @pytest.hookimpl(tryfirst=True)  # before tests are deselected by -k and -m
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark the tests that are not run, and those that are known to fail."""
        own = [item for item in items if PACKAGE in item.path.parents]
        claims = claimed(self.tally.info)
        matched: set[Gap] = set()
        for item in own:
            capability = _argument(item, "capability") or CORE
            since = _argument(item, "since")
            if capability not in self.tally.counts or since is None:
                raise pytest.UsageError(f"{item.nodeid} has no mark 'since', or one of an unknown capability.")
            due = capability in claims and _version(since) <= _version(self.tally.info.hook_api_version)
            item.user_properties += [("dopt_capability", capability), ("dopt_declared", not due)]
            for gap in self.tally.gaps:
                if not gap.matches(_name(item)):
                    continue
                matched.add(gap)
                if due:
                    item.add_marker(gap.mark())
                elif (gap, capability) not in self.tally.undue:
                    self.tally.undue.append((gap, capability))
            if not due:
                item.add_marker(pytest.mark.skip(reason=f"the backend does not claim {capability} since {since}"))
        self.tally.complete = {item.path for item in own} == set(PACKAGE.glob("*/test_*.py"))
        if self.tally.complete:
            self.tally.unmatched = [gap for gap in self.tally.gaps if gap not in matched]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: when it is called, or when it did not come to that, or fails afterwards."""
        properties = dict(report.user_properties)
        if "dopt_capability" not in properties or (report.when != "call" and report.passed):
            return
        outcome: str = report.outcome
        if report.skipped:
            outcome = "gaps" if hasattr(report, "wasxfail") else "declared" if properties["dopt_declared"] else outcome
        elif report.failed and str(report.longrepr).startswith("[XPASS(strict)]"):
            self.tally.surprises.append(report.nodeid)
        self.tally.add(str(properties["dopt_capability"]), outcome)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report; a run that proves nothing does not succeed."""
        if hasattr(session.config, "workerinput") or session.config.getoption("--collect-only"):
            return
        self.errors = self.tally.errors()
        if self.errors and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if file := session.config.getoption("--dopt-report"):
            self.tally.write(session.config.invocation_params.dir / file)

    def pytest_report_header(self) -> str:
        """Say what is tested."""
        info = self.tally.info
        claims = ", ".join(sorted(claimed(info)))
        return f"dopt: backend {info.name} {info.version} on {info.framework} {info.framework_version}, claims {claims}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the counts, and what is wrong with the run as a whole."""
        terminalreporter.section(f"conformance of {self.tally.info.name}")
        _write(terminalreporter, self.tally.lines())
        _write(terminalreporter, (f"ERROR: {error}" for error in self.errors), red=True)


def _write(reporter: pytest.TerminalReporter, lines: Iterable[str], *, red: bool = False) -> None:
    for line in lines:
        reporter.write_line(line, red=red)


def _argument(item: pytest.Item, mark: str) -> str | None:
    found = item.get_closest_marker(mark)
    return None if found is None else str(found.args[0])


def _name(item: pytest.Item) -> str:
    """Return a test's name as gaps have it: its file within the suite, and its name with parameters."""
    return f"{item.path.relative_to(PACKAGE).as_posix()}::{item.name}"


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))
