"""``dopt report OUTPUT_DIR``: what became of a network, on one page."""

from __future__ import annotations

from pathlib import Path

import click

from dopt_api.cli.output import as_json_option, print_json
from dopt_api.cli.verify import data_option, read_arrays

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  dopt report output
  dopt report output --data batch.npz --fact 'top-1 accuracy=75.1 %, float 75.3 %'
"""


def _facts(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return what is given as ``NAME=VALUE``."""
    facts = []
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise click.BadParameter(f"{text!r} is no NAME=VALUE, such as 'top-1 accuracy=75.1 %'.")
        facts.append((name.strip(), value.strip()))
    return facts


@click.command("report", epilog=EXAMPLES)
@click.argument("output_dir", type=click.Path(path_type=Path, file_okay=False))
@data_option("not run: the page has no figures of outputs")
@click.option(
    "--tuning",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What dopt tune wrote beside its strategy file.  [default: tuning.json in OUTPUT_DIR, where there is one]",
)
@click.option(
    "--fact", "facts", multiple=True, metavar="NAME=VALUE", callback=_facts, help="A line more for the summary."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page to write.  [default: report.html in OUTPUT_DIR]",
)
@as_json_option
def command(
    output_dir: Path,
    data: Path | None,
    tuning: Path | None,
    facts: list[tuple[str, str]],
    output: Path | None,
    as_json: bool,
) -> None:
    """Write an HTML page about an export: what is quantized, what it costs, and where it came from.

    OUTPUT_DIR is the folder of an export. The page is one file that needs no network: summary, layers with search and
    sort, weights and inputs over their grids, the model drawn, sensitivity and trade-off where dopt tune was run.
    """
    from dopt_api.report import write_report  # noqa: PLC0415  # help does not need it

    feeds = None if data is None else [read_arrays(data)]
    try:
        page = write_report(output_dir, output, feeds=feeds, tuning=tuning, facts=facts)
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"dopt report --data needs {error.name}, which is not installed. Fix: pip install 'dopt-api[verify]'."
        ) from error
    if as_json:
        print_json({"files": [str(page)]})
        return
    click.echo(page)
