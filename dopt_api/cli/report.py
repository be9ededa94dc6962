"""``dopt report OUTPUT_DIR``: what became of a network, on one page."""

from __future__ import annotations

from pathlib import Path

import click

from dopt_api.cli.verify import data_option, read_arrays

__all__ = ["command"]


@click.command("report")
@click.argument("output_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@data_option("not run: the page has no figures of outputs")
@click.option(
    "--output", type=click.Path(path_type=Path), help="The page to write.  [default: report.html in OUTPUT_DIR]"
)
def command(output_dir: Path, data: Path | None, output: Path | None) -> None:
    """Write an HTML page about an export: summary, layers with search and sort, histograms, provenance.

    OUTPUT_DIR is the folder of an export. The page is one file that needs no network.
    """
    from dopt_api.report import write_report  # noqa: PLC0415  # help does not need it

    try:
        click.echo(write_report(output_dir, output, feeds=None if data is None else [read_arrays(data)]))
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"dopt report --data needs {error.name}, which is not installed. Fix: pip install 'dopt-api[verify]'."
        ) from error
