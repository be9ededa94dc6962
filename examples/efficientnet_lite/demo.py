"""Quantize EfficientNet-Lite0: strategy file, calibration, export, and what it costs in accuracy.

Run ``make demo``, or with the requirements installed ``python examples/efficientnet_lite/demo.py --help``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started as a script: find the modules beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table

from dopt.dopt_torch.opt_main import (
    generate_config_file,
    generate_final_model,
    optimize_model,
    set_calibrate_state,
)
from dopt_api.errors import DoptError, OutputError
from dopt_api.quantizer.ranges import DEFAULT_RANGE, RANGE_METHODS
from examples.efficientnet_lite.data import INPUT_SHAPE, MissingDataError, build_model, calibration_set, evaluation_set
from examples.efficientnet_lite.evaluate import Scores, onnx_logits, score, torch_logits
from examples.efficientnet_lite.steps import Steps

__all__ = ["Report", "choose_strategy", "main", "quantize_and_judge"]


@dataclass(frozen=True)
class Report:
    """What one run found.

    Attributes:
        range_method: How ranges were chosen from the statistics.
        scores: Of the float network, of the quantized one as simulated in torch, and of the exported graph (float
            arithmetic, weights on their grid) in ONNX Runtime.
        file_bytes: Sizes of the written files, by path.
        seconds: Duration of each step.
    """

    range_method: str
    scores: dict[str, Scores]
    file_bytes: dict[str, int]
    seconds: dict[str, float]


def quantize_and_judge(output_dir: Path, range_method: str, steps: Steps, *, threads: int = 2) -> Report:
    """Take the network from strategy file to exported model, and compare it with float after each stage.

    Args:
        output_dir: An existing folder for the files.
        range_method: One of the range methods of the strategy file.
        steps: Times the steps and shows their progress.
        threads: Threads for torch and ONNX Runtime.
    """
    torch.set_num_threads(threads)
    config_file, checkpoint = output_dir / "config.json", output_dir / "calibrated.pth"
    with steps.step("load network and pictures"):
        model = build_model()
        calibration, evaluation = calibration_set(), evaluation_set()
    with steps.step("evaluate float") as track:
        reference = torch_logits(model, evaluation.pictures, track=track)

    with steps.step("write and edit strategy file"):
        generate_config_file(model, INPUT_SHAPE, config_file)
        choose_strategy(config_file, "Quant_INT8-8", range_method)
    with steps.step("optimize"):
        quant_model = optimize_model(model, config_file)
    with steps.step("calibrate") as track:
        set_calibrate_state(quant_model, True)
        with torch.no_grad():
            for batch in track(torch.split(calibration, 32)):
                quant_model(batch)
        set_calibrate_state(quant_model, False)
        torch.save(quant_model.state_dict(), checkpoint)
    with steps.step("evaluate quantized simulation") as track:
        simulated = torch_logits(quant_model, evaluation.pictures, track=track)
    with steps.step("export"):
        exported = generate_final_model(build_model(), config_file, checkpoint, output_dir)
    with steps.step("evaluate exported graph in ONNX Runtime") as track:
        deployed = onnx_logits(exported.model, evaluation.pictures, threads=threads, track=track)

    logits = {"float": reference, "quantized simulation": simulated, "exported graph": deployed}
    return Report(
        range_method=range_method,
        scores={name: score(values, reference, evaluation.labels) for name, values in logits.items()},
        file_bytes={
            str(path): path.stat().st_size for path in (config_file, checkpoint, exported.model, exported.params)
        },
        seconds=dict(steps.seconds),
    )


def choose_strategy(config_file: Path, strategy: str, range_method: str) -> None:
    """Edit a strategy file: the same strategy and range method for every layer."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for layer in config["layer_strategy"].values():
        layer["quant_strategy"] = strategy
        layer["range"] = range_method
    config_file.write_text(json.dumps(config, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The output folder {str(path)!r} cannot be made: {error.strerror or error}",
            where=str(path.absolute()),
            expected="a folder, or a path where one can be made",
            fix="Pass another --output-dir.",
        ) from error


def _show(report: Report, console: Console) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code: 0, or 1 for an error that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"), help="folder for the files it writes")
    parser.add_argument("--range", choices=tuple(RANGE_METHODS), default=DEFAULT_RANGE, help="how ranges are chosen")
    parser.add_argument("--threads", type=int, default=2, help="threads for torch and ONNX Runtime (default: 2)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; expected 1 or more")
    problems = Console(stderr=True)
    try:
        _make_folder(options.output_dir)
        report = quantize_and_judge(options.output_dir, options.range, Steps(problems), threads=options.threads)
    except (DoptError, MissingDataError, OSError) as error:
        problems.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        problems.print("interrupted", style="red")
        return 130
    if options.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _show(report, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
