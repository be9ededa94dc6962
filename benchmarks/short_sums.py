"""What 16-bit sums of two products do to EfficientNet-Lite0 in ONNX Runtime, and what the remedies cost.

Processors with AVX2 and without VNNI have such sums. ``--emulator`` names a program that runs others as on such a one,
such as ``'qemu-x86_64-static -cpu Haswell'``; it is slow, and looks at a few pictures only. Prints a table (on standard
error) and JSON (on standard output, or to ``--output``).
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.report import environment, write_json
from benchmarks.workload import THREADS
from dopt.dopt_torch.opt_main import generate_config_file, generate_final_model, optimize_model
from dopt_api.errors import DoptError
from dopt_api.formats import convert
from dopt_api.verify import verify
from dopt_torch.post_training import post_training
from examples.efficientnet_lite import data as pictures
from examples.efficientnet_lite.data import MissingDataError
from examples.efficientnet_lite.program import choose_strategy

__all__ = ["main"]

Array = NDArray[np.float32]

PROGRAM = """
import sys
import numpy as np
import onnxruntime
model, given, found, optimized = sys.argv[1:]
options = onnxruntime.SessionOptions()
level = onnxruntime.GraphOptimizationLevel
options.graph_optimization_level = level.ORT_ENABLE_ALL if int(optimized) else level.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
x = np.load(given)
name = session.get_inputs()[0].name
np.save(found, np.concatenate([session.run(None, {name: x[i : i + 1]})[0] for i in range(len(x))]))
"""


@dataclass(frozen=True)
class Row:
    """What was found of one recipe; ratios in dB, latency as a share of the float model's.

    Attributes:
        recipe: What was done.
        hazard: The share of all output channels that can overflow.
        bytes_share: Size of the file, as a share of the float model's.
        plain_db: Outputs against float, without graph optimizations.
        agreement: Of the first class with the float model's, without optimizations.
        optimized_db: Outputs against float, with all optimizations, on this processor.
        kernels_db: With optimizations against without, on this processor.
        latency: On this processor, one picture at a time, all optimizations.
        emulated_db: Outputs against float, with all optimizations, on the emulated processor.
        emulated_kernels_db: There against without optimizations.
    """

    recipe: str
    hazard: float
    bytes_share: float
    plain_db: float
    agreement: float
    optimized_db: float
    kernels_db: float
    latency: float
    emulated_db: float | None = None
    emulated_kernels_db: float | None = None


RECIPES = {
    "rounding": ("Quant_INT8-8", False),
    "rounding, short sums": ("Quant_INT8-8", True),
    "rounding, 7 bits": ("Quant_INT8-7", False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulator", help="program that runs others as on a processor without VNNI")
    parser.add_argument("--emulated", type=int, default=8, help="how many pictures it looks at (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the JSON (default: standard output)")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    torch.set_num_threads(THREADS)
    try:
        rows = [_row(name, options.emulator, options.emulated, console) for name in RECIPES]
    except (DoptError, MissingDataError, OSError) as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 1
    _show(rows, console)
    about = {"benchmark": "short_sums", "workload": "EfficientNet-Lite0", "emulator": options.emulator}
    write_json({**about, "environment": environment(THREADS), "rows": [asdict(row) for row in rows]}, options.output)
    return 0


def _row(recipe: str, emulator: str | None, emulated: int, console: Console) -> Row:
    strategy, short_sums = RECIPES[recipe]
    x = pictures.evaluation_set(200).pictures.numpy()
    with tempfile.TemporaryDirectory(prefix="dopt-benchmark-") as name:
        folder = Path(name)
        with console.status(f"{recipe}: quantizing"):
            model = pictures.build_model()
            generate_config_file(model, pictures.INPUT_SHAPE, folder / "config.json")
            choose_strategy(folder / "config.json", strategy, "min_max")
            quantized = optimize_model(model, str(folder / "config.json"))
            batches = torch.split(pictures.calibration_set(128), 16)
            post_training(quantized, batches, samples=64, short_sums=short_sums)
            torch.save(quantized.state_dict(), folder / "quantized.pth")
            result = generate_final_model(model, str(folder / "config.json"), str(folder / "quantized.pth"), name)
            (integer,) = convert(result.params, "onnx_qdq", folder)
        with console.status(f"{recipe}: running"):
            exact, plain, fast = (
                _run(file, x, folder, optimized)
                for file, optimized in ((result.model, True), (integer, False), (integer, True))
            )
            checks = verify(result.params, [{"x": x[:1]}]).layers
            latency = _latency(integer, result.model, x)
        row = Row(
            recipe,
            hazard=float(np.mean([check.hazard for check in checks])),
            bytes_share=integer.stat().st_size / result.model.stat().st_size,
            plain_db=_db(exact, plain),
            agreement=float(np.mean(exact.argmax(1) == plain.argmax(1))),
            optimized_db=_db(exact, fast),
            kernels_db=_db(plain, fast),
            latency=latency,
        )
        if emulator is None:
            return row
        with console.status(f"{recipe}: running on the emulated processor"):
            some = slice(None, emulated)
            slow = _run(integer, x[some], folder, True, shlex.split(emulator))
        return Row(
            **{
                **asdict(row),
                "emulated_db": _db(exact[some], slow),
                "emulated_kernels_db": _db(plain[some], slow),
            }
        )


def _run(model: Path, x: Array, folder: Path, optimized: bool, before: Sequence[str] = ()) -> Array:
    """Return the outputs of a process of its own, which may run on an emulated processor."""
    given, found = folder / "given.npy", folder / "found.npy"
    np.save(given, x)
    arguments = [str(part) for part in (model, given, found, int(optimized))]
    subprocess.run([*before, sys.executable, "-c", PROGRAM, *arguments], check=True, stderr=subprocess.DEVNULL)
    result: Array = np.load(found)
    return result


def _latency(model: Path, other: Path, x: Array) -> float:
    """Return the median time of a picture as a share of another model's; they take turns, so that load is shared."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow the other model
    sessions = [onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"]) for file in (model, other)]
    name = sessions[0].get_inputs()[0].name
    times = np.empty((60, 2))
    for i, place in np.ndindex(times.shape):
        begun = time.perf_counter()
        sessions[place].run(None, {name: x[i : i + 1]})
        times[i, place] = time.perf_counter() - begun
    one, two = np.median(times[10:], axis=0)
    return float(one / two)


def _db(wanted: Array, found: Array) -> float:
    noise = np.square(found.astype(np.float64) - wanted).sum()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / max(noise, 1e-30)))


def _show(rows: Sequence[Row], console: Console) -> None:
    table = Table("recipe", title="EfficientNet-Lite0 in ONNX Runtime: dB against float")
    for column in ("hazard", "plain", "agreement", "optimized", "of plain", "latency", "emulated", "of plain"):
        table.add_column(column, justify="right")
    for row in rows:
        emulated = ["" if value is None else f"{value:.2f}" for value in (row.emulated_db, row.emulated_kernels_db)]
        shares = [f"{row.hazard:.1%}", f"{row.plain_db:.2f}", f"{row.agreement:.1%}", f"{row.optimized_db:.2f}"]
        table.add_row(row.recipe, *shares, f"{row.kernels_db:.2f}", f"{row.latency:.2f}x", *emulated)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
