"""The logits of a network in torch, and of an exported one in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.efficientnet_lite.scores import Logits
from examples.efficientnet_lite.steps import Track

__all__ = ["onnx_logits", "torch_logits"]


def torch_logits(model: nn.Module, pictures: Tensor, *, batch: int = 20, track: Track = iter) -> Logits:
    """Return the logits ``[N, classes]`` of a torch network in its present mode, without gradients."""
    with torch.no_grad():
        return np.concatenate([model(part).numpy() for part in track(torch.split(pictures, batch))])


def onnx_logits(path: Path, pictures: Tensor, *, threads: int, track: Track = iter) -> Logits:
    """Return the logits ``[N, classes]`` of an ONNX file with batch size 1, run by ONNX Runtime on the CPU."""
    import onnxruntime  # noqa: PLC0415  # only who runs the exported file needs it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows: list[Logits] = [session.run(None, {name: part.numpy()})[0] for part in track(torch.split(pictures, 1))]
    return np.concatenate(rows)
