"""The first lines of the page: how much is quantized, how near to float it is, how large the files are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopt_api.params import QuantParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dopt_api.formats.integer_nodes import NodeKind
    from dopt_api.verify import Verification

__all__ = ["MODELS", "sizes", "summarize"]

MODELS = (".onnx", ".pb", ".tflite", ".safetensors")
"""Ends of names of files that hold a whole model."""


def summarize(
    params: QuantParams,
    integers: Mapping[str, NDArray[Any]],
    about: Mapping[str, Any],
    found: Verification | None,
    nodes: Sequence[NodeKind] = (),
) -> list[tuple[str, str]]:
    """Return what is known, as names and values.

    Args:
        params: The layers.
        integers: The weights' integers by tensor, where they are at hand.
        about: What ``dopt quantize`` noted, or nothing.
        found: What verifying found.
        nodes: Which nodes run in integers, where that is known.
    """
    strategies = Counter(layer.strategy for layer in params.layers)
    rows = [("layers quantized", f"{len(params.layers)}")]
    rows += [(f"of them {name}", f"{count}") for name, count in strategies.most_common() if len(strategies) > 1]
    rows += [("strategy", name) for name in strategies if len(strategies) == 1]
    if "float" in about:
        rows.append(("left float by the strategy file", f"{len(about['float'])}"))
        rows.append(("not quantizable", f"{len(about.get('not_quantizable', []))}"))
    parts = {layer.weight.tensor: layer.weight.bits for layer in params.layers if layer.weight.tensor in integers}
    if parts:
        number = sum(integers[name].size for name in parts)
        size = sum(integers[name].size * bits for name, bits in parts.items()) / 8
        rows.append(("quantized weights", f"{number:,}, {_size(size)} in place of {_size(number * 4)}"))
    if nodes:
        from dopt_api.formats.integer_nodes import summary  # noqa: PLC0415  # needs the extra onnx

        rows.append(("in ONNX Runtime", summary(nodes)))
    if found is not None:
        rows.append(("outputs against float", f"{found.sqnr_db:.2f} dB, cosine {found.cosine:.5f}"))
        rows.append(("with all optimizations", f"{found.optimized_db:.2f} dB"))
        rows.append(("kernels", ", ".join(f"{count} {kind}" for kind, count in found.kernels.items())))
    return rows


def sizes(model: Path, files: Sequence[Path]) -> list[tuple[str, str, float]]:
    """Return name, size and share of the float model's size for each file that holds a model, the largest first.

    Args:
        model: The float model.
        files: All files of the export.
    """
    found = [(file, file.stat().st_size) for file in files if file.suffix in MODELS]
    whole = next((size for file, size in found if file.name == model.name), None)
    if not whole:
        return []
    most = max(size for _, size in found)
    return [
        (file.name, f"{_size(size)}, {size / whole:.0%}", size / most)
        for file, size in sorted(found, key=lambda pair: -pair[1])
    ]


def _size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
