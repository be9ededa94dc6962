"""What 16-bit sums of two products do to EfficientNet-Lite0 in ONNX Runtime, and what the remedies cost.

Processors with AVX2 and without VNNI have such sums. Where this one has more, ONNX Runtime is made to take it for one
of those (:mod:`benchmarks.older_processor`). Prints a table (on standard error) and JSON (on standard output, or to
``--output``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import older_processor
from benchmarks.report import environment, write_json
from benchmarks.workload import THREADS
from dopt.dopt_torch.opt_main import generate_config_file, generate_final_model, optimize_model, set_calibrate_state
from dopt_api.config import assign
from dopt_api.errors import DoptError
from dopt_api.formats import convert
from dopt_api.formats.integer_nodes import NodeKind, integer_nodes
from dopt_api.types import ExportResult
from dopt_api.verify import verify
from dopt_torch.post_training import post_training
from examples.efficientnet_lite import data as pictures
from examples.efficientnet_lite.data import MissingDataError
from examples.efficientnet_lite.program import choose_strategy

__all__ = ["main"]

Array = NDArray[np.float32]

RUN = """
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
"""What a process of its own does: the outputs of a model, one picture at a time."""

TIME = """
import json
import sys
import time
import numpy as np
import onnxruntime
models, given, threads = sys.argv[1:3], sys.argv[3], int(sys.argv[4])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow the other model
sessions = [onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in models]
x = np.load(given)
name = sessions[0].get_inputs()[0].name
times = np.empty((110, 2))
for i, place in np.ndindex(times.shape):
    begun = time.perf_counter()
    sessions[place].run(None, {name: x[i : i + 1]})
    times[i, place] = time.perf_counter() - begun
print(json.dumps(np.median(times[10:], axis=0).tolist()))
"""
"""Likewise: the median seconds of two models, which take turns, so that load on the machine is shared."""


@dataclass(frozen=True)
class Run:
    """What ONNX Runtime made of a file on one kind of processor; ratios in dB.

    Attributes:
        plain_db: Outputs against the float network, weights and all, without graph optimizations.
        optimized_db: Likewise with all optimizations.
        kernels_db: With optimizations against without.
        agreement: Of the first class with the float model's, with all optimizations.
        top1: How many labelled pictures are named rightly, with all optimizations.
        latency: One picture at a time with all optimizations, as a share of the float model's on one thread.
    """

    plain_db: float
    optimized_db: float
    kernels_db: float
    agreement: float
    top1: int
    latency: float


@dataclass(frozen=True)
class Row:
    """What was found of one recipe.

    Attributes:
        recipe: What was done.
        hazard: The share of all output channels that can overflow.
        bytes_share: Size of the file, as a share of the float model's.
        older: On a processor with AVX2 and without VNNI.
        this: On this processor as it is.
    """

    recipe: str
    hazard: float
    bytes_share: float
    older: Run
    this: Run


@dataclass(frozen=True)
class Recipe:
    """What is done.

    Attributes:
        strategy: Of all layers.
        short_sums: Whether weights are rounded so that no pair of products overflows 16 bits.
        outputs: Whether outputs are recorded, those that would keep a layer from integers.
    """

    strategy: str = "Quant_INT8-8"
    short_sums: bool = False
    outputs: bool = False


RECIPES = {
    "rounding": Recipe(),
    "rounding, short sums": Recipe(short_sums=True),
    "rounding, short sums, outputs": Recipe(short_sums=True, outputs=True),
    "rounding, 7 bits, outputs": Recipe("Quant_INT8-7", outputs=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="one of them (default: all); repeatable")
    parser.add_argument("--output", type=Path, help="file for the JSON (default: standard output)")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    torch.set_num_threads(THREADS)
    try:
        with tempfile.TemporaryDirectory(prefix="dopt-benchmark-") as name:
            older = older_processor.environment(Path(name))
            rows = [_row(recipe, older, console) for recipe in options.recipe or RECIPES]
    except (DoptError, MissingDataError, OSError, older_processor.MissingToolError) as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 1
    _show(rows, console)
    about = {"benchmark": "short_sums", "workload": "EfficientNet-Lite0"}
    write_json({**about, "environment": environment(THREADS), "rows": [asdict(row) for row in rows]}, options.output)
    return 0


def _row(name: str, older: Mapping[str, str], console: Console) -> Row:
    recipe = RECIPES[name]
    evaluation = pictures.evaluation_set(200)
    with tempfile.TemporaryDirectory(prefix="dopt-benchmark-") as place:
        folder = Path(place)
        with console.status(f"{name}: quantizing"):
            result = _quantized(recipe, folder)
            (integer,) = convert(result.params, "onnx_qdq", folder)
        x = evaluation.pictures.numpy()
        np.save(folder / "given.npy", x)
        checks = verify(result.params, [{"x": x[:1]}]).layers
        with console.status(f"{name}: running"):
            with torch.no_grad():
                parts = [pictures.build_model()(part) for part in torch.split(evaluation.pictures, 20)]
            float_outputs = torch.cat(parts).numpy()
            runs = [
                _run(integer, result.model, float_outputs, evaluation.labels.numpy(), folder, processor)
                for processor in (older, os.environ)
            ]
        hazard = float(np.mean([check.hazard for check in checks]))
        return Row(name, hazard, integer.stat().st_size / result.model.stat().st_size, *runs)


def _quantized(recipe: Recipe, folder: Path) -> ExportResult:
    """Quantize the network into a folder; where outputs are asked for, those of the layers that would run in float."""
    model, batches = pictures.build_model(), torch.split(pictures.calibration_set(128), 16)
    config, checkpoint = folder / "config.json", folder / "quantized.pth"
    generate_config_file(model, pictures.INPUT_SHAPE, config)
    choose_strategy(config, recipe.strategy, "min_max")
    if recipe.outputs:
        quantized = optimize_model(model, str(config))
        set_calibrate_state(quantized, True)
        with torch.no_grad():
            quantized(batches[0])
        set_calibrate_state(quantized, False)
        torch.save(quantized.state_dict(), checkpoint)
        plain = generate_final_model(model, str(config), str(checkpoint), str(folder))
        assign(config, {}, outputs={node.layer: True for node in integer_nodes(plain.params) if _held_back(node)})
    quantized = optimize_model(model, str(config))
    post_training(quantized, batches, samples=64, short_sums=recipe.short_sums)
    torch.save(quantized.state_dict(), checkpoint)
    return generate_final_model(model, str(config), str(checkpoint), str(folder))


def _held_back(node: NodeKind) -> bool:
    return bool(node.layer) and not node.integer


def _run(
    integer: Path, model: Path, wanted: Array, labels: NDArray[np.int64], folder: Path, processor: Mapping[str, str]
) -> Run:
    plain, fast = (_outputs(integer, folder, optimized, processor) for optimized in (False, True))
    first = fast.argmax(1)
    return Run(
        plain_db=_db(wanted, plain),
        optimized_db=_db(wanted, fast),
        kernels_db=_db(plain, fast),
        agreement=float(np.mean(wanted.argmax(1) == first)),
        top1=int(np.sum(first[: len(labels)] == labels)),
        latency=_latency(integer, model, folder, processor),
    )


def _outputs(model: Path, folder: Path, optimized: bool, processor: Mapping[str, str]) -> Array:
    """Return what a process of its own computes, which may take the processor for an older one."""
    files = [str(part) for part in (model, folder / "given.npy", folder / "found.npy")]
    subprocess.run([sys.executable, "-c", RUN, *files, str(int(optimized))], check=True, env=dict(processor))
    result: Array = np.load(folder / "found.npy")
    return result


def _latency(model: Path, other: Path, folder: Path, processor: Mapping[str, str]) -> float:
    """Return the median time of a picture as a share of another model's, on one thread."""
    arguments = [str(part) for part in (model, other, folder / "given.npy", 1)]
    command = [sys.executable, "-c", TIME, *arguments]
    found = subprocess.run(command, check=True, env=dict(processor), capture_output=True, text=True)
    one, two = json.loads(found.stdout)
    return float(one / two)


def _db(wanted: Array, found: Array) -> float:
    noise = np.square(found.astype(np.float64) - wanted).sum()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / max(noise, 1e-30)))


def _show(rows: Sequence[Row], console: Console) -> None:
    table = Table("recipe", title="EfficientNet-Lite0 in ONNX Runtime: dB against float")
    for column in ("hazard", "size", "processor", "plain", "optimized", "of plain", "agreement", "top-1", "latency"):
        table.add_column(column, justify="right")
    for row in rows:
        for name, run in (("older", row.older), ("this", row.this)):
            figures = [f"{value:.2f}" for value in (run.plain_db, run.optimized_db, run.kernels_db)]
            shares = [f"{run.agreement:.1%}", f"{run.top1}", f"{run.latency:.2f}x"]
            table.add_row(row.recipe, f"{row.hazard:.1%}", f"{row.bytes_share:.1%}", name, *figures, *shares)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
