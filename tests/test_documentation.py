"""The documentation does what it says: its code runs, its commands exist, and what is not run is known."""

from __future__ import annotations

import re

import click
import pytest
from snippets import PAGES, ROOT, ROWS, blocks, check_options, commands, name_of, pages, run

from dopt_api import errors

NOT_RUN = {"docs/deploy.md": 1, "docs/migration.md": 4}
"""How many blocks of a page are not run. Each says why; code of our own always runs."""

ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
KINDS = [name for name in errors.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("page", pages("core"), ids=name_of)
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run(page, "core", tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_python_has_a_row_that_runs_it_or_a_reason(page):
    found = [block for block in blocks(page) if block.language in ("python", "pycon")]
    for block in found:
        assert block.not_run or block.row in ROWS, f"line {block.line}: say torch, tf or core"
        assert not block.not_run or not re.search(r"\bdopt", block.code), f"line {block.line}: our own code has to run"
    assert sum(bool(block.not_run) for block in found) == NOT_RUN.get(name_of(page), 0)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_fence_is_overlooked(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*(?:```|~~~)py", text, re.MULTILINE)) == sum(
        block.language in ("python", "pycon") and "<!-- " not in text.splitlines()[block.line - 1]
        for block in blocks(page)
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_that_is_a_file_is_preceded_by_its_name(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        assert not block.file or lines[block.line - 3] == f"`{block.file}`:", f"line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page):
    code = re.findall(r"^```[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for arguments in commands("\n".join(part for part in code if re.search(r"^(\$ )?dopt ", part, re.MULTILINE))):
        check_options(arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_section_that_shows_it(kind):
    found = re.search(rf"^## `{kind}`$(.*?)(?=^## |\Z)", ERRORS, re.MULTILINE | re.DOTALL)
    assert found, f"docs/errors.md has no section about {kind}"
    assert kind == "DoptError" or f"\ndopt_api.errors.{kind}: " in found[1]


def test_no_section_is_about_an_error_that_does_not_exist():
    assert set(re.findall(r"^## `(\w+)`$", ERRORS, re.MULTILINE)) == set(KINDS)


@pytest.mark.parametrize("arguments", [["quantise"], ["quantize", "a:b", "c", "d", "--datum", "e"], ["config", "mend"]])
def test_a_command_that_does_not_exist_is_found(arguments):
    with pytest.raises(click.UsageError):
        check_options(arguments)
