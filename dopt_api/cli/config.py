"""``dopt config``: reading, editing, checking and comparing strategy files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dopt_api.cli.factories import call_factory
from dopt_api.cli.output import as_json_option, print_json, print_table

if TYPE_CHECKING:
    from dopt_api.config import StrategyFile

__all__ = ["command"]

FILE = click.Path(path_type=Path)
MODEL = "package.module:function that returns the float model (or session)."


EXAMPLES = """\b
Examples:
  dopt config set config.json --strategy Quant_INT8-8
  dopt config set config.json --strategy float --layer '*classifier*'
  dopt config set config.json --range mse --op-type '*Conv2d*' --dry-run
  dopt config set config.json --record-output --layer '*conv_pwl*'
"""


@click.group("config")
def command() -> None:
    """Write, show, edit, check and compare strategy files."""


@command.command("new")
@click.argument("model", metavar="FACTORY")
@click.argument("file", type=FILE)
@click.option("--input-shape", metavar="TEXT", help="Such as 'x:1,3,224,224'; see docs/strategy-file.md.")
@click.option("--backend", metavar="NAME", help="The backend.  [default: that of the model's type]")
def new(model: str, file: Path, input_shape: str | None, backend: str | None) -> None:
    """Write the strategy file of a model, every layer float.

    FACTORY is package.module:function, which returns the model; FILE is what to write.
    """
    from dopt_api import facade  # noqa: PLC0415  # help does not need it

    written = facade.generate_config(call_factory(model), input_shape, file, backend=backend)
    click.echo(f"{written}: {len(_read(written).layers)} layers")


@command.command("show")
@click.argument("file", type=FILE)
@as_json_option
def show(file: Path, as_json: bool) -> None:
    """Show the layers of a strategy file, and how many have which strategy."""
    layers = _read(file).layers
    if as_json:
        print_json({name: dict(entry) for name, entry in layers.items()})
        return
    columns: tuple[str, ...] = ("layer", "op_type", "strategy", "range")
    rows = [_row(name, entry) for name, entry in layers.items()]
    if any("output" in entry for entry in layers.values()):
        columns += ("output",)
        rows = [(*row, _text(entry.get("output"))) for row, entry in zip(rows, layers.values(), strict=True)]
    print_table(columns, rows)
    click.echo(f"\n{len(layers)} layers: {_counted(layers)}")


@command.command("set", epilog=EXAMPLES)
@click.argument("file", type=FILE)
@click.option("--strategy", metavar="NAME", help="The strategy to give, or float.")
@click.option("--range", "range_method", metavar="NAME", help="The range method to give.")
@click.option("--record-output/--no-record-output", default=None, help="Record the layers' outputs as well, or not.")
@click.option(
    "--layer", "patterns", metavar="PATTERN", multiple=True, help="Layers by name; * and ? stand for any text."
)
@click.option("--op-type", "op_types", metavar="PATTERN", multiple=True, help="Layers by kind, likewise.")
@click.option("--output", type=FILE, help="The file to write.  [default: FILE itself]")
@click.option("--dry-run", is_flag=True, help="Show what would change, and write nothing.")
@as_json_option
def set_(
    file: Path,
    strategy: str | None,
    range_method: str | None,
    record_output: bool | None,
    patterns: tuple[str, ...],
    op_types: tuple[str, ...],
    output: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Give layers of FILE another strategy or range, or record their outputs.

    Those whose name and kind match, by default all.
    """
    from dopt_api.config import assign  # noqa: PLC0415  # help does not need it

    if strategy is None and range_method is None and record_output is None:
        raise click.UsageError("Say what to give: --strategy NAME, --range NAME, --record-output, or several.")
    _check_names(strategy, range_method)
    layers = _read(file).layers
    _check_patterns(file, layers, patterns, op_types)
    chosen = [
        name
        for name, entry in layers.items()
        if _matches(name, patterns) and _matches(str(entry.get("op_type", "")), op_types)
    ]
    wanted = {"quant_strategy": strategy, "range": range_method, "output": record_output}
    changes = [
        {"layer": name, "key": key, "from": before, "to": value}
        for name in chosen
        for key, value in wanted.items()
        for before in [layers[name].get(key, False if key == "output" else None)]
        if value is not None and before != value
    ]
    if not dry_run and (changes or output is not None):
        assign(
            file,
            {} if strategy is None else dict.fromkeys(chosen, strategy),
            output,
            ranges={} if range_method is None else dict.fromkeys(chosen, range_method),
            outputs={} if record_output is None else dict.fromkeys(chosen, record_output),
        )
    if as_json:
        print_json({"matched": len(chosen), "changes": changes, "written": not dry_run})
        return
    if changes:
        print_table(("layer", "key", "from", "to"), (tuple(map(_text, c.values())) for c in changes))
    verb = "would change" if dry_run else "changed"
    click.echo(f"{len({c['layer'] for c in changes})} of {len(chosen)} matching layers {verb}.")


@command.command("check")
@click.argument("file", type=FILE)
@click.option("--model", metavar="FACTORY", help=f"Check against a model too: {MODEL}")
@click.option("--backend", metavar="NAME", help="The backend.  [default: that of the model's type]")
def check(file: Path, model: str | None, backend: str | None) -> None:
    """Check a strategy file: its syntax and names, and with --model that it is that of the model."""
    from dopt_api.config import records_output  # noqa: PLC0415  # help does not need it
    from dopt_api.strategy import find_strategy, strategy_names  # noqa: PLC0415  # likewise

    content = _read(file)
    for name, entry in content.layers.items():
        where = content.where("layer_strategy", name)
        strategy = find_strategy(
            entry["quant_strategy"],
            layer=name,
            op_type=str(entry.get("op_type")),
            supported=strategy_names(),
            where=where,
        )
        records_output(content, name, strategy)
        _check_names(None, entry.get("range"))
    if model is not None:
        from dopt_api import facade  # noqa: PLC0415  # as above

        facade.check(call_factory(model), file, backend=backend)
    quantized = sum(entry["quant_strategy"] != "float" for entry in content.layers.values())
    against = "and fits the model" if model is not None else "(not compared with a model: --model FACTORY)"
    click.echo(f"{file} is valid {against}: {quantized} of {len(content.layers)} layers are quantized.")


@command.command("diff")
@click.argument("one", type=FILE)
@click.argument("other", type=FILE)
@as_json_option
def diff(one: Path, other: Path, as_json: bool) -> None:
    """Show in which layers two strategy files differ; exit status 1 if they do."""
    first, second = _read(one).layers, _read(other).layers
    rows = [
        {"layer": name, "key": key, "one": before.get(key), "other": after.get(key)}
        for name in dict.fromkeys([*first, *second])
        for before, after in [(first.get(name, {}), second.get(name, {}))]
        for key in ("op_type", "quant_strategy", "range", "output")
        if before.get(key) != after.get(key)
    ]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(
            ("layer", "key", str(one), str(other)),
            (tuple(map(_text, row.values())) for row in rows),
        )
    else:
        click.echo("The files have the same layers, strategies and ranges.")
    if rows:
        click.get_current_context().exit(1)


def _read(file: Path) -> StrategyFile:
    from dopt_api.config import read  # noqa: PLC0415  # help does not need it

    return read(file)


def _row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    return name, str(entry.get("op_type", "")), str(entry["quant_strategy"]), str(entry.get("range", ""))


def _text(value: object) -> str:
    """Return a value as JSON has it, but without quotes."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _counted(layers: Mapping[str, Mapping[str, Any]]) -> str:
    counts = Counter(str(entry["quant_strategy"]) for entry in layers.values())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _matches(text: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(text, pattern) for pattern in patterns)


def _check_names(strategy: str | None, range_method: str | None) -> None:
    """Refuse a strategy or a range that does not exist."""
    from dopt_api.errors import closest  # noqa: PLC0415  # help does not need it
    from dopt_api.quantizer.ranges import range_method_names  # noqa: PLC0415  # likewise
    from dopt_api.strategy import FLOAT, strategy_names  # noqa: PLC0415  # likewise

    for kind, name, known in (
        ("strategy", strategy, (FLOAT, *strategy_names())),
        ("range method", range_method, range_method_names()),
    ):
        if name is not None and name not in known:
            raise click.ClickException(
                f"There is no {kind} {name!r}. Expected: one of {', '.join(known)}. {closest(name, known)}".strip()
            )


def _check_patterns(
    file: Path, layers: Mapping[str, Mapping[str, Any]], patterns: Sequence[str], op_types: Sequence[str]
) -> None:
    """Refuse a pattern that matches nothing: it is a slip of the pen."""
    from dopt_api.errors import closest  # noqa: PLC0415  # help does not need it

    kinds = sorted({str(entry.get("op_type", "")) for entry in layers.values()})
    for option, given, texts in (("--layer", patterns, list(layers)), ("--op-type", op_types, kinds)):
        for pattern in given:
            if not any(fnmatchcase(text, pattern) for text in texts):
                hint = closest(pattern, texts) or "Use * for any text, as in '*conv*'."
                raise click.ClickException(f"{option} {pattern!r} matches no layer of {file}. {hint}")
