"""The TensorFlow backend of dopt. Importing this package does not import TensorFlow; its parts do.

``find_layers`` says what is in a graph, ``optimize`` rewrites the graph and switches its calibration, ``quantizer`` is
what a quantized layer is made of, ``export`` writes the files; ``inference_graph`` is a graph without its training.
"""

from dopt_tf._version import __version__

__all__ = ["__version__"]
