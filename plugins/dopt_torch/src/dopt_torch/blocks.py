"""Passing over large tensors block by block, so that several passes over the same data find it in the cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["BLOCK", "blocks", "dense"]

BLOCK = 2**18
"""How many elements a block has: one megabyte of float32."""


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield one-dimensional views that together cover dense tensors of equal strides, in the order of memory.

    On accelerators, which gain nothing from blocks, the tensors come as a whole.
    """
    first = tensors[0]
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    lines = [tensor.permute(order).view(-1) for tensor in tensors]
    if first.device.type != "cpu":
        yield tuple(lines)
    else:
        yield from zip(*(line.split(BLOCK) for line in lines), strict=True)


def dense(x: Tensor) -> Tensor:
    """Return ``x`` if its elements fill a stretch of memory, else a contiguous copy."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x if x.permute(order).is_contiguous() else x.contiguous()
