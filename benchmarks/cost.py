"""Measure what quantization costs in time and memory, as ratios to float in one interleaved run.

Prints a table (on standard error) and JSON (on standard output, or to ``--output``). ``--smoke`` takes seconds: a
small random network and few rounds, to see that everything runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.report import (
    Figure,
    IncompleteReportError,
    Samples,
    check_complete,
    environment,
    figures_json,
    show,
    write_json,
)
from benchmarks.workload import THREADS, Workload, load
from dopt.dopt_torch.opt_main import optimize_model, set_calibrate_state
from dopt_api.errors import DoptError
from examples.efficientnet_lite.data import MissingDataError

__all__ = ["FIGURES", "main", "measure"]

FIGURES = (
    "calibration / float forward",
    "scales from statistics",
    "optimize - one float forward",
    "training / float training step",
    "quantized / float forward",
    "peak memory, calibration / float",
    "whole process, calibration / float",
    "import dopt_api - numpy",
    "import dopt_api and its calls - numpy",
)
"""Every report has these."""

Action = Callable[[Tensor], object]


def measure(workload: Workload, *, rounds: int, smoke: bool, announce: Callable[[str], None]) -> list[Figure]:
    """Measure all figures.

    Args:
        workload: The network and its data.
        rounds: How often each comparison is made.
        smoke: Whether the workload is the small one, for the processes that load it again.
        announce: Is told what is measured next.
    """
    announce("import time")
    figures = [
        _import_time(FIGURES[7], "import dopt_api", rounds),
        _import_time(FIGURES[8], "import dopt_api; dopt_api.optimize", rounds),
    ]
    announce("peak memory")
    figures += _peak_memory(min(rounds, 3), smoke=smoke)
    model = workload.build()
    config = workload.strategy_file(model)
    try:
        announce("optimize")
        figures.append(_optimize(workload, model, config, rounds))
        quantized = optimize_model(model, config)
    finally:
        shutil.rmtree(config.parent)
    announce("calibration")
    figures += _calibration(workload, model, quantized, rounds)
    announce("quantized forward")
    figures.append(_forward(workload, model, quantized, rounds))
    announce("training")
    figures.append(_training(workload, model, quantized, rounds))
    return sorted(figures, key=lambda figure: FIGURES.index(figure.name))


def _calibration(workload: Workload, model: nn.Module, quantized: nn.Module, rounds: int) -> list[Figure]:
    """Compare passes over all batches; each round calibrates from nothing, with the first batch's extra work."""
    samples, ranges = Samples(float=[], calibration=[]), []
    with torch.no_grad():
        for _ in range(rounds + 1):
            set_calibrate_state(quantized, True)
            passes = _compare(("float", "calibration"), model, quantized, workload.batches)
            ranges.append(_seconds(lambda: set_calibrate_state(quantized, False)))
            for name, took in passes.items():
                samples[name].append(sum(took))
    samples, ranges = _warm(samples), ranges[1:]
    return [
        Figure.of_rounds(FIGURES[0], "x", _ratios(samples), samples, target=1.25, aim=1.15),
        Figure.of_rounds(FIGURES[1], "s", ranges, {"scales": ranges}),
    ]


def _optimize(workload: Workload, model: nn.Module, config: Path, rounds: int) -> Figure:
    with torch.no_grad():
        batches = _batches(workload, rounds)
        samples = _warm(_compare(("float", "optimize"), model, lambda _: optimize_model(model, config), batches))
    beyond = [took - forward for forward, took in zip(*samples.values(), strict=True)]
    return Figure.of_rounds(FIGURES[2], "s", beyond, samples, target=1.0)


def _training(workload: Workload, model: nn.Module, quantized: nn.Module, rounds: int) -> Figure:
    """Compare whole steps: forward, cross-entropy, backward, SGD; scales learned, batch normalization folded."""
    labels = torch.arange(len(workload.batches[0])) % workload.classes
    steps = (_training_step(model, labels), _training_step(quantized, labels))
    samples = _warm(_compare(("float", "training"), *steps, _batches(workload, rounds)))
    return Figure.of_rounds(FIGURES[3], "x", _ratios(samples), samples, target=1.4, aim=1.2)


def _forward(workload: Workload, model: nn.Module, quantized: nn.Module, rounds: int) -> Figure:
    with torch.no_grad():
        samples = _warm(_compare(("float", "quantized"), model, quantized, _batches(workload, rounds)))
    return Figure.of_rounds(FIGURES[4], "x", _ratios(samples), samples)


def _training_step(network: nn.Module, labels: Tensor) -> Callable[[Tensor], None]:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(network(batch), labels))
        optimizer.step()

    return step


def _peak_memory(rounds: int, *, smoke: bool) -> list[Figure]:
    """Compare fresh processes; freed tensors go back to the system at once there, so that only live ones count."""
    returning = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    above, whole = Samples(float=[], calibration=[]), Samples(float=[], calibration=[])
    script = str(Path(__file__).with_name("peak_memory.py"))
    for _ in range(rounds):
        for passes in above:
            found = json.loads(_run([script, passes, *(["--smoke"] if smoke else [])], **returning))
            above[passes].append(found["above_baseline"])
            whole[passes].append(found["peak"])
    return [
        Figure.of_rounds(FIGURES[5], "x", _ratios(above), above, target=1.1),
        Figure.of_rounds(FIGURES[6], "x", _ratios(whole), whole, target=1.1),
    ]


def _import_time(name: str, statement: str, rounds: int) -> Figure:
    """Time an import in fresh processes; its figure is the best, since only other work can add to it."""
    program = f"import time, numpy; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    _run(["-c", program])  # writes the bytecode
    took = [1000 * float(_run(["-c", program])) for _ in range(max(rounds, 5))]
    _, _, high = statistics.quantiles(took, n=4, method="inclusive")
    return Figure(name, "ms", min(took), min(took), high, target=60, samples={"import": took})


def _run(arguments: Sequence[str], **variables: str) -> str:
    """Return what a fresh Python process prints, started with more environment variables."""
    command, variables = [sys.executable, *arguments], {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def _batches(workload: Workload, rounds: int) -> list[Tensor]:
    """Return a batch for each round and one to warm up."""
    return [workload.batches[index % len(workload.batches)] for index in range(rounds + 1)]


def _compare(names: tuple[str, str], first: Action, second: Action, batches: Sequence[Tensor]) -> Samples:
    """Return the seconds of two actions on the same batches, one right after the other, in alternating order."""
    samples: Samples = {name: [] for name in names}
    for index, batch in enumerate(batches):
        turns = list(zip(names, (first, second), strict=True))
        for name, action in reversed(turns) if index % 2 else turns:
            samples[name].append(_seconds(partial(action, batch)))
    return samples


def _warm(samples: Samples) -> Samples:
    """Leave out the first round, which warms up."""
    return {name: values[1:] for name, values in samples.items()}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _ratios(samples: Samples) -> list[float]:
    """Return, round by round, the second of two measurements over the first."""
    base, other = samples.values()
    return [b / a for a, b in zip(base, other, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code: 0 even where a target is missed, 1 if it cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that everything runs")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (default: 9, in a smoke run 2)")
    parser.add_argument("--output", type=Path, help="file for the JSON (default: standard output)")
    options = parser.parse_args(argv)
    rounds = options.rounds if options.rounds is not None else 2 if options.smoke else 9
    if rounds < 1:
        parser.error(f"--rounds is {rounds}; expected 1 or more")
    console = Console(stderr=True)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    try:
        workload = load(smoke=options.smoke)
        before = environment(THREADS)
        with console.status("starting") as status:
            figures = measure(workload, rounds=rounds, smoke=options.smoke, announce=status.update)
        check_complete(figures, FIGURES)
        batch = list(workload.batches[0].shape)
        about = {"workload": workload.name, "batch": batch, "batches": len(workload.batches), "rounds": rounds}
        report = {"benchmark": "cost", **about, "environment": before, "figures": figures_json(figures)}
        remark = "; a smoke run, the figures mean nothing" if options.smoke else ""
        show(f"{workload.name}, batch {batch[0]}, {THREADS} threads, {rounds} rounds{remark}", figures, console)
        write_json(report, options.output)
    except (DoptError, MissingDataError, IncompleteReportError, OSError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
