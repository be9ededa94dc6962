"""``dopt tune FACTORY CONFIG``: the strategy of each layer under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dopt_api.cli.factories import Batches, call_factory, data_factory_option
from dopt_api.cli.output import as_json_option, make_folder, print_json, print_table

if TYPE_CHECKING:
    from dopt_api.search import Choice, Point

__all__ = ["command"]

EXAMPLES = """\b
Example: the weights at 70 % of their 8-bit size
  dopt config set config.json --strategy Quant_INT8-8
  dopt tune my_project.models:build config.json --data my_project.data:batches --budget 70% \\
      --strategy Quant_INT8-8 --strategy Quant_INT8-4 --output mixed.json
"""

FILE = click.Path(path_type=Path, dir_okay=False)
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Budgets of the picture, as shares of what the strategy file costs."""


def _share(_context: click.Context, _parameter: click.Parameter, text: str) -> float:
    """Return ``70%`` or ``0.7`` as a number."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < float("inf"):
        raise click.BadParameter(f"{text!r} is no share, such as 70% or 0.7.")
    if share > 8 and not text.endswith("%"):
        raise click.BadParameter(f"{text!r} is {text} times what CONFIG costs. Did you mean {text}%?")
    return share


@click.command("tune", epilog=EXAMPLES)
@click.argument("factory", metavar="FACTORY")
@click.argument("config", type=click.Path(path_type=Path))
@data_factory_option
@click.option(
    "--budget", required=True, callback=_share, metavar="SHARE", help="Share of what CONFIG costs as it is: 70% or 0.7."
)
@click.option(
    "--strategy", "strategies", multiple=True, metavar="NAME", help="One to choose from.  [default: integers]"
)
@click.option(
    "--cost",
    type=click.Choice(["size", "bit_operations"]),
    default="size",
    show_default=True,
    help="What the budget is of: bits of weights, or multiplications times bits.",
)
@click.option("--output", type=FILE, help="The strategy file to write; beside it NAME.tuning.json, for dopt report.")
@click.option("--picture", type=FILE, help="A picture of the trade-off: .png, .svg or .pdf (needs Matplotlib).")
@click.option("--output-name", "output_names", multiple=True, metavar="NAME", help="For TensorFlow: an output.")
@click.option("--backend", metavar="NAME", help="The backend.  [default: that of the model's type]")
@as_json_option
def command(
    factory: str,
    config: Path,
    data: str,
    budget: float,
    strategies: tuple[str, ...],
    cost: str,
    output: Path | None,
    picture: Path | None,
    output_names: tuple[str, ...],
    backend: str | None,
    as_json: bool,
) -> None:
    """Choose the strategies of the layers that CONFIG quantizes: least damage within a budget.

    The damage of each layer alone is measured over the data, and the choice is exact for their sum. What that leaves
    out is in docs/mixed-precision.md: measure the result. FACTORY is package.module:function, which returns the model.
    """
    from dopt_api import extensions, facade, manager, search  # noqa: PLC0415  # help does not need it
    from dopt_api.errors import closest  # noqa: PLC0415  # likewise
    from dopt_api.strategy import INTEGER_STRATEGIES, strategy_names  # noqa: PLC0415  # likewise

    known = strategy_names()
    for name in strategies:
        if name not in known:
            raise click.ClickException(f"There is no strategy {name!r}. {closest(name, known)}".strip())
    model = call_factory(factory)
    chosen = manager.select(model, backend)
    plan = facade.check(model, config, backend=chosen.name)
    if not plan.quantized:
        raise click.ClickException(
            f"Every layer in {config} is 'float'. Fix: dopt config set {config} --strategy Quant_INT8-8 (or another)."
        )
    try:
        measure, _ = extensions.load(extensions.SENSITIVITY, chosen.name)
    except KeyError:
        raise click.ClickException(f"The backend {chosen.name!r} does not measure sensitivities.") from None
    present = {name: layer.strategy.name for name, layer in plan.quantized.items()}
    offered = list(dict.fromkeys([*(strategies or INTEGER_STRATEGIES), *present.values()]))
    for file in filter(None, (output, picture)):
        make_folder(file.parent)  # what cannot be written or chosen is said before the work
    search.require_solver()
    batches = Batches(data)
    with batches.told():
        choices = measure(model, config, batches, offered, cost=cost, output_names=output_names)
    whole = sum(choice.cost for choice in choices if present.get(choice.layer) == choice.strategy)
    allowed = [one for one in choices if not strategies or one.strategy in (*strategies, "float")]
    point = search.choose(allowed, budget * whole)
    files = _written(config, output, picture, choices, allowed, point, budget, whole, cost)
    if as_json:
        found = {"strategies": point.strategies, "damage": point.damage, "cost": point.cost, "of": whole}
        print_json({**found, "files": [str(file) for file in files]})
        return
    damages = {(one.layer, one.strategy): one.damage for one in choices}
    rows = [(name, strategy, f"{damages[name, strategy]:.2e}") for name, strategy in point.strategies.items()]
    print_table(("layer", "strategy", "damage"), rows, right=("damage",))
    click.echo(
        f"\ncost: {point.cost / whole:.1%} of {config}; predicted damage: {point.damage:.2e} of the outputs' energy"
    )
    for file in files:
        click.echo(file)


def _written(
    config: Path,
    output: Path | None,
    picture: Path | None,
    choices: Sequence[Choice],
    allowed: Sequence[Choice],
    point: Point,
    budget: float,
    whole: float,
    cost: str,
) -> list[Path]:
    """Write the files that are asked for, and return them."""
    from dopt_api import config as strategy_files  # noqa: PLC0415  # help does not need it
    from dopt_api import search  # noqa: PLC0415  # likewise
    from dopt_api.report.notes import tuning_beside, write_tuning  # noqa: PLC0415  # likewise

    files: list[Path] = []
    if picture is None and output is None:
        return files
    least = sum(min(one.cost for one in allowed if one.layer == name) for name in point.strategies)
    shares = [share for share in SHARES if share != budget and share * whole >= least]
    points = [point, *search.trade_off(allowed, [share * whole for share in shares])]
    if picture is not None:
        from dopt_api.plots import plot_trade_off  # noqa: PLC0415  # an extra

        files.append(plot_trade_off(points, picture, cost=cost))
    if output is not None:
        strategy_files.assign(config, point.strategies, output)
        files += [output, write_tuning(tuning_beside(output), output, choices, points, whole, cost)]
    return files
