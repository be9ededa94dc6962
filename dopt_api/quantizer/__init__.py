"""The numbers: what a quantizer computes, in NumPy. Normative for every backend.

``grid`` says which integers there are, ``affine`` maps reals to them, ``statistics`` and ``ranges`` choose the scale
from data, ``smoothing`` evens out channels before that, ``training`` gives the gradients, ``folding`` the batch
normalization, ``rounding`` rounds a weight for the outputs, ``short_sums`` for kernels with 16-bit sums.
"""

from dopt_api.quantizer.affine import (
    SMALLEST_SCALE,
    channel_maximum,
    dequantize,
    extremes,
    fake_quantize,
    quantize,
    scale_zero_point,
)
from dopt_api.quantizer.folding import BatchNorm, fold_batch_norm
from dopt_api.quantizer.grid import Grid
from dopt_api.quantizer.ranges import DEFAULT_RANGE, RANGE_METHODS, activation_parameters
from dopt_api.quantizer.smoothing import smoothing_factors
from dopt_api.quantizer.statistics import Statistics, lattice
from dopt_api.quantizer.training import (
    fake_quantize_gradients,
    gain_gradient,
    learned_scale,
    relative_squared_error,
)

__all__ = [
    "DEFAULT_RANGE",
    "RANGE_METHODS",
    "SMALLEST_SCALE",
    "BatchNorm",
    "Grid",
    "Statistics",
    "activation_parameters",
    "channel_maximum",
    "dequantize",
    "extremes",
    "fake_quantize",
    "fake_quantize_gradients",
    "fold_batch_norm",
    "gain_gradient",
    "lattice",
    "learned_scale",
    "quantize",
    "relative_squared_error",
    "scale_zero_point",
    "smoothing_factors",
]
