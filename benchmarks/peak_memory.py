"""Measure the peak memory of this very process in float or calibration passes; started by ``cost.py``, once each.

Prints JSON: ``{"peak": ..., "above_baseline": ...}`` in megabytes. The baseline is what the process holds when the
model, quantized or not, stands ready and the pictures are loaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.workload import THREADS, Workload, load
from dopt.dopt_torch.opt_main import optimize_model, set_calibrate_state

_STATUS = Path("/proc/self/status")


def main() -> int:
    """Run the passes and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("passes", choices=("float", "calibration"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    workload = load(smoke=options.smoke)
    model = _calibrating(workload) if options.passes == "calibration" else workload.build()
    _forget_peak()
    baseline = _megabytes("VmRSS")
    with torch.no_grad():
        for batch in workload.batches:
            model(batch)
    peak = _megabytes("VmHWM")
    print(json.dumps({"peak": peak, "above_baseline": peak - baseline}))
    return 0


def _calibrating(workload: Workload) -> nn.Module:
    model = workload.build()
    config = workload.strategy_file(model)
    quantized = optimize_model(model, config)
    shutil.rmtree(config.parent)
    set_calibrate_state(quantized, True)
    return quantized


def _forget_peak() -> None:
    """Let the peak that the kernel records start anew, so that preparation does not count."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _megabytes(key: str) -> float:
    """Return the process's resident memory, now (``VmRSS``) or at its peak (``VmHWM``)."""
    if not _STATUS.exists():  # macOS: the peak is all there is, in bytes
        import resource  # noqa: PLC0415  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
