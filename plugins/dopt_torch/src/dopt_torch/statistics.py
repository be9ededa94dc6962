"""The torch twin of :class:`dopt_api.quantizer.Statistics`: the same parts, kept on the model's device.

Each batch costs two reductions over the activations and a few operations on the probed elements; nothing is copied to
the host, and memory does not grow with the number of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from dopt_api.errors import CalibrationError
from dopt_api.quantizer import Statistics, lattice
from dopt_api.quantizer.statistics import BINS, HALF_BINS, LIMB_BITS, LIMB_UNITS, LOWEST_EXPONENT
from dopt_torch.blocks import BLOCK

__all__ = ["DeviceStatistics", "collective_device", "merge_over_ranks"]

# How a part of two statistics becomes that of both; the histogram, ``counts``, is summed after alignment.
_SUM, _MIN, _MAX = "sum", "min", "max"
_MERGE = {
    "samples": _SUM,
    "non_finite": _SUM,
    "minimum": _MIN,
    "maximum": _MAX,
    "sums": _SUM,
    "exponent": _MAX,
    "counts": _SUM,
}


class DeviceStatistics:
    """Statistics of one activation as tensors.

    Attributes:
        parts: The parts of :class:`dopt_api.quantizer.Statistics` by name, same shapes and dtypes.
    """

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self.parts = dict(parts)

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> DeviceStatistics:
        """Return the statistics of no data."""
        return cls.from_core(Statistics(), device)

    @classmethod
    def from_core(cls, statistics: Statistics, device: torch.device | str = "cpu") -> DeviceStatistics:
        """Move the core's statistics to a device."""
        return cls({name: torch.from_numpy(np.array(part)).to(device) for name, part in statistics.arrays().items()})

    def to_core(self) -> Statistics:
        """Return the core's statistics; waits for the device."""
        return Statistics.from_arrays({name: part.cpu().numpy() for name, part in self.parts.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every part by ``change(part)``."""
        self.parts = {name: change(part) for name, part in self.parts.items()}

    @property
    def seen(self) -> bool:
        """Whether there were any data; waits for the device."""
        return bool(self.parts["samples"] + self.parts["non_finite"])

    def update(self, x: Tensor, channel_axis: int) -> None:
        """Take in a batch ``[N, ...]``, samples first, as the core does, to the bit."""
        if x.numel() == 0:
            return
        if x.dim() == 1:
            x, channel_axis = x.unsqueeze(1), 1
        own = self.parts
        if own["counts"].device != x.device:
            self.map(lambda part: part.to(x.device))
            own = self.parts
        extremes, probed = _scan(x, channel_axis)
        low, high = extremes
        finite = torch.isfinite(extremes).all(0)
        count = finite.sum()
        inf = torch.full((), float("inf"), device=x.device)
        kept = torch.where(finite, extremes, torch.zeros_like(extremes))
        peak = torch.maximum(-kept[0], kept[1]).amax()
        exponent = torch.frexp(peak.clamp_min(2.0 ** (LOWEST_EXPONENT - 1))).exponent.to(torch.int64)
        exponent = torch.maximum(exponent, own["exponent"])
        # samples that are left out get bin -1, which is cut off
        bins = (probed * torch.exp2((11 - exponent).float())).to(torch.int64)
        bins = bins.clamp_(1 - HALF_BINS, HALF_BINS - 1).add_(HALF_BINS)
        bins = torch.where(finite.unsqueeze(1), bins, torch.zeros_like(bins))
        self.parts = {
            "samples": own["samples"] + count,
            "non_finite": own["non_finite"] + (x.shape[0] - count),
            "minimum": torch.minimum(own["minimum"], torch.where(finite, low, inf).amin()) + 0.0,  # -0.0 becomes 0.0
            "maximum": torch.maximum(own["maximum"], torch.where(finite, high, -inf).amax()) + 0.0,
            "sums": own["sums"] + _limbs(kept),
            "exponent": exponent,
            "counts": _coarsen(own["counts"], exponent - own["exponent"])
            + torch.bincount(bins.flatten(), minlength=BINS + 1)[1:],
        }


def collective_device() -> torch.device | None:
    """Return where tensors must be for collective calls, or ``None`` where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def merge_over_ranks(statistics: Iterable[DeviceStatistics]) -> None:
    """Replace each rank's statistics by those of all ranks, with one collective call for each kind of part.

    Every rank must call it with the same layers. Does nothing where there is one process.
    """
    all_statistics, device = list(statistics), collective_device()
    if not all_statistics or device is None:
        return
    operations = {_SUM: dist.ReduceOp.SUM, _MIN: dist.ReduceOp.MIN, _MAX: dist.ReduceOp.MAX}
    stacked = {name: torch.stack([s.parts[name].to(device) for s in all_statistics]) for name in _MERGE}
    own_exponents = stacked["exponent"].clone()
    for name, how in _MERGE.items():
        if name == "counts":  # after 'exponent', which stands before it
            shifts = stacked["exponent"] - own_exponents
            aligned = [_coarsen(row, shift) for row, shift in zip(stacked[name], shifts, strict=True)]
            stacked[name] = torch.stack(aligned)
        try:
            dist.all_reduce(stacked[name], op=operations[how])
        except RuntimeError as error:
            raise CalibrationError(
                f"The ranks' statistics cannot be merged: {error}",
                where=f"rank {dist.get_rank()} of {dist.get_world_size()}",
                expected="every rank switching calibration off, or training its first batch, at the same time",
                fix="Call set_calibrate_state(quant_model, False) on every rank.",
            ) from error
    for i, own in enumerate(all_statistics):
        own.parts = {name: stacked[name][i].to(part.device) for name, part in own.parts.items()}


def _scan(x: Tensor, channel_axis: int) -> tuple[Tensor, Tensor]:
    """Return the extremes ``[2, N]`` and the probed elements ``[N, K]`` of the samples, float32.

    On a CPU this goes block by block (a few samples, or a few channels of large ones), so that each block comes from
    memory once for the three looks at it.
    """
    rows, index = x, lattice(tuple(x.shape), channel_axis)
    if x.dim() > 2 and channel_axis == 1 and x.is_contiguous() and x[0].numel() > BLOCK:
        rows, index = x.flatten(0, 1), index[1:]
    step = max(1, BLOCK // rows[0].numel()) if x.device.type == "cpu" else len(rows)
    inner = list(range(1, rows.dim()))
    extremes = torch.empty(2, len(rows), dtype=x.dtype, device=x.device)
    probed = []
    for block, low, high in zip(rows.split(step), extremes[0].split(step), extremes[1].split(step), strict=True):
        torch.amin(block, inner, out=low)
        torch.amax(block, inner, out=high)
        probed.append(block[index].contiguous())
    samples = extremes.view(2, x.shape[0], -1)
    extremes = torch.stack([samples[0].amin(1), samples[1].amax(1)])
    return extremes.float(), torch.cat(probed).reshape(x.shape[0], -1).float()


def _coarsen(counts: Tensor, shift: Tensor) -> Tensor:
    """Return the histogram with bins ``2**shift`` times as wide."""
    bins = torch.arange(1 - HALF_BINS, HALF_BINS, device=counts.device)
    coarse = (bins * torch.exp2(-shift.double())).to(torch.int64).add_(HALF_BINS - 1)
    return torch.zeros_like(counts).index_add_(0, coarse, counts)


def _limbs(values: Tensor) -> Tensor:
    """Return the exact sums over the last axis as limbs: ``[2, N]`` float32 to ``[2, 9]`` int64."""
    units = torch.floor(values.double().unsqueeze(-1) / torch.from_numpy(LIMB_UNITS).to(values.device))
    units[..., :-1] -= units[..., 1:] * 2.0**LIMB_BITS
    return units.to(torch.int64).sum(dim=-2)
