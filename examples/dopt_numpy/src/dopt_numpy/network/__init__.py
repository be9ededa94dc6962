"""A small neural-network framework in NumPy: layers with exact gradients, chains of them, and SGD.

Data are channels first, ``[N, C, H, W]`` or ``[N, F]``. A layer keeps nothing of a pass: ``forward`` returns its result
together with the function that carries gradients back, so that one layer may be called at several places.

Example:
    >>> import numpy as np
    >>> model = Network({"fc": Dense(2, 3), "relu": ReLU()})
    >>> y, pullback = model.forward(np.ones((4, 2), np.float32), training=True)
    >>> pullback(np.ones_like(y)).shape
    (4, 2)
    >>> sorted(model.state())
    ['fc.bias', 'fc.weight']
"""

from dopt_numpy.network.chain import Chain, Network, Residual
from dopt_numpy.network.convolution import Conv2D
from dopt_numpy.network.dense import Dense
from dopt_numpy.network.elementwise import ReLU, Scale
from dopt_numpy.network.layer import Array, Layer, Parameter, Pullback, Weighted, channelwise
from dopt_numpy.network.loss import cross_entropy
from dopt_numpy.network.normalization import BatchNorm
from dopt_numpy.network.pooling import Flatten, GlobalAveragePool, MaxPool2D
from dopt_numpy.network.sgd import SGD

__all__ = [
    "SGD",
    "Array",
    "BatchNorm",
    "Chain",
    "Conv2D",
    "Dense",
    "Flatten",
    "GlobalAveragePool",
    "Layer",
    "MaxPool2D",
    "Network",
    "Parameter",
    "Pullback",
    "ReLU",
    "Residual",
    "Scale",
    "Weighted",
    "channelwise",
    "cross_entropy",
]
