"""The same network and pictures through other toolkits, each in its own environment, and through this one.

EfficientNet-Lite0, 8 bits, post-training. Peers are quantized by the programs in ``peer_programs``; the environments
are made in a folder that is kept, so that a second run installs nothing. Every peer is told against the float network:
signal to noise of the logits and agreement of the first class, on pictures that were not calibrated with, and its time
in float passes over the calibration set in the same run. Prints a table (on standard error) and JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.report import environment, write_json
from benchmarks.workload import THREADS
from dopt.dopt_torch.opt_main import generate_config_file, optimize_model
from dopt_api.errors import DoptError
from dopt_torch.optimize import set_calibrate_state
from dopt_torch.post_training import post_training
from examples.efficientnet_lite import data as pictures
from examples.efficientnet_lite.data import MissingDataError
from examples.efficientnet_lite.program import choose_strategy

__all__ = ["main"]

PROGRAMS = {file.stem: file for file in sorted((Path(__file__).parent / "peer_programs").glob("*.py"))}
CALIBRATION, EVALUATION = 128, 200


class PeerError(Exception):
    """A peer's environment could not be made, or its program failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit code: 0 even where a peer fails, which is then in the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--environments", type=Path, default=Path(".peers"), help="folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the JSON (default: standard output)")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    torch.set_num_threads(THREADS)
    try:
        model = pictures.build_model().eval()
        calibration = pictures.calibration_set(CALIBRATION)
        evaluation = pictures.evaluation_set(EVALUATION).pictures
    except (MissingDataError, OSError) as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 1
    wanted = _outputs(model, evaluation)
    rows = []
    for name in options.peers:
        try:
            found, facts = _peer(name, options.environments, model, calibration, evaluation, console)
        except PeerError as error:
            rows.append({"toolkit": name, "error": str(error)})
            console.print(f"{name} failed: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
            continue
        rows.append({"toolkit": name, **facts, **_scores(found, wanted)})
    try:
        rows += _own(model, calibration, evaluation, wanted)
    except DoptError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 1
    _show(rows, console)
    about = {"benchmark": "peers", "workload": "EfficientNet-Lite0", "calibration": CALIBRATION}
    write_json(
        {**about, "evaluation": len(evaluation), "environment": environment(THREADS), "rows": rows}, options.output
    )
    return 0


def _peer(
    name: str, environments: Path, model: nn.Module, calibration: Tensor, evaluation: Tensor, console: Console
) -> tuple[Tensor, dict[str, Any]]:
    """Return what a peer's quantized network gives, with version and time.

    Raises:
        PeerError: It cannot be installed, or fails.
    """
    python = _environment(PROGRAMS[name], environments / name, console)
    with tempfile.TemporaryDirectory(prefix="dopt-peer-") as folder, console.status(f"{name}: quantizing"):
        place = Path(folder)
        np.save(place / "calibration.npy", calibration.numpy())
        np.save(place / "evaluation.npy", evaluation.numpy())
        _write_onnx(model, place / "float.onnx")
        _call([str(python), str(PROGRAMS[name]), folder])
        facts: dict[str, Any] = json.loads((place / "facts.json").read_text(encoding="utf-8"))
        outputs = torch.from_numpy(np.load(place / "outputs.npy"))
    return outputs, {"version": facts["version"], "float_passes": facts["seconds"] / facts["float_seconds"]}


def _environment(program: Path, folder: Path, console: Console) -> Path:
    """Make an environment with what the first line of a program asks for, unless it is there; return its Python.

    Raises:
        PeerError: Something cannot be installed.
    """
    python, done = folder / "bin" / "python", folder / "installed"
    _, _, packages = program.read_text(encoding="utf-8").partition("\n")[0].partition("pip: ")
    if not done.exists() or done.read_text(encoding="utf-8") != packages:
        with console.status(f"{program.stem}: installing"):
            venv.create(folder, with_pip=True, clear=True)
            _call([str(python), "-m", "pip", "install", "-q", *packages.split()])
            done.write_text(packages, encoding="utf-8")
    return python


def _call(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = [line for line in ended.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise PeerError(last[0].strip())


def _write_onnx(model: nn.Module, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own deprecation and on tracing
        torch.onnx.export(
            model,
            (torch.zeros(1, 3, pictures.SIZE, pictures.SIZE),),
            str(file),
            opset_version=15,
            input_names=["x"],
            output_names=["logits"],
            dynamic_axes={"x": {0: "batch"}, "logits": {0: "batch"}},
            dynamo=False,
        )


def _own(model: nn.Module, calibration: Tensor, evaluation: Tensor, wanted: Tensor) -> list[dict[str, Any]]:
    """Return the rows of this toolkit: calibrated alone, and with its weights rounded."""
    begun = time.monotonic()
    _outputs(model, calibration)
    float_seconds = time.monotonic() - begun
    rows = []
    for name, rounding in (("dopt, calibrated", False), ("dopt, post_training", True)):
        with tempfile.TemporaryDirectory(prefix="dopt-peer-") as folder:
            file = Path(folder) / "config.json"
            generate_config_file(model, pictures.INPUT_SHAPE, str(file))
            choose_strategy(file, "Quant_INT8-8", "min_max")
            quantized: nn.Module = optimize_model(model, str(file))
        begun = time.monotonic()
        if rounding:
            post_training(quantized, torch.split(calibration, 16))
        else:
            set_calibrate_state(quantized, True)
            _outputs(quantized, calibration)
            set_calibrate_state(quantized, False)
        passes = (time.monotonic() - begun) / float_seconds
        scores = _scores(_outputs(quantized.eval(), evaluation), wanted)
        rows.append({"toolkit": name, "version": metadata.version("dopt-torch"), "float_passes": passes, **scores})
    return rows


def _outputs(model: nn.Module, data: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in torch.split(data, 16)])


def _scores(found: Tensor, wanted: Tensor) -> dict[str, float]:
    noise = (found - wanted).double().square().sum()
    return {
        "sqnr_db": float(10 * torch.log10(wanted.double().square().sum() / noise)),
        "agreement": float((found.argmax(1) == wanted.argmax(1)).double().mean()),
    }


def _show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("toolkit", "version", title="EfficientNet-Lite0, 8 bits, post-training")
    for column in ("SQNR of logits", "agreement", "float passes"):
        table.add_column(column, justify="right")
    for row in rows:
        if "error" in row:
            table.add_row(row["toolkit"], "failed")
            continue
        scores = f"{row['sqnr_db']:.2f} dB", f"{row['agreement']:.1%}", f"{row['float_passes']:.1f}"
        table.add_row(row["toolkit"], row["version"], *scores)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
