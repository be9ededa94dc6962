"""``dopt convert PARAMS --to FORMAT``: an exported model in the form that a runtime takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dopt_api.formats.integer_nodes import NodeKind

__all__ = ["command"]


def _list(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print the names of all formats and stop."""
    from dopt_api.formats import format_names  # noqa: PLC0415  # help does not need it

    if wanted and not context.resilient_parsing:
        for name in format_names():
            click.echo(name)
        context.exit()


@click.command("convert")
@click.argument("params", type=click.Path(path_type=Path))
@click.option("--to", "formats", metavar="FORMAT", multiple=True, help="The format; may be given several times.")
@click.option(
    "--output-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="An existing folder for the files.  [default: that of PARAMS]",
)
@click.option(
    "--list",
    "listing",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list,
    help="Print the names of all formats.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(params: Path, formats: tuple[str, ...], output_dir: Path | None, as_json: bool) -> None:
    """Write an exported model in the form that a runtime takes.

    PARAMS is the quant_params.json of an export, with the model beside it, or the folder of both.
    """
    from dopt_api.formats import convert, format_names  # noqa: PLC0415  # help does not need it

    if not formats:
        raise click.UsageError(f"Say the format: --to {' or --to '.join(format_names())}.")
    file = params / "quant_params.json" if params.is_dir() else params
    written = {name: [str(path) for path in convert(file, name, output_dir or file.parent)] for name in formats}
    nodes = _nodes(file) if "onnx_qdq" in written else []
    if as_json:
        click.echo(json.dumps({**written, **({"nodes": [asdict(node) for node in nodes]} if nodes else {})}, indent=2))
        return
    for name, paths in written.items():
        for path in paths:
            click.echo(f"{name}: {path}")
    if nodes:
        from dopt_api.formats.integer_nodes import summary  # noqa: PLC0415  # needs onnx

        click.echo(f"onnx_qdq: {summary(nodes)}; dopt verify says why the others do not")


def _nodes(file: Path) -> list[NodeKind]:
    from dopt_api.formats.integer_nodes import integer_nodes  # noqa: PLC0415  # needs onnx

    return list(integer_nodes(file))
