"""The PyTorch backend of dopt. Importing this package does not import torch; its parts do.

``find_layers`` runs a model once and says what is in it, ``optimize`` makes the quantized model and switches its
calibration, ``quantized_layer`` and ``quantizer`` are what a quantized layer is made of, ``export`` writes the files.
"""

from dopt_torch._version import __version__

__all__ = ["__version__"]
