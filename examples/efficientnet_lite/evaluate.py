"""How close a quantized network is to its float original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.efficientnet_lite.steps import Track

__all__ = ["Scores", "onnx_logits", "score", "torch_logits"]


@dataclass(frozen=True)
class Scores:
    """What is measured of a network's logits.

    Attributes:
        top1: Labelled pictures whose class has the greatest logit.
        top5: Labelled pictures whose class is among the five greatest logits.
        labelled: Number of labelled pictures.
        agreement: Share of all pictures with the same greatest logit as in float, from 0 to 1.
        sqnr_db: Signal to quantization noise of the logits of all pictures, decibels; ``None`` if there is no noise.
        pictures: Number of all pictures.
    """

    top1: int
    top5: int
    labelled: int
    agreement: float
    sqnr_db: float | None
    pictures: int


def score(logits: Tensor, reference: Tensor, labels: Tensor) -> Scores:
    """Compare logits with those of the float network and with the labels.

    Args:
        logits: ``[N, classes]``.
        reference: ``[N, classes]``, of the float network.
        labels: ``[L]``, classes of the first ``L <= N`` pictures.
    """
    best = logits[: len(labels)].topk(5).indices
    hits = best == labels[:, None]
    signal = reference.double().square().sum()
    noise = (reference.double() - logits.double()).square().sum()
    return Scores(
        top1=int(hits[:, 0].sum()),
        top5=int(hits.any(1).sum()),
        labelled=len(labels),
        agreement=float((logits.argmax(1) == reference.argmax(1)).double().mean()),
        sqnr_db=float(10 * torch.log10(signal / noise)) if noise > 0 else None,
        pictures=len(logits),
    )


def torch_logits(model: nn.Module, pictures: Tensor, *, batch: int = 20, track: Track = iter) -> Tensor:
    """Return the logits ``[N, classes]`` of a torch network in its present mode, without gradients."""
    with torch.no_grad():
        return torch.cat([model(part) for part in track(torch.split(pictures, batch))])


def onnx_logits(path: Path, pictures: Tensor, *, threads: int, track: Track = iter) -> Tensor:
    """Return the logits ``[N, classes]`` of an ONNX file with batch size 1, run by ONNX Runtime on the CPU."""
    import onnxruntime  # noqa: PLC0415  # only who runs the exported file needs it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows: list[NDArray[np.float32]] = [
        session.run(None, {name: part.numpy()})[0] for part in track(torch.split(pictures, 1))
    ]
    return torch.from_numpy(np.concatenate(rows))
