"""How close a quantized network's logits are to those of its float original."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Logits", "Scores", "score"]

Logits = NDArray[np.float32]
"""``[N, classes]``."""


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


def score(logits: Logits, reference: Logits, labels: NDArray[np.int64]) -> Scores:
    """Compare logits with those of the float network and with the labels.

    Args:
        logits: ``[N, classes]``.
        reference: ``[N, classes]``, of the float network.
        labels: ``[L]``, classes of the first ``L <= N`` pictures.
    """
    best = np.argsort(-logits[: len(labels)], axis=1, kind="stable")[:, :5]
    hits = best == labels[:, np.newaxis]
    exact = reference.astype(np.float64)
    signal, noise = np.square(exact).sum(), np.square(exact - logits).sum()
    return Scores(
        top1=int(hits[:, 0].sum()),
        top5=int(hits.any(axis=1).sum()),
        labelled=len(labels),
        agreement=float((logits.argmax(axis=1) == reference.argmax(axis=1)).mean()),
        sqnr_db=float(10 * np.log10(signal / noise)) if noise > 0 else None,
        pictures=len(logits),
    )
