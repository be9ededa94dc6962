"""A backend of dopt for networks in plain NumPy: small, complete, and written with the public API alone.

``network`` is the framework; ``find_layers`` says what is in a network, ``optimize`` makes the quantized copy and
switches its calibration, ``quantized_layer`` and ``quantizer`` are what a quantized layer is made of, ``checkpoint``
keeps its state and ``export`` writes the files.
"""

from dopt_numpy._version import __version__

__all__ = ["__version__"]
