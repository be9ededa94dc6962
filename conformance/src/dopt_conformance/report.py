"""What came of a run: counts for each capability, what is wrong with the run as a whole, and the JSON report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dopt_api
from dopt_api.types import HOOK_API_VERSION, BackendInfo, Capabilities
from dopt_conformance._version import __version__
from dopt_conformance.gaps import Gap

__all__ = ["CORE", "FORMAT", "VERSION", "Counts", "Tally", "claimed"]

FORMAT, VERSION = "dopt.conformance", 1

CORE = "core"
"""The capability of tests that every backend runs."""

OUTCOMES = ("passed", "declared", "gaps", "failed", "skipped")


@dataclass
class Counts:
    """How the tests of one capability ended.

    Attributes:
        passed: They passed.
        declared: They were not run: the backend does not claim the capability, or was written for an older hook API.
        gaps: They failed as the list of known gaps says.
        failed: They failed otherwise, or passed in spite of a known gap.
        skipped: They skipped themselves.
    """

    passed: int = 0
    declared: int = 0
    gaps: int = 0
    failed: int = 0
    skipped: int = 0


def claimed(info: BackendInfo) -> frozenset[str]:
    """Return the names of the capabilities that a backend claims, the core included.

    Example:
        >>> info = BackendInfo("mine", "numpy", "2.0", "0.1.0", (), "1.0", Capabilities(retraining=True))
        >>> sorted(claimed(info))
        ['core', 'retraining']
    """
    return frozenset([CORE, *(name for name, claims in asdict(info.capabilities).items() if claims)])


@dataclass
class Tally:
    """The counts of a run.

    Attributes:
        info: The backend.
        profile: How thoroughly the laws were tried.
        gaps: The known gaps.
        counts: By capability.
        complete: Whether every module of the suite was collected.
        unmatched: Gaps that no test of the suite is about.
        undue: Gaps about tests that are not run, with the capability that is not claimed.
        surprises: Tests that passed in spite of a known gap.
    """

    info: BackendInfo
    profile: str
    gaps: Sequence[Gap] = ()
    counts: dict[str, Counts] = field(default_factory=lambda: {name: Counts() for name in _capabilities()})
    complete: bool = False
    unmatched: list[Gap] = field(default_factory=list)
    undue: list[tuple[Gap, str]] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)

    def add(self, capability: str, outcome: str) -> None:
        """Count one test."""
        counts = self.counts[capability]
        setattr(counts, outcome, getattr(counts, outcome) + 1)

    def errors(self) -> list[str]:
        """Return what is wrong with the run beyond tests that failed, each as a sentence with the fix."""
        result = [
            f"The known gap {gap.test!r} is about no test. Fix: correct its name, or remove the entry."
            for gap in self.unmatched
        ]
        result += [
            f"The known gap {gap.test!r} is about the capability {capability!r}, which the backend does not claim. "
            "Fix: remove the entry; what is not claimed is not tested."
            for gap, capability in self.undue
        ]
        result += [
            f"{test} passes in spite of a known gap. Fix: remove its entry from the list of gaps."
            for test in self.surprises
        ]
        for capability in sorted(claimed(self.info)):
            counts = self.counts[capability]
            if counts.skipped:
                result.append(
                    f"{counts.skipped} tests of {_spoken(capability)} were skipped. Fix: give them what they need (the "
                    "reasons are in the summary of pytest -rs), or list them as known gaps."
                )
            ran = counts.passed + counts.failed + counts.gaps
            if not ran and (capability == CORE or self.complete):
                result.append(
                    f"No test of {_spoken(capability)} ran, so that this run says nothing about it. "
                    "Fix: run the whole suite: pytest --pyargs dopt_conformance, without -k, -m or single tests."
                )
        return result

    def content(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        claims = claimed(self.info)
        return {
            "format": FORMAT,
            "version": VERSION,
            "suite": __version__,
            "dopt_api": dopt_api.__version__,
            "hook_api": HOOK_API_VERSION,
            "backend": self.info.name,
            "backend_version": self.info.version,
            "backend_hook_api": self.info.hook_api_version,
            "framework": self.info.framework,
            "framework_version": self.info.framework_version,
            "profile": self.profile,
            "complete": self.complete,
            "capabilities": {
                name: {"claimed": name in claims, **asdict(counts)} for name, counts in self.counts.items()
            },
            "gaps": [asdict(gap) for gap in self.gaps],
            "errors": self.errors(),
        }

    def write(self, file: Path) -> None:
        """Write the report, into a folder that is made if it is not there."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """Return the counts for the terminal."""
        head = f"{'capability':26}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES)
        rows = [
            f"{name:26}" + "".join(f"{count:10}" for count in asdict(counts).values())
            for name, counts in self.counts.items()
        ]
        return [head, *rows]


def _capabilities() -> list[str]:
    return [CORE, *asdict(Capabilities())]


def _spoken(capability: str) -> str:
    return "the core" if capability == CORE else f"the claimed capability {capability!r}"
