"""Train a small network on real labelled data, quantize it, and measure what that costs in accuracy.

Fashion-MNIST (60,000 + 10,000 pictures, ten classes) as Debian packages it, a convolutional network with batch
normalization, several seeds. The test pictures serve for the figures alone: not for calibration, and no epoch or
setting is chosen by them. Prints a table (on standard error) and JSON (on standard output, or to ``--output``).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.report import environment, write_json
from benchmarks.workload import THREADS
from dopt.dopt_torch.opt_main import generate_config_file, optimize_model
from dopt_torch.optimize import set_calibrate_state
from dopt_torch.post_training import post_training
from dopt_torch.retraining import fit_weight_scales, parameter_groups
from examples.efficientnet_lite.program import choose_strategy

__all__ = ["main"]

DATA = Path("/usr/share/datasets/fashion-mnist")
BATCH = 128
CALIBRATION = 1024
"""Training pictures that ranges are taken from."""

TARGETS = {"W8A8": 0.1, "W4A4 retrained": 0.5}
"""Percentage points that may be lost, the mean of the seeds."""

Data = tuple[Tensor, Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many networks to train (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="of training in float (default: %(default)s)")
    parser.add_argument("--retraining-epochs", type=int, default=8, help="of retraining (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="use only so many pictures of each set")
    parser.add_argument("--output", type=Path, help="file for the JSON (default: standard output)")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    torch.set_num_threads(THREADS)
    try:
        train, test = (_read(options.data, name, options.samples) for name in ("train", "t10k"))
    except (OSError, ValueError) as error:
        console.print(
            f"error: the data cannot be read: {error}. Install Debian's package dataset-fashion-mnist, or unpack it "
            "(apt-get download dataset-fashion-mnist; dpkg -x *.deb FOLDER) and give --data "
            "FOLDER/usr/share/datasets/fashion-mnist.",
            style="red",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        return 1
    runs = [
        _run(seed, train, test, options.epochs, options.retraining_epochs, console) for seed in range(options.seeds)
    ]
    lost = {name: [run["float"] - run[name] for run in runs] for name in runs[0] if name != "float"}
    _show(runs, lost, console)
    report = {
        "benchmark": "trained",
        "data": "Fashion-MNIST",
        "epochs": options.epochs,
        "retraining_epochs": options.retraining_epochs,
        "environment": environment(THREADS),
        "targets": TARGETS,
        "accuracy": runs,
        "points_lost": lost,
    }
    write_json(report, options.output)
    return 0


def build() -> nn.Module:
    """Return the network, untrained: 39,000 parameters."""
    channels = (1, 16, 32, 32, 64)
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(channels)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        if number in (0, 2):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * channels[-1], 10))


def _run(seed: int, train: Data, test: Data, epochs: int, retraining_epochs: int, console: Console) -> dict[str, float]:
    """Train one network, quantize it in several ways, and return each one's accuracy in percent."""
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    begun = time.monotonic()
    _train(model, optimizer, train, epochs, f"seed {seed}, float", console)
    model.eval()
    trained = time.monotonic() - begun
    pictures = torch.split(train[0][torch.randperm(len(train[0]))[:CALIBRATION]], BATCH)
    found = {"float": _accuracy(model, test)}
    found["W8A8"] = _accuracy(_calibrated(model, "Quant_INT8-8", "min_max", pictures), test)
    found["W4A4"] = _accuracy(_calibrated(model, "Quant_INT4-4", "mse", pictures), test)
    rounded = _optimized(model, "Quant_INT4-4", "mse")
    post_training(rounded, pictures, samples=256)
    found["W4A4 rounded"] = _accuracy(rounded, test)
    quantized = _calibrated(model, "Quant_INT4-4", "mse", pictures)
    fit_weight_scales(quantized)
    optimizer = torch.optim.SGD(parameter_groups(quantized, 0.02, weight_decay=5e-4), momentum=0.9, nesterov=True)
    begun = time.monotonic()
    _train(quantized, optimizer, train, retraining_epochs, f"seed {seed}, W4A4", console)
    found["W4A4 retrained"] = _accuracy(quantized.eval(), test)
    console.print(f"seed {seed}: trained in {trained:.0f} s, retrained in {time.monotonic() - begun:.0f} s, {found}")
    return found


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    epochs: int,
    what: str,
    console: Console,
) -> None:
    """Train with a learning rate that falls along a cosine."""
    steps = epochs * -(-len(data[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    model.train()
    for x, labels in track(_epochs(data, epochs), what, steps, console=console, transient=True):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(x), labels))
        optimizer.step()
        schedule.step()


def _epochs(data: Data, epochs: int) -> Iterator[Data]:
    """Yield shuffled batches, each picture mirrored or not."""
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(data[0])), BATCH):
            x = data[0][index]
            mirrored = torch.rand(len(x)) < 0.5
            yield torch.where(mirrored[:, None, None, None], x.flip(3), x), data[1][index]


def _optimized(model: nn.Module, strategy: str, range_method: str) -> nn.Module:
    with tempfile.TemporaryDirectory(prefix="dopt-benchmark-") as folder:
        file = Path(folder) / "config.json"
        generate_config_file(copy.deepcopy(model), "x:1,1,28,28", str(file))
        choose_strategy(file, strategy, range_method)
        quantized: nn.Module = optimize_model(model, str(file))
    return quantized.eval()


def _calibrated(model: nn.Module, strategy: str, range_method: str, pictures: Sequence[Tensor]) -> nn.Module:
    quantized = _optimized(model, strategy, range_method)
    set_calibrate_state(quantized, True)
    with torch.no_grad():
        for batch in pictures:
            quantized(batch)
    set_calibrate_state(quantized, False)
    return quantized


def _accuracy(model: nn.Module, data: Data) -> float:
    """Return the percentage of pictures whose class is found."""
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in torch.split(data[0], 500)])
    return 100.0 * float((found == data[1]).double().mean())


def _read(folder: Path, name: str, samples: int | None) -> Data:
    """Return pictures ``[N, 1, 28, 28]`` float32, standardized, and labels ``[N]`` int64."""
    pictures = _idx(folder / f"{name}-images-idx3-ubyte", 3)[:samples]
    labels = _idx(folder / f"{name}-labels-idx1-ubyte", 1)[:samples]
    if len(pictures) != len(labels):
        raise ValueError(f"{len(pictures)} pictures and {len(labels)} labels in {folder}")
    x = (torch.from_numpy(pictures.astype(np.float32)) / 255.0 - 0.286) / 0.353
    return x[:, None], torch.from_numpy(labels.astype(np.int64))


def _idx(file: Path, dimensions: int) -> np.ndarray:
    """Return the array of bytes in an IDX file, packed or not."""
    packed = file.with_name(f"{file.name}.gz")
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else file.read_bytes()
    shape = tuple(int(size) for size in np.frombuffer(content, ">i4", dimensions, 4))
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{file} is no IDX file of bytes in {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _show(runs: Sequence[dict[str, float]], lost: dict[str, list[float]], console: Console) -> None:
    table = Table("", title=f"Fashion-MNIST, {len(runs)} seeds: test accuracy in percent, and points lost")
    for column in ("accuracy", "lost", "spread", "target"):
        table.add_column(column, justify="right")
    for name in runs[0]:
        accuracy = f"{statistics.mean(run[name] for run in runs):.2f}"
        if name not in lost:
            table.add_row(name, accuracy)
            continue
        spread = f"{min(lost[name]):+.2f} to {max(lost[name]):+.2f}"
        target = TARGETS.get(name)
        mean = statistics.mean(lost[name])
        verdict = "" if target is None else f"<= {target} {'ok' if mean <= target else 'missed'}"
        table.add_row(name, accuracy, f"{mean:+.2f}", spread, verdict)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
