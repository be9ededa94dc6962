"""The format ``litert``: int8 models of LiteRT (TensorFlow Lite), with the scales of the parameter file to the bit.

TensorFlow's own converter makes a float model of the frozen graph, and fuses; which of its tensors are the layers'
inputs and outputs is known because they were asked for as outputs. The file is then rewritten: ``frozen_graph`` reads
the exported graph, ``conversion`` has it converted, ``grids`` decides what can run in integers, ``rewriting`` writes
it so; ``flatbuffer`` and ``integers`` are what they use. The specification of the integer kernels is
https://ai.google.dev/edge/litert/models/quantization_spec.
"""

from __future__ import annotations

from pathlib import Path

from dopt_api.errors import FormatError
from dopt_api.params import QuantParams

__all__ = ["write"]


def write(model: Path, params: QuantParams, folder: Path) -> None:
    """Write ``<model>.tflite``.

    Args:
        model: ``model.pb`` of an export of the TensorFlow backend.
        params: Its parameters.
        folder: An empty folder.

    Raises:
        ParamsError: The parameters are not those of the model.
        FormatError: The model is no frozen graph, a strategy has no such form, or the converter refuses the graph.

    Example:
        After an export to ``output``::

            from dopt_api.formats import convert

            convert("output/quant_params.json", "litert", "deploy")  # writes deploy/model.tflite
    """
    if model.suffix == ".onnx":
        raise FormatError(
            f"The format 'litert' is not available for ONNX models, and the model is {model.name!r}",
            where=str(model.absolute()),
            expected="an export of the TensorFlow backend (model.pb)",
            fix="Export from the TensorFlow backend, or use the format 'onnx_qdq'.",
        )
    from dopt_tf.litert.writer import integer_model  # noqa: PLC0415  # imports TensorFlow, which takes seconds

    content = integer_model(model, params)
    (folder / f"{model.stem}.tflite").write_bytes(content)
