"""The tests that every backend of dopt passes: ``pytest --pyargs dopt_conformance --dopt-backend NAME``.

``harness`` is what a backend's author writes, ``plugin`` the options of pytest, ``laws`` the tests of the numbers
against the NumPy reference, ``behaviour`` the tests of the whole way from strategy file to exported model.
"""

from dopt_conformance._version import __version__
from dopt_conformance.harness import Batch, Harness, WrittenGraph

__all__ = ["Batch", "Harness", "WrittenGraph", "__version__"]
