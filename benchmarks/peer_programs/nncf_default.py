# pip: nncf onnx onnxruntime numpy
"""NNCF's post-training quantization of the ONNX model, with its fast bias correction, as its documentation begins."""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import nncf
import numpy as np
import onnx
import onnxruntime


def run(model, data, optimized):
    """Return the outputs of a model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": batch})[0] for batch in np.array_split(data, -(-len(data) // 16))])


def main(folder):
    """Quantize, run, and leave what came out."""
    calibration, evaluation = np.load(folder / "calibration.npy"), np.load(folder / "evaluation.npy")
    model = onnx.load(str(folder / "float.onnx"))
    begun = time.monotonic()
    run(model, calibration, optimized=True)
    float_seconds = time.monotonic() - begun
    begun = time.monotonic()
    dataset = nncf.Dataset(list(calibration[:, None]), lambda picture: {"x": picture})
    quantized = nncf.quantize(
        model,
        dataset,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(calibration),
        target_device=nncf.TargetDevice.CPU,
    )
    seconds = time.monotonic() - begun
    np.save(folder / "outputs.npy", run(quantized, evaluation, optimized=False))
    facts = {"version": metadata.version("nncf"), "seconds": seconds, "float_seconds": float_seconds}
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
