"""The integer grid that a tensor is quantized to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """An integer grid: how many bits, which integers, and how scales are shared.

    Attributes:
        bits: Width of the integers, 2 to 16.
        signed: Two's complement when true, else from 0.
        symmetric: Zero point fixed at the centre (0 if signed); the range is ``[-a, a]``.
        narrow: Leave out the lowest integer, so that the grid is symmetric about 0 (signed only).
        per_channel: One scale per output channel when true, else one per tensor.
        group: How many weights of an output channel, one after the other, share a scale; all of them if ``None``.

    Example:
        >>> Grid(8, signed=True, symmetric=True, narrow=True, per_channel=True).qmin
        -127
        >>> Grid(8, signed=False).dtype
        'uint8'
    """

    bits: int
    signed: bool = False
    symmetric: bool = False
    narrow: bool = False
    per_channel: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}, expected 2 to 16")
        if self.symmetric and not self.signed:
            raise ValueError("a symmetric grid must be signed")
        if self.narrow and not self.signed:
            raise ValueError("a narrow grid must be signed")
        if self.group is not None and (self.group < 1 or not self.per_channel):
            raise ValueError(f"group is {self.group}, expected a positive number, and scales per channel")

    @property
    def qmin(self) -> int:
        """The lowest integer of the grid."""
        return int(self.narrow) - (1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The highest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> str:
        """The name of the grid's type in parameter files: ``int8``, ``uint8``, ``int4`` ..."""
        return f"{'int' if self.signed else 'uint'}{self.bits}"
