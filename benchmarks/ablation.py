"""What each algorithm adds: two real networks, strategy by strategy, with one algorithm after the other.

EfficientNet-Lite0 (logits against float: signal to noise, agreement of the first class) and a sentence transformer
(cosine of embeddings to float). Calibration and evaluation share no picture and no sentence; seeds are fixed. Prints
a table (on standard error) and JSON (on standard output, or to ``--output``); ``--plot`` draws it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import sentences
from benchmarks.report import environment, write_json
from benchmarks.workload import THREADS
from dopt.dopt_torch.opt_main import generate_config_file, optimize_model
from dopt_api.errors import DoptError
from dopt_api.quantizer import RANGE_METHODS
from dopt_torch.equalization import equalize
from dopt_torch.optimize import set_calibrate_state
from dopt_torch.rounding import round_weights
from dopt_torch.running import run
from dopt_torch.smoothing import smooth
from examples.efficientnet_lite import data as pictures
from examples.efficientnet_lite.data import MissingDataError
from examples.efficientnet_lite.program import choose_strategy

__all__ = ["main"]

DEFAULT = ["efficientnet-lite0", "all-MiniLM-L6-v2"]

Scores = dict[str, float]


@dataclass(frozen=True)
class Network:
    """A network, its data, and by what it is judged.

    Attributes:
        build: Returns the float network, in evaluation mode.
        input_shape: As the strategy file has it.
        calibration: Batches for ranges.
        few: Those of them that the slower algorithms look at.
        evaluation: Batches to be judged by.
        judge: Scores of outputs ``[N, C]`` against the float network's; the first one is drawn.
        strategies: What is compared.
        goals: For a strategy, what its first score should be.
    """

    build: Callable[[], nn.Module]
    input_shape: str
    calibration: Sequence[Any]
    few: Sequence[Any]
    evaluation: Sequence[Any]
    judge: Callable[[Tensor, Tensor], Scores]
    strategies: tuple[str, ...]
    goals: dict[str, float]


@dataclass(frozen=True)
class Recipe:
    """What is done to a network beside quantizing it."""

    range_method: str
    equalization: bool = False
    smoothing: float | None = None
    rounding: bool = False

    @property
    def name(self) -> str:
        """For the tables."""
        more = ["equalization"] if self.equalization else []
        more += [f"smoothing {self.smoothing:g}"] if self.smoothing is not None else []
        return " + ".join([self.range_method, *more, *(["rounding"] if self.rounding else [])])


RECIPES = (
    *(Recipe(method) for method in RANGE_METHODS),
    Recipe("min_max", equalization=True),
    Recipe("min_max", smoothing=0.5),
    Recipe("min_max", smoothing=0.75),
    Recipe("min_max", rounding=True),
    Recipe("mse", rounding=True),
    Recipe("min_max", smoothing=0.75, rounding=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=DEFAULT)
    recipes = [recipe.name for recipe in RECIPES]
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=recipes, metavar="RECIPE")
    parser.add_argument("--output", type=Path, help="file for the JSON (default: standard output)")
    parser.add_argument("--plot", type=Path, help="picture to draw (needs matplotlib)")
    parser.add_argument("--from", dest="kept", type=Path, help="draw or print what an earlier run wrote; run nothing")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    torch.set_num_threads(THREADS)
    try:
        if options.kept:
            report = json.loads(options.kept.read_text(encoding="utf-8"))
        else:
            rows = {name: _ablate(NETWORKS[name](), name, options.recipes, console) for name in options.networks}
            report = {"benchmark": "ablation", "environment": environment(THREADS), "networks": rows}
            write_json(report, options.output)
        for name, found in report["networks"].items():
            _show(name, found, console)
        if options.plot:
            _plot(report["networks"], options.plot)
    except (DoptError, MissingDataError, OSError) as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 1
    return 0


def _lite(number: int) -> Network:
    calibration = torch.split(pictures.calibration_set(128), 16)

    def judge(found: Tensor, wanted: Tensor) -> Scores:
        noise = (found - wanted).double().square().sum()
        agreement = (found.argmax(1) == wanted.argmax(1)).double().mean()
        return {
            "SQNR [dB]": float(10 * torch.log10(wanted.double().square().sum() / noise)),
            "agreement": float(agreement),
        }

    return Network(
        partial(pictures.build_model, number),
        pictures.INPUT_SHAPE,
        calibration,
        calibration[:4],
        torch.split(pictures.evaluation_set(200).pictures, 20),
        judge,
        ("Quant_INT8-8", "Quant_INT8-4"),
        {"Quant_INT8-8": 24.0, "Quant_INT8-4": 10.0} if number == 0 else {},
    )


def _minilm() -> Network:
    calibration = sentences.calibration_sentences(128)

    def judge(found: Tensor, wanted: Tensor) -> Scores:
        cosine = (found * wanted).sum(1)
        return {"cosine": float(cosine.mean()), "least cosine": float(cosine.min())}

    return Network(
        sentences.build_model,
        sentences.INPUT_SHAPE,
        calibration,
        calibration[:4],
        sentences.evaluation_sentences(200),
        judge,
        ("Quant_INT8-8", "Quant_INT8-4"),
        {"Quant_INT8-8": 0.995},
    )


NETWORKS: dict[str, Callable[[], Network]] = {
    **{f"efficientnet-lite{number}": partial(_lite, number) for number in range(3)},
    "all-MiniLM-L6-v2": _minilm,
}


def _ablate(network: Network, name: str, recipes: Collection[str], console: Console) -> list[dict[str, Any]]:
    """Return a row for each strategy and recipe."""
    model = network.build()
    begun = time.monotonic()
    _outputs(model, network.calibration)
    float_pass = time.monotonic() - begun
    wanted = _outputs(model, network.evaluation)
    rows = []
    for strategy in network.strategies:
        for recipe in [one for one in RECIPES if one.name in recipes]:
            quantized, seconds = _quantize(model, network, strategy, recipe)
            scores = network.judge(_outputs(quantized, network.evaluation), wanted)
            rows.append(
                {
                    "strategy": strategy,
                    "recipe": recipe.name,
                    **asdict(recipe),
                    "float_passes": seconds / float_pass,
                    "goal": network.goals.get(strategy),
                    "scores": scores,
                }
            )
            console.print(f"{name}, {strategy}, {recipe.name}: {scores}", highlight=False)
    return rows


def _quantize(model: nn.Module, network: Network, strategy: str, recipe: Recipe) -> tuple[nn.Module, float]:
    """Return the quantized network, and the seconds of all that needs data."""
    with tempfile.TemporaryDirectory(prefix="dopt-benchmark-") as folder:
        file = Path(folder) / "config.json"
        generate_config_file(model, network.input_shape, str(file))
        choose_strategy(file, strategy, recipe.range_method)
        quantized: nn.Module = optimize_model(model, str(file))
    begun = time.monotonic()
    if recipe.equalization:
        equalize(quantized)
    if recipe.smoothing is not None:
        smooth(quantized, network.calibration, strength=recipe.smoothing)
    set_calibrate_state(quantized, True)
    _outputs(quantized, network.calibration)
    set_calibrate_state(quantized, False)
    if recipe.rounding:
        round_weights(quantized, network.few)
    return quantized.eval(), time.monotonic() - begun


def _outputs(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(model, batch) for batch in batches])


def _show(name: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("strategy", "recipe", title=name)
    for column in (*rows[0]["scores"], "goal", "float passes"):
        table.add_column(column, justify="right")
    for row in rows:
        first, *others = (f"{score:.4g}" for score in row["scores"].values())
        reached = row["goal"] is not None and next(iter(row["scores"].values())) >= row["goal"]
        table.add_row(
            row["strategy"],
            row["recipe"],
            f"[green]{first}[/]" if reached else first,
            *others,
            "" if row["goal"] is None else f"{row['goal']:g}",
            f"{row['float_passes']:.1f}",
        )
    console.print(table)


def _plot(networks: dict[str, Sequence[dict[str, Any]]], file: Path) -> None:
    """Draw a panel of bars for each network and strategy."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # needed here alone

    panels = [
        (name, strategy, [row for row in rows if row["strategy"] == strategy])
        for name, rows in networks.items()
        for strategy in dict.fromkeys(row["strategy"] for row in rows)
    ]
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (name, strategy, rows) in zip(axes[0], panels, strict=True):
        score = next(iter(rows[0]["scores"]))
        loss = score == "cosine"  # which are all near 1: what they lack is what differs
        values = [1.0 - row["scores"][score] if loss else row["scores"][score] for row in rows]
        axis.barh([row["recipe"] for row in rows], values, color="#4878a8")
        axis.invert_yaxis()
        axis.set(title=f"{name}\n{strategy}", xlabel=f"1 - {score} (less is better)" if loss else score)
        axis.set_xscale("log" if loss else "linear")
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        if (goal := rows[0]["goal"]) is not None:
            axis.axvline(1.0 - goal if loss else goal, color="#c44", linestyle="--", label=f"goal {goal:g}")
            axis.legend(loc="lower right")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
