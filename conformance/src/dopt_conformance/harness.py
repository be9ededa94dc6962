"""What the author of a backend gives the suite: models, how they run, and the backend's own kernels.

The suite knows strategy files, numbers and parameter files, and nothing of a framework. A harness is the other half:
one class with no arguments, found through the entry-point group ``dopt.conformance`` under the backend's name, or named
by ``--dopt-harness module:Class``. It invents nothing and checks nothing; it says what is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import dopt_api
from dopt_api.params import FloatLayer
from dopt_api.quantizer import Grid, Statistics

__all__ = ["GROUP", "Batch", "Harness", "WrittenGraph"]

GROUP = "dopt.conformance"
"""The entry-point group of harnesses."""

Batch = Mapping[str, NDArray[Any]]
"""One batch: the arrays of a model's inputs by name, samples first."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class WrittenGraph:
    """What stands in an exported file, as far as the parameter file speaks of it.

    Attributes:
        nodes: Names of the operations.
        edges: Names of the tensors that flow between them, the graph's inputs included.
        constants: The stored arrays (initializers, constants) by the names under which operations take them.
    """

    nodes: frozenset[str]
    edges: frozenset[str]
    constants: Mapping[str, NDArray[Any]]


class Harness(ABC):
    """A backend as the suite sees it. Subclass it, set ``backend``, and implement what is abstract.

    Every other method has a default: the usual answer, or ``NotImplementedError`` for what belongs to a capability
    (:class:`dopt_api.types.Capabilities`) and is called only where the backend claims that.

    Models are small: a few layers of at most some thousand weights, so that the suite takes seconds. Everything runs
    on float32 and must be deterministic, batch for batch; give the framework's threads a fixed number, and switch off
    what may fuse operations in one graph and not in another.

    Attributes:
        backend: The backend's name, that of its entry point in the group ``dopt.backends``.

    Example:
        >>> import numpy as np
        >>> from dopt_api.quantizer import fake_quantize
        >>> class Mine(Harness):
        ...     backend = "mine"
        ...     def fake_quantize(self, x, scale, zero_point, grid, axis):
        ...         return fake_quantize(x, scale, zero_point, grid, axis=axis)
        >>> sorted(Mine.__abstractmethods__)[:3]
        ['activations', 'batch', 'build']
    """

    backend: ClassVar[str]

    # ---- models

    @abstractmethod
    def models(self) -> tuple[str, ...]:
        """Return the names of the models, of any choice; the suite goes the whole way with each.

        Together they must have: a network of several layers (with convolution and linear ones if the framework has
        both), one all of linear layers, and batch normalization where the framework has it. The first layer of each
        takes the model's only input as it is, so that the suite can quantize it by itself.
        """

    @abstractmethod
    def build(self, name: str) -> Any:
        """Return a new float model in inference mode; the same weights, to the bit, at each call.

        Biases and, with batch normalization, running statistics look like trained ones (not all 0 and 1). Models that
        were returned before stay as they are. A session must not have run anything yet.
        """

    def input_shape(self, name: str) -> str | None:
        """Return the text of the deployed shapes for ``generate_config``; ``None`` where models know their own.

        Example:
            ``"x:2,3,12,12"``; the batch size is that of the exported graph.
        """
        return None

    @abstractmethod
    def batch(self, name: str, size: int, seed: int) -> Batch:
        """Return ``size`` samples of the model's inputs, float32, of both signs; equal arguments give equal arrays."""

    def not_quantizable(self, name: str) -> tuple[str, ...]:
        """Return the names of the model's operations that multiply and cannot be quantized, in any order."""
        return ()

    @abstractmethod
    def float_layers(self, name: str) -> Mapping[str, FloatLayer]:
        """Return the layers of a fresh model that can be quantized, by their names in the strategy file.

        They come in the order in which they first run, as they were trained: the weight in the layout of the framework
        with all output channels on ``axis`` (reshape where a framework spreads them over two axes), the bias ``[C]``,
        and the batch normalization that the backend folds into it, if there is one.
        """

    @abstractmethod
    def activations(self, name: str, batch: Batch) -> Mapping[str, Float32]:
        """Return the input of each of these layers when a fresh float model runs on ``batch``, samples first.

        The suite draws ranges from them by the core, and compares with the backend's to the bit.
        """

    def channel_axis(self, name: str, layer: str) -> int:
        """Return the axis of the channels in the input of a layer, 1 or -1, for the statistics' lattice."""
        return 1

    # ---- going the way

    def optimize(self, model: Any, config_file: Path) -> Any:
        """Return the quantized model; session graphs override this to give the two flags."""
        return dopt_api.optimize(model, config_file, backend=self.backend)

    @abstractmethod
    def run(self, model: Any, batch: Batch, *, quantized: bool = True, training: bool = False) -> list[Float32]:
        """Run a model, float, quantized or calibrating, and return its outputs.

        Args:
            model: What :meth:`build` or :meth:`optimize` returned.
            batch: From :meth:`batch`.
            quantized: For session graphs: the value of ``quant_flag``. Of no effect elsewhere and on float models.
            training: Run as in training: gradients are wanted and scales that are not decided yet are decided. Called
                only where ``retraining`` is claimed. Batch normalization may use the batch's statistics.
        """

    @abstractmethod
    def weights(self, model: Any) -> Mapping[str, NDArray[Any]]:
        """Return copies of what a float checkpoint of the model holds, by the checkpoint's own keys.

        That is weights, biases and running statistics, of float and quantized models alike; no quantizer's state.
        """

    @abstractmethod
    def save(self, model: Any, folder: Path) -> Path:
        """Save a checkpoint of a float or quantized model as a user would; return what ``export`` is to be given."""

    @abstractmethod
    def load(self, model: Any, checkpoint: Path) -> None:
        """Load a checkpoint of a model of the same kind (float or quantized), strictly."""

    def load_float(self, model: Any, checkpoint: Path) -> None:
        """Load a checkpoint of the float model into a quantized one, strictly."""
        self.load(model, checkpoint)

    # ---- what was exported

    def output_names(self, name: str) -> tuple[str, ...] | None:
        """Return what ``export`` is to call the outputs; ``None`` leaves it to the backend."""
        return None

    @abstractmethod
    def run_file(self, file: Path, batch: Batch, output_names: Sequence[str] | None) -> list[Float32]:
        """Run an exported file by itself, without the backend, and return its outputs.

        Args:
            file: What ``export`` wrote.
            batch: As many samples as :meth:`input_shape` says, or any number with an open batch size.
            output_names: From :meth:`output_names`.
        """

    @abstractmethod
    def read_file(self, file: Path) -> WrittenGraph:
        """Return what stands in an exported file."""

    # ---- the backend's own kernels, for the laws

    @abstractmethod
    def fake_quantize(
        self, x: Float32, scale: Float32, zero_point: NDArray[np.int32], grid: Grid, axis: int | None
    ) -> Float32:
        """Fake-quantize by the kernel that models run.

        Args:
            x: Any shape, scalars and empty arrays included.
            scale: ``[]``, or ``[C]`` with ``axis``.
            zero_point: Of the same shape; all 0 with ``axis``, since only weights have scales per channel.
            grid: The integers; symmetric with ``axis``.
            axis: The axis of the channels, or ``None``. Backends that have a kernel for weights use it here; ``x`` then
                has two to five axes, and no channel is empty.
        """

    @abstractmethod
    def weight_scale(self, weight: Float32, grid: Grid, axis: int) -> Float32:
        """Return the scales ``[C]`` that the backend takes for a weight, before any gain, by the code of its models."""

    @abstractmethod
    def collect(self, batches: Sequence[Float32], channel_axis: int) -> Statistics:
        """Return the statistics of batches ``[N, ...]`` of two to five axes, by the code of calibration.

        Args:
            batches: They differ in ``N``, which may be 0; the other axes agree. There may be none.
            channel_axis: 1 or -1.
        """

    # ---- capability: retraining

    def fake_quantize_gradients(
        self,
        upstream: Float32,
        x: Float32,
        scale: Float32,
        zero_point: NDArray[np.int32],
        grid: Grid,
        axis: int | None,
    ) -> tuple[Float32, NDArray[np.floating[Any]]]:
        """Return the gradients of ``sum(upstream * fake_quantize(x))`` with respect to ``x`` and to the scale.

        The arguments are those of :meth:`fake_quantize`; the gradient of the scale has the scale's shape. ``x`` has at
        least one axis and one element.
        """
        raise NotImplementedError

    def learned_scale(self, scale: Float32, gain: Float32) -> Float32:
        """Return the scale in use, ``[]`` or ``[C]``; see :func:`dopt_api.quantizer.learned_scale`."""
        raise NotImplementedError

    def gain_gradient(self, upstream: Float32, scale: Float32, gain: Float32) -> Float32:
        """Return the gradient of ``sum(upstream * learned_scale(scale, gain))`` with respect to the gain."""
        raise NotImplementedError

    def train_step(self, model: Any, batch: Batch, *, quant_loss: bool = False) -> float:
        """Take one step of plain gradient descent in training mode, and return the loss before it.

        Args:
            model: The quantized model.
            batch: From :meth:`batch`.
            quant_loss: Descend the quantization loss alone, not a loss of the outputs; called only where
                ``quant_loss`` is claimed too.

        A learning rate of about 0.01 suits: weights and gains move, and no loss explodes.
        """
        raise NotImplementedError

    # ---- capability: quant_loss

    def quant_loss(self, model: Any, batch: Batch) -> float:
        """Return the value of ``dopt_api.get_quant_loss`` in a forward pass in inference on ``batch``."""
        raise NotImplementedError

    # ---- capability: distributed_calibration

    def calibrate_in_processes(
        self, name: str, config_file: Path, shards: Sequence[Sequence[Batch]], folder: Path
    ) -> Path:
        """Calibrate in as many processes as there are shards, each on its own; return the first's checkpoint.

        Args:
            name: The model.
            config_file: The strategy file.
            shards: The batches of each process.
            folder: Where the checkpoint may be saved.
        """
        raise NotImplementedError
