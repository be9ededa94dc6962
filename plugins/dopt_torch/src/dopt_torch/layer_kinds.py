"""The kinds of layer that can be quantized, and how each is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["KINDS", "LayerKind", "kind_of", "layer_name", "on_weight", "per_channel", "samples_first"]


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        module: Its class; subclasses count too.
        label: The last part of a layer's name, as the vendor writes it.
        function: The function of ``torch.nn.functional`` that computes it.
        weight_axis: The axis of the weight with the output channels.
        input_axis: The axis of a batch with the input channels.
        input_dims: Dimensions of a batch, or 0 if any number from two will do.
    """

    module: type[nn.Module]
    label: str
    function: str
    weight_axis: int
    input_axis: int
    input_dims: int

    @property
    def weight_input_axis(self) -> int:
        """The axis of the weight with the input channels (of one group)."""
        return 1 - self.weight_axis

    @property
    def op_type(self) -> str:
        """The kind as the strategy file names it: the class as Python prints it."""
        return str(self.module)


KINDS = (
    LayerKind(nn.Conv1d, "Conv1D", "conv1d", 0, 1, 3),
    LayerKind(nn.Conv2d, "Conv2D", "conv2d", 0, 1, 4),
    LayerKind(nn.Conv3d, "Conv3D", "conv3d", 0, 1, 5),
    LayerKind(nn.ConvTranspose1d, "ConvTranspose1D", "conv_transpose1d", 1, 1, 3),
    LayerKind(nn.ConvTranspose2d, "ConvTranspose2D", "conv_transpose2d", 1, 1, 4),
    LayerKind(nn.ConvTranspose3d, "ConvTranspose3D", "conv_transpose3d", 1, 1, 5),
    LayerKind(nn.Linear, "Linear", "linear", 0, -1, 0),
)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a module, or ``None`` if it is none that can be quantized."""
    return next((kind for kind in KINDS if isinstance(module, kind.module)), None)


def layer_name(path: str, label: str) -> str:
    """Return the name of a layer from its module path: ``conv1`` and ``Conv2D`` give ``conv1/Conv2D``."""
    return f"{path}/{label}" if path else label


def samples_first(x: Tensor, kind: LayerKind) -> Tensor:
    """Return a layer's input as a batch: an unbatched input gets an axis of one sample."""
    unbatched = x.dim() == kind.input_dims - 1 if kind.input_dims else x.dim() == 1
    return x.unsqueeze(0) if unbatched else x


def per_channel(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Shape ``values`` ``[C]`` so that they multiply ``x`` along an axis of ``C``."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.view(shape)


def on_weight(values: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Shape per-channel ``values`` so that they multiply ``weight`` channel by channel.

    ``values`` has one entry per index of ``axis``, or, for a grouped transposed convolution, one per output channel,
    with the groups one after the other on axis 0 of the weight.
    """
    channels = weight.shape[axis]
    ones = (1,) * (weight.dim() - 2)
    groups = values.numel() // channels
    if groups > 1:
        rows = weight.shape[0] // groups
        return values.view(groups, 1, channels).expand(groups, rows, channels).reshape(-1, channels, *ones)
    return values.view(-1, 1, *ones) if axis == 0 else values.view(1, -1, *ones)
