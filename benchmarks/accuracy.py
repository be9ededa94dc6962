"""Measure what 8-bit quantization of EfficientNet-Lite0 costs in accuracy, for each range method.

Prints a table (on standard error) and JSON (on standard output, or to ``--output``).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from benchmarks.report import environment, write_json
from benchmarks.workload import THREADS
from dopt_api.errors import DoptError
from dopt_api.quantizer.ranges import RANGE_METHODS
from examples.efficientnet_lite.data import MissingDataError
from examples.efficientnet_lite.demo import Report, quantize_and_judge
from examples.efficientnet_lite.steps import Steps

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the JSON (default: standard output)")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    reports = []
    try:
        for method in RANGE_METHODS:
            with tempfile.TemporaryDirectory(prefix="dopt-benchmark-") as folder:
                reports.append(quantize_and_judge(Path(folder), method, Steps(console), threads=THREADS))
        _show(reports, console)
        methods = {report.range_method: {k: asdict(v) for k, v in report.scores.items()} for report in reports}
        about = {"benchmark": "accuracy", "workload": "EfficientNet-Lite0", "strategy": "Quant_INT8-8"}
        write_json({**about, "environment": environment(THREADS), "ranges": methods}, options.output)
    except (DoptError, MissingDataError, OSError) as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 1
    return 0


def _show(reports: Sequence[Report], console: Console) -> None:
    table = Table("range", "network", title="EfficientNet-Lite0, Quant_INT8-8")
    for column in ("SQNR of logits", "agreement", "top-1", "top-5"):
        table.add_column(column, justify="right")
    for report in reports:
        for name, scores in report.scores.items():
            if scores.sqnr_db is not None:
                right = (f"{scores.sqnr_db:.2f} dB", f"{scores.agreement:.1%}", str(scores.top1), str(scores.top5))
                table.add_row(report.range_method, name, *right)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
