"""The table of support: what it says of a report, and that a page is checked against the runs."""

import json

import pytest

from dopt_conformance.report import FORMAT, VERSION
from dopt_conformance.table import main


@pytest.fixture
def report(tmp_path):
    """Return a function that writes a report with the counts of one capability."""

    def write(name="one", **counts):
        content = {
            "format": FORMAT,
            "version": VERSION,
            "backend": name,
            "backend_version": "0.1",
            "framework": "engine",
            "framework_version": "2.1+cpu",
            "profile": "ci",
            "complete": True,
            "errors": [],
            "gaps": [],
            "capabilities": {
                "core": {"claimed": True, "passed": 3, "declared": 0, "gaps": 0, "failed": 0, "skipped": 0, **counts}
            },
        }
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        return str(file)

    return write


@pytest.mark.parametrize(
    ("counts", "cell"),
    [
        ({}, "yes (3)"),
        ({"gaps": 1}, "yes (3 of 4)"),
        ({"failed": 2}, "**fails** (2 of 5)"),
        ({"claimed": False, "passed": 0, "declared": 3}, "no"),
        ({"passed": 0}, "not tested"),
    ],
)
def test_a_cell_says_what_was_seen(report, capsys, counts, cell):
    assert main([report(**counts)]) == 0
    assert f"| core | {cell} |" in capsys.readouterr().out


def test_backends_stand_side_by_side_with_the_public_version_of_their_framework(report, capsys):
    main([report("one"), report("two")])
    assert "| capability | one 0.1, engine 2.1 | two 0.1, engine 2.1 |" in capsys.readouterr().out


def test_a_page_is_current_until_a_run_differs(report, tmp_path, capsys):
    page = str(tmp_path / "support.md")
    assert main(["--check", page, report()]) == 1, "a page that is not there is not current"
    assert main(["--write", page, report()]) == 0
    assert main(["--check", page, report()]) == 0
    assert main(["--check", page, report(passed=4)]) == 1
    said = capsys.readouterr().err
    assert "+| core | yes (4) |" in said
    assert "--write" in said


def test_what_is_no_report_is_named(tmp_path, capsys):
    file = tmp_path / "other.json"
    assert main([str(file)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    file.write_text("[]")
    assert main([str(file)]) == 2
    assert "is no report of this suite" in capsys.readouterr().err
