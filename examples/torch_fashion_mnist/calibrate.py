"""Quantize a trained network without training: strategy file, calibration, export, integer form.

With the packages of ``examples/README.md`` installed::

    python examples/torch_fashion_mnist/calibrate.py --smoke
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dopt.dopt_torch.opt_main import (
    generate_config_file,
    generate_final_model,
    optimize_model,
    set_calibrate_state,
)
from dopt_api.formats import convert
from examples.fashion_mnist.program import choose_strategy, options, show
from examples.torch_fashion_mnist.network import (
    BATCH,
    INPUT_SHAPE,
    accuracy,
    build,
    fit,
    onnx_accuracy,
    tensors,
)


def main() -> None:
    """Train in float, then quantize."""
    given = options(__doc__, "example_output/torch_calibration")
    config_file, checkpoint = given.folder / "config.json", given.folder / "quant.pth"
    torch.manual_seed(0)
    model = build()
    fit(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), given.train, given.epochs)

    # 1. Which layers there are: a strategy file to edit
    generate_config_file(model, INPUT_SHAPE, config_file)
    choose_strategy(config_file, "Quant_INT8-8")

    # 2. Calibrate: forward passes over some hundred pictures of the training set
    quant_model = optimize_model(model, config_file)
    set_calibrate_state(quant_model, True)
    with torch.no_grad():
        for batch in given.train.part(0, 512).batches(BATCH):
            quant_model(tensors(batch)[0])
    set_calibrate_state(quant_model, False)
    torch.save(quant_model.state_dict(), checkpoint)

    # 3. Export the float graph with its parameter file, and convert the two to what integer kernels take
    exported = generate_final_model(build(), config_file, checkpoint, given.folder, dynamic_batch=True)
    (deployed,) = convert(exported.params, "onnx_qdq", given.folder)

    show(
        {
            "float": accuracy(model, given.test),
            "calibrated, simulated in PyTorch": accuracy(quant_model, given.test),
            "calibrated, int8 in ONNX Runtime": onnx_accuracy(deployed, given.test),
        }
    )


if __name__ == "__main__":
    main()
