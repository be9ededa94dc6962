"""Retrain a network with 4-bit weights by several processes: each has its share of the pictures.

With the packages of ``examples/README.md`` installed::

    torchrun --nproc_per_node 2 examples/torch_fashion_mnist/retrain.py --smoke
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # started as a script: find the packages of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dopt.dopt_torch.opt_main import (
    generate_config_file,
    generate_final_model,
    get_quant_loss,
    optimize_model,
    set_calibrate_state,
)
from dopt_api.formats import convert
from dopt_torch.retraining import fit_weight_scales, parameter_groups
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
    """Train in float, calibrate, retrain; all of it by every process, files by the first one."""
    given = options(__doc__, "example_output/torch_retraining")
    if "RANK" not in os.environ:
        sys.exit(f"error: several processes are wanted. Fix: torchrun --nproc_per_node 2 {' '.join(sys.argv)}")
    dist.init_process_group("gloo")
    first, size = dist.get_rank() == 0, dist.get_world_size()
    share, batch_size = given.train.part(dist.get_rank(), None, size), BATCH // size
    config_file, checkpoint = given.folder / "config.json", given.folder / "quant.pth"
    torch.set_num_threads(max(1, torch.get_num_threads() // size))

    torch.manual_seed(0)
    model = build()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
    fit(wrapped, optimizer, share, given.epochs, batch_size=batch_size)
    found = {"float": accuracy(model, given.test)}

    # 1. One strategy file for all
    if first:
        generate_config_file(model, INPUT_SHAPE, config_file)
        choose_strategy(config_file, "Quant_INT8-4")
    dist.barrier()

    # 2. Calibrate: each process looks at its own pictures, and switching off merges what they saw
    quant_model = optimize_model(model, config_file)
    set_calibrate_state(quant_model, True)
    with torch.no_grad():
        for batch in share.part(0, 512 // size).batches(batch_size):
            quant_model(tensors(batch)[0])
    set_calibrate_state(quant_model, False)
    found["calibrated, simulated in PyTorch"] = accuracy(quant_model, given.test)

    # 3. Retrain by the same loop: scales are parameters as weights are
    fit_weight_scales(quant_model)  # at 4 bits: begin with the scales of least error
    wrapped = DistributedDataParallel(quant_model)
    optimizer = torch.optim.SGD(parameter_groups(wrapped, 0.02), momentum=0.9)
    fit(
        wrapped,
        optimizer,
        share,
        given.epochs,
        batch_size=batch_size,
        extra_loss=lambda: 0.05 * get_quant_loss(wrapped),
    )
    found["retrained, simulated in PyTorch"] = accuracy(quant_model, given.test)

    # 4. The first process saves, exports, and tries the integer form
    if first:
        torch.save(quant_model.state_dict(), checkpoint)
        exported = generate_final_model(build(), config_file, checkpoint, given.folder, dynamic_batch=True)
        (deployed,) = convert(exported.params, "onnx_qdq", given.folder)
        found["retrained, integers in ONNX Runtime"] = onnx_accuracy(deployed, given.test)
        show(found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
