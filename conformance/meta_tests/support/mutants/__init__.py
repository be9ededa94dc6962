"""Wrong backends, by what is wrong with them; importing this package registers them all."""

from mutants import fake_quantization, gradients, statistics, weight_scales
from mutants.mutant import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant", "fake_quantization", "gradients", "statistics", "weight_scales"]
