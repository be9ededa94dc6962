"""``dopt params``: showing and comparing parameter files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dopt_api.cli.output import as_json_option, print_json, print_table

if TYPE_CHECKING:
    from dopt_api.params import LayerParams

__all__ = ["command"]

FILE = click.Path(path_type=Path)


@click.group("params")
def command() -> None:
    """Show and compare quant_params.json files, given as such or by their folder."""


@command.command("show")
@click.argument("file", type=FILE)
@as_json_option
def show(file: Path, as_json: bool) -> None:
    """Show each quantized layer with its scales."""
    layers = _layers(file)
    if as_json:
        print_json([asdict(layer) for layer in layers.values()])
        return
    columns: tuple[str, ...] = ("layer", "strategy", "input", "scale", "zero point", "weight", "channels")
    columns += ("least scale", "greatest")
    rows = [_row(layer) for layer in layers.values()]
    if any(layer.output for layer in layers.values()):
        columns += ("output scale", "output zero point")
        rows = [(*row, *_output(layer)) for row, layer in zip(rows, layers.values(), strict=True)]
    print_table(columns, rows, right=columns[3:5] + columns[6:])


@command.command("diff")
@click.argument("one", type=FILE)
@click.argument("other", type=FILE)
@as_json_option
def diff(one: Path, other: Path, as_json: bool) -> None:
    """Show in which layers two parameter files differ, and by how much; exit status 1 if they do."""
    first, second = _layers(one), _layers(other)
    rows = [
        {"layer": name, **_difference(first.get(name), second.get(name))}
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ]
    if as_json:
        print_json(rows)
    elif rows:
        columns = ("layer", "difference", "input scale", "weight scale", "output scale")
        cells = (
            (row["layer"], row["what"], *(_percent(row[part]) for part in ("input", "weight", "output")))
            for row in rows
        )
        print_table(columns, cells, right=columns[2:])
    else:
        click.echo(f"The files have the same {len(first)} layers and numbers.")
    if rows:
        click.get_current_context().exit(1)


def _layers(file: Path) -> dict[str, LayerParams]:
    from dopt_api.params import read_params  # noqa: PLC0415  # help does not need it

    params = read_params(file / "quant_params.json" if file.is_dir() else file)
    return {layer.name: layer for layer in params.layers}


def _row(layer: LayerParams) -> tuple[object, ...]:
    scales = layer.weight.scale
    return (
        layer.name,
        layer.strategy,
        layer.input.dtype,
        *((f"{layer.input.scale[0]:.6g}", layer.input.zero_point[0]) if layer.input.quantized else ("", "")),
        layer.weight.dtype,
        len(scales),
        f"{min(scales):.6g}",
        f"{max(scales):.6g}",
    )


def _output(layer: LayerParams) -> tuple[object, ...]:
    return ("", "") if layer.output is None else (f"{layer.output.scale[0]:.6g}", layer.output.zero_point[0])


def _difference(one: LayerParams | None, other: LayerParams | None) -> dict[str, Any]:
    """Return what differs, and the greatest relative change of the scales."""
    if one is None or other is None:
        what = f"only in the {'second' if one is None else 'first'}"
        return {"what": what, "input": None, "weight": None, "output": None}
    pairs = {
        "strategy": (one.strategy, other.strategy),
        "node": (one.node, other.node),
        "input": (one.input, other.input),
        "weight": (one.weight, other.weight),
        "bias": (one.bias, other.bias),
        "output": (one.output, other.output),
    }
    what = ", ".join(key for key, (before, after) in pairs.items() if before != after) or "other calls"
    return {
        "what": what,
        "input": _change(one.input.scale, other.input.scale),
        "weight": _change(one.weight.scale, other.weight.scale),
        "output": None if one.output is None or other.output is None else _change(one.output.scale, other.output.scale),
    }


def _change(one: tuple[float, ...], other: tuple[float, ...]) -> float | None:
    if len(one) != len(other) or not one:
        return None
    return max(abs(after - before) / before for before, after in zip(one, other, strict=True))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.3%}"
