"""The code of the documentation, taken out of its pages and run.

A fence's first word is its language; more words say what the tests do with it::

    ```python              run, after the page's other blocks, where the page's framework is installed
    ```python torch        the same, on a page that has code for both frameworks
    ```python torch file=my_project/models.py    written to that file
    ```python not-run: somebody else's library   not run, for that reason
    ```pycon               run as a doctest: what it shows is what it prints, errors included
    ```console torch       its ``dopt`` commands are run; without a framework only their options are checked

A comment ``<!-- python`` ... ``-->`` is code that readers do without: what stands for their own model and data.
"""

from __future__ import annotations

import doctest
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROWS = ("core", "torch", "tf")
FENCE = re.compile(r"^(?:```(\w+)|<!-- (python)\b)(?: ([^\n]*))?\n(.*?)^(?:```|-->)$", re.MULTILINE | re.DOTALL)
FRAMEWORK = re.compile(r"^\s*(?:from|import) (?:dopt\.)?(?:dopt_)?(torch|tf|tensorflow)\b", re.MULTILINE)
DOCTEST = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One fence: where its code begins, its language, the words behind that, and the row of the matrix that runs it."""

    page: Path
    line: int
    language: str
    words: str
    code: str
    row: str = ""

    @property
    def marked_row(self) -> str:
        """The row that the block itself names, if it does."""
        return next((word for word in self.words.split() if word in ROWS), "")

    @property
    def runs(self) -> bool:
        """Whether there is something to run."""
        return not self.not_run and self.language in ("python", "pycon")

    @property
    def not_run(self) -> str:
        """Why the block is not run; empty where it is."""
        return self.words.partition("not-run:")[2].strip()

    @property
    def file(self) -> str:
        """The file that the block is; empty where it is code to run."""
        return next((word[5:] for word in self.words.split() if word.startswith("file=")), "")


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that have a language, in order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text[: match.start(4)].count("\n"), match[1] or match[2], match[3] or "", match[4])
        for match in FENCE.finditer(text)
    ]
    ours = [block.code for block in found if block.language == "python" and not block.not_run]
    frameworks = {name.replace("tensorflow", "tf") for code in ours for name in FRAMEWORK.findall(code)}
    row = "" if len(frameworks) > 1 else next(iter(frameworks), "core")
    return [replace(block, row=block.marked_row or row) for block in found]


def pages(row: str) -> list[Path]:
    """Return the pages that have something to run in a row."""
    return [page for page in PAGES if any(block.row == row and block.runs for block in blocks(page))]


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def run(page: Path, row: str, folder: Path) -> dict[str, Any]:
    """Run a page's blocks of one row, one after the other in one namespace, and return the namespace.

    The current folder is to be ``folder``, which is empty.
    """
    for module in [name for name in sys.modules if name.split(".")[0] == "my_project"]:
        del sys.modules[module]  # another page's
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.row != row or block.not_run:
            continue
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True), names)
        elif block.language == "pycon":
            _run_doctest(block, names)
        elif block.language == "console" and row in block.words.split():
            for arguments in commands(block.code):
                _run_command(arguments, f"{name_of(page)}, line {block.line + 1}")
    return names


def _run_doctest(block: Block, names: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(block.code, names, name_of(block.page), str(block.page), block.line)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=DOCTEST).run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)
    names.update(test.globs)


def commands(code: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of ``dopt`` in the code of a console."""
    for line in code.replace("\\\n", " ").replace(" && ", "\n").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["dopt"]:
            yield words[1:]


def _run_command(arguments: list[str], where: str) -> None:
    from click.testing import CliRunner

    from dopt_api.cli.group import dopt

    result = CliRunner().invoke(dopt, arguments)
    assert result.exit_code == 0, f"{where}: dopt {shlex.join(arguments)}: {result.output}{result.exception!r}"


def check_options(arguments: list[str]) -> None:
    """Raise ``click.UsageError`` where a call of ``dopt`` names a command or an option that does not exist."""
    from dopt_api.cli.group import dopt

    command: click.Command = dopt
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        _, found, arguments = command.resolve_command(click.Context(command), arguments)
        assert found is not None
        command = found
    command.make_parser(click.Context(command, info_name=command.name)).parse_args(list(arguments))
