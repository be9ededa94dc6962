"""Wrong backends, by what is wrong with them; importing this package registers them all."""

from mutants import (
    calibration,
    capabilities,
    checkpoints,
    descriptions,
    exports,
    fake_quantization,
    gradients,
    layers,
    statistics,
    weight_scales,
    weights_alone,
)
from mutants.mutant import MUTANTS, Mutant

__all__ = [
    "MUTANTS",
    "Mutant",
    "calibration",
    "capabilities",
    "checkpoints",
    "descriptions",
    "exports",
    "fake_quantization",
    "gradients",
    "layers",
    "statistics",
    "weight_scales",
    "weights_alone",
]
