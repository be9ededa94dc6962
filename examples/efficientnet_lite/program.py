"""What the demos share whatever the framework: options, report, errors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dopt_api.errors import DoptError, OutputError
from dopt_api.quantizer.ranges import DEFAULT_RANGE, RANGE_METHODS
from examples.efficientnet_lite.pictures import MissingDataError
from examples.efficientnet_lite.scores import Scores
from examples.efficientnet_lite.steps import Steps

__all__ = ["Report", "choose_strategy", "command_line", "make_folder", "parse", "run", "show"]


@dataclass(frozen=True)
class Report:
    """What one run found.

    Attributes:
        range_method: How ranges were chosen from the statistics.
        scores: Of the float network, of the quantized one as simulated in the framework, and of the exported graph
            (float arithmetic, weights on their grid).
        file_bytes: Sizes of the written files, by path.
        seconds: Duration of each step.
    """

    range_method: str
    scores: dict[str, Scores]
    file_bytes: dict[str, int]
    seconds: dict[str, float]


def choose_strategy(config_file: Path, strategy: str, range_method: str) -> None:
    """Edit a strategy file: the same strategy and range method for every layer."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for layer in config["layer_strategy"].values():
        layer["quant_strategy"] = strategy
        layer["range"] = range_method
    config_file.write_text(json.dumps(config, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def command_line(description: str | None, output_dir: str, engines: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every demo has.

    Args:
        description: Of the program.
        output_dir: The folder that is written to where none is given.
        engines: What computes with the number of threads that is asked for.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(output_dir), help="folder for the files it writes")
    parser.add_argument("--range", choices=tuple(RANGE_METHODS), default=DEFAULT_RANGE, help="how ranges are chosen")
    parser.add_argument("--threads", type=int, default=2, help=f"threads for {engines} (default: 2)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked options; a wrong one ends the program with a message."""
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; expected 1 or more")
    return options


def run(program: Callable[[Steps], None]) -> int:
    """Run a program and return the exit code: 0, 1 for an error that the user can mend, or 130 if interrupted."""
    problems = Console(stderr=True)
    try:
        program(Steps(problems))
    except (DoptError, MissingDataError, OSError) as error:
        problems.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        problems.print("interrupted", style="red")
        return 130
    return 0


def make_folder(path: Path) -> None:
    """Make a folder unless it is there.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The output folder {str(path)!r} cannot be made: {error.strerror or error}",
            where=str(path.absolute()),
            expected="a folder, or a path where one can be made",
            fix="Pass another --output-dir.",
        ) from error


def show(report: Report, console: Console) -> None:
    """Print a report as tables."""
    first = next(iter(report.scores.values()))
    table = Table(title=f"EfficientNet-Lite0, Quant_INT8-8, {report.range_method}")
    table.add_column("network")
    for column in ("top-1", "top-5", f"agrees with float, of {first.pictures}", "SQNR of logits"):
        table.add_column(column, justify="right")
    for name, scores in report.scores.items():
        table.add_row(
            name,
            f"{scores.top1}/{scores.labelled}",
            f"{scores.top5}/{scores.labelled}",
            f"{scores.agreement:.1%}",
            "exact" if scores.sqnr_db is None else f"{scores.sqnr_db:.2f} dB",
        )
    console.print(table)
    times = Table("step", title=f"{sum(report.seconds.values()):.1f} seconds")
    times.add_column("seconds", justify="right")
    for name, seconds in report.seconds.items():
        times.add_row(name, f"{seconds:.2f}")
    console.print(times)
    console.print("Written:")
    for path, size in report.file_bytes.items():
        console.print(f"  {path}  ({size / 1e6:.2f} MB)", soft_wrap=True, highlight=False, markup=False)
