"""A Markdown table of what backends support, from the reports of their runs.

``python -m dopt_conformance.table torch.json tf.json``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopt_conformance.report import FORMAT, VERSION

__all__ = ["main", "render"]


def render(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the table: a column for each report, a row for each capability.

    Example:
        >>> counts = {"claimed": True, "passed": 3, "declared": 0, "gaps": 1, "failed": 0, "skipped": 0}
        >>> print(render([{"backend": "mine", "backend_version": "0.1", "framework": "numpy", "framework_version": "2",
        ...     "complete": True, "errors": [], "capabilities": {"core": counts}}]))
        | capability | mine 0.1, numpy 2 |
        |---|---|
        | core | yes (3 of 4) |
    """
    names = list(dict.fromkeys(name for report in reports for name in report["capabilities"]))
    heads = [
        f"{report['backend']} {report['backend_version']}, {report['framework']} {report['framework_version']}"
        for report in reports
    ]
    rows = [[name, *(_cell(report, name) for report in reports)] for name in names]
    lines = [["capability", *heads], *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "---|" * (len(reports) + 1))
    remarks = [_remark(head, report) for head, report in zip(heads, reports, strict=True)]
    return "\n".join([*text, *(f"\n{remark}" for remark in remarks if remark)])


def _cell(report: Mapping[str, Any], name: str) -> str:
    counts = report["capabilities"].get(name)
    if counts is None:
        return "not known"
    if not counts["claimed"]:
        return "no"
    ran = counts["passed"] + counts["gaps"] + counts["failed"]
    if counts["failed"]:
        return f"**fails** ({counts['failed']} of {ran})"
    if not ran:
        return "not tested"
    return f"yes ({counts['passed']} of {ran})" if counts["gaps"] else f"yes ({ran})"


def _remark(head: str, report: Mapping[str, Any]) -> str:
    remarks = [] if report["complete"] else ["only a part of the suite was run"]
    remarks += [f"{gap['test']}: {gap['reason']} ({gap['kind']})" for gap in report.get("gaps", [])]
    remarks += report["errors"]
    return "\n".join([f"{head}:", *(f"- {remark}" for remark in remarks)]) if remarks else ""


def main(arguments: Sequence[str]) -> int:
    """Print the table of the reports that are named; return the exit status."""
    reports = []
    for name in arguments:
        try:
            content = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"The report {name!r} cannot be read: {error}.", file=sys.stderr)
            return 2
        if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            print(f"{name!r} is no report of this suite. Fix: write it by --dopt-report.", file=sys.stderr)
            return 2
        reports.append(content)
    if not reports:
        print("Usage: python -m dopt_conformance.table REPORT.json ...", file=sys.stderr)
        return 2
    print(render(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
