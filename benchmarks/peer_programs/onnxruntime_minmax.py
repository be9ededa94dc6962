# pip: onnxruntime onnx sympy numpy
"""ONNX Runtime's own quantizer: quantize/dequantize pairs, int8 weights per channel, least and greatest values."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Batches(CalibrationDataReader):
    """Feeds the calibration pictures, 16 at a time."""

    def __init__(self, data):
        self.left = [{"x": batch} for batch in np.split(data, len(data) // 16)]

    def get_next(self):
        """Return the next feed, or nothing at the end."""
        return self.left.pop(0) if self.left else None


def run(file, data, optimized):
    """Return the outputs of a model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": batch})[0] for batch in np.array_split(data, -(-len(data) // 16))])


def main(folder):
    """Quantize, run, and leave what came out."""
    calibration, evaluation = np.load(folder / "calibration.npy"), np.load(folder / "evaluation.npy")
    begun = time.monotonic()
    run(folder / "float.onnx", calibration, optimized=True)
    float_seconds = time.monotonic() - begun
    quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"))
    begun = time.monotonic()
    quantize_static(
        str(folder / "prepared.onnx"),
        str(folder / "quantized.onnx"),
        Batches(calibration),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    seconds = time.monotonic() - begun
    np.save(folder / "outputs.npy", run(folder / "quantized.onnx", evaluation, optimized=False))
    facts = {"version": onnxruntime.__version__, "seconds": seconds, "float_seconds": float_seconds}
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
