"""Quantize EfficientNet-Lite0: strategy file, calibration, export, and what it costs in accuracy.

Run ``make demo``, or with the requirements installed ``python examples/efficientnet_lite/demo.py --help``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # started as a script: find the modules beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console

from dopt.dopt_torch.opt_main import (
    generate_config_file,
    generate_final_model,
    optimize_model,
    set_calibrate_state,
)
from examples.efficientnet_lite.data import INPUT_SHAPE, build_model, calibration_set, evaluation_set
from examples.efficientnet_lite.evaluate import onnx_logits, torch_logits
from examples.efficientnet_lite.program import Report, choose_strategy, command_line, make_folder, parse, run, show
from examples.efficientnet_lite.scores import score
from examples.efficientnet_lite.steps import Steps

__all__ = ["Report", "choose_strategy", "main", "quantize_and_judge"]


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
        scores={name: score(values, reference, evaluation.labels.numpy()) for name, values in logits.items()},
        file_bytes={
            str(path): path.stat().st_size for path in (config_file, checkpoint, exported.model, exported.params)
        },
        seconds=dict(steps.seconds),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code: 0, or 1 for an error that the user can mend."""
    options = parse(command_line(__doc__, "demo_output", "torch and ONNX Runtime"), argv)

    def program(steps: Steps) -> None:
        make_folder(options.output_dir)
        report = quantize_and_judge(options.output_dir, options.range, steps, threads=options.threads)
        if options.json:
            print(json.dumps(asdict(report), indent=2))
        else:
            show(report, Console())

    return run(program)


if __name__ == "__main__":
    sys.exit(main())
