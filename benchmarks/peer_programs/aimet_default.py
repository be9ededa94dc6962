# pip: aimet-onnx onnxruntime numpy
"""AIMET's simulation of the ONNX model, 8 bits, with its default settings."""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from aimet_onnx import QuantizationSimModel


def batches(data):
    """Return feeds of 16 pictures."""
    return [{"x": batch} for batch in np.array_split(data, -(-len(data) // 16))]


def main(folder):
    """Quantize, run, and leave what came out."""
    calibration, evaluation = np.load(folder / "calibration.npy"), np.load(folder / "evaluation.npy")
    model = onnx.load(str(folder / "float.onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    begun = time.monotonic()
    for feed in batches(calibration):
        session.run(None, feed)
    float_seconds = time.monotonic() - begun
    begun = time.monotonic()
    simulation = QuantizationSimModel(model)
    simulation.compute_encodings(batches(calibration))
    seconds = time.monotonic() - begun
    outputs = [simulation.session.run(None, feed)[0] for feed in batches(evaluation)]
    np.save(folder / "outputs.npy", np.concatenate(outputs))
    facts = {"version": metadata.version("aimet-onnx"), "seconds": seconds, "float_seconds": float_seconds}
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
