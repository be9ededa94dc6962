"""A small network, the loop that trains it, and its accuracy; nothing in here knows of quantization."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.fashion_mnist.data import CLASSES, Pictures

__all__ = ["BATCH", "INPUT_SHAPE", "accuracy", "build", "fit", "onnx_accuracy", "tensors"]

BATCH = 64
INPUT_SHAPE = "x:1,1,28,28"
"""The network's input as deployed."""


def build() -> nn.Module:
    """Return the network, untrained: three convolutions with batch normalization, and a linear layer."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1, bias=False),
            norm1=nn.BatchNorm2d(16),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 3, padding=1, bias=False),
            norm2=nn.BatchNorm2d(32),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3, padding=1, bias=False),
            norm3=nn.BatchNorm2d(64),
            relu3=nn.ReLU(),
            pool3=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(64, CLASSES),
        )
    )


def tensors(pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Return pictures ``[N, 1, 28, 28]`` and labels ``[N]``."""
    return torch.from_numpy(pictures.x[:, None]), torch.from_numpy(pictures.labels)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pictures: Pictures,
    epochs: int,
    *,
    batch_size: int = BATCH,
    extra_loss: Callable[[], Tensor] | None = None,
) -> None:
    """Train a model, with a learning rate that falls along a cosine.

    Args:
        model: Any of them, float or quantized, wrapped or not.
        optimizer: Of its parameters.
        pictures: To train with.
        epochs: How many times.
        batch_size: Pictures of a step; under ``DistributedDataParallel``, of a step in this process.
        extra_loss: A term of the loss that is asked for after each forward pass.
    """
    steps = epochs * (len(pictures) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    model.train()
    for epoch in range(epochs):
        for batch in pictures.batches(batch_size, seed=epoch):
            x, labels = tensors(batch)
            loss = functional.cross_entropy(model(x), labels)
            if extra_loss is not None:
                loss = loss + extra_loss()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Return the share of pictures whose class a model finds, in evaluation mode."""
    x, labels = tensors(pictures)
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in torch.split(x, 500)])
    return float((found == labels).double().mean())


def onnx_accuracy(file: Path, pictures: Pictures) -> float:
    """Return the same for an ONNX file, run by ONNX Runtime."""
    import onnxruntime  # noqa: PLC0415  # only who runs the exported file needs it

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: part.x[:, None]})[0].argmax(1) for part in pictures.batches(len(pictures) // 10)]
    return float((np.concatenate(found) == pictures.labels).mean())
