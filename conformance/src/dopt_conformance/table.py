"""A Markdown table of what backends support, from the reports of their runs.

``python -m dopt_conformance.table torch.json tf.json``
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopt_api.files import write_text
from dopt_conformance.report import FORMAT, VERSION

__all__ = ["main", "page", "render"]

HEAD = """\
# Support

What each backend has shown in the conformance suite (profile {profiles}): `yes` with the number of its tests, `no`
where it makes no claim. Made from the runs by `python -m dopt_conformance.table --write`, and checked against them in
continuous integration.
"""


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
    heads = [_head(report) for report in reports]
    rows = [[name, *(_cell(report, name) for report in reports)] for name in names]
    lines = [["capability", *heads], *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "---|" * (len(reports) + 1))
    remarks = [_remark(head, report) for head, report in zip(heads, reports, strict=True)]
    return "\n".join([*text, *(f"\n{remark}" for remark in remarks if remark)])


def _head(report: Mapping[str, Any]) -> str:
    framework_version = str(report["framework_version"]).partition("+")[0]  # builds of one version are alike
    return f"{report['backend']} {report['backend_version']}, {report['framework']} {framework_version}"


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return a page with the table, as the project's documentation has it."""
    profiles = ", ".join(sorted({f"`{report['profile']}`" for report in reports}))
    return f"{HEAD.format(profiles=profiles)}\n{render(reports)}\n"


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
    """Print the table of the reports that are named, write it to a file, or check that a file has it.

    Returns:
        The exit status: 0, or 1 where the file that is checked is not current, or 2 where a report cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m dopt_conformance.table", description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="what --dopt-report wrote")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", type=Path, metavar="FILE", help="write a page with the table")
    choice.add_argument("--check", type=Path, metavar="FILE", help="fail unless the page is that of the reports")
    given = parser.parse_args(arguments)
    reports = []
    for file in given.reports:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"The report {str(file)!r} cannot be read: {error}.", file=sys.stderr)
            return 2
        if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            print(f"{str(file)!r} is no report of this suite. Fix: write it by --dopt-report.", file=sys.stderr)
            return 2
        reports.append(content)
    if given.write is not None:
        write_text(given.write, page(reports))
    elif given.check is not None:
        return _check(given.check, page(reports), given.reports)
    else:
        print(render(reports))
    return 0


def _check(file: Path, wanted: str, reports: Sequence[Path]) -> int:
    found = file.read_text(encoding="utf-8") if file.is_file() else ""
    if found == wanted:
        return 0
    lines = difflib.unified_diff(found.splitlines(), wanted.splitlines(), str(file), "these runs", lineterm="")
    print("\n".join(lines), file=sys.stderr)
    names = " ".join(map(str, reports))
    print(
        f"{str(file)!r} is not what these runs gave. Fix: python -m dopt_conformance.table --write {file} {names}",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
