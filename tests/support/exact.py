"""IEEE 754 by rational arithmetic: oracles that share no code with NumPy."""

from __future__ import annotations

from fractions import Fraction

__all__ = ["exact", "float32_quotient", "float64", "nearest_float32"]


def exact(value: float) -> Fraction:
    """Return the number itself; ``float`` widens float32 without loss."""
    return Fraction(float(value))


def float64(value: Fraction) -> Fraction:
    """Round to float64; the division of Python integers is correctly rounded."""
    return Fraction(value.numerator / value.denominator)


def nearest_float32(value: Fraction) -> Fraction:
    """Round to float32, half to even, with subnormals and without an upper limit."""
    if value == 0:
        return value
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    return round(value / quantum) * quantum


def float32_quotient(x: float, scale: float) -> Fraction:
    """Return ``x / scale`` of two float32 numbers, rounded to float32."""
    return nearest_float32(exact(x) / exact(scale))
