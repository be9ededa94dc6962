"""Calibration and training by two processes, over gloo: what they agree on, to the bit."""

import json
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import copy, json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from dopt.dopt_torch.opt_main import generate_config_file, get_quant_loss, optimize_model, set_calibrate_state

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def scales(model):
    return {key: value.tolist() for key, value in model.state_dict().items() if "dopt_quantizer" in key}


def calibrate(model, batches):
    set_calibrate_state(model, True)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    set_calibrate_state(model, False)
    return model


config = f"{folder}/config{rank}.json"
generate_config_file(build(), "x:1,3,8,8", config)
text = open(config).read().replace('"float"', '"Quant_INT8-8"')
open(config, "w").write(text.replace('"quant_strategy": ', '"range": "mse", "quant_strategy": ', 1))
torch.manual_seed(1)
data = 10 ** torch.linspace(-3, 2, 24).view(-1, 1, 1, 1) * torch.randn(24, 3, 8, 8)
alone = calibrate(optimize_model(build(), config), [data])

dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
half = data[rank::2]
shared = calibrate(optimize_model(build(), config), half.split(5))
wrapped = DistributedDataParallel(optimize_model(build(), config))
calibrate(wrapped, half.split(3))
result = {"alone": scales(alone), "shared": scales(shared), "wrapped": scales(wrapped.module)}

model = optimize_model(build(), config)  # never calibrated: scales come from the first batches of both ranks
trained = DistributedDataParallel(model)
optimizer = torch.optim.SGD(trained.parameters(), 0.01)
torch.manual_seed(2 + rank)
for step in range(3):
    optimizer.zero_grad()
    (trained(torch.randn(6, 3, 8, 8)).square().mean() + 0.05 * get_quant_loss(trained)).backward()
    optimizer.step()
state = {key: value.tolist() for key, value in model.state_dict().items() if "running" not in key}
result["trained"] = {key: value for key, value in state.items() if "statistics" not in key}

model = optimize_model(build(), config)
if rank == 0:
    model.load_state_dict(shared.state_dict())
else:
    with torch.no_grad():
        model[0].weight.zero_()
resumed = DistributedDataParallel(model).eval()
with torch.no_grad():
    result["resumed"] = resumed(data[:2]).tolist()
    result["wanted"] = shared.eval()(data[:2]).tolist()
json.dump(result, open(f"{folder}/result{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.fail("torch.distributed is needed")
    folder = tmp_path_factory.mktemp("ranks")
    runs = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_with_half_of_the_data_each_find_what_one_process_finds(ranks):
    assert ranks[0]["shared"] == ranks[1]["shared"] == ranks[0]["alone"] == ranks[1]["alone"]
    assert ranks[0]["alone"]["0.dopt_quantizer.statistics.samples"] == 24


def test_so_they_do_through_the_wrapper_and_in_other_batches(ranks):
    assert ranks[0]["wrapped"] == ranks[1]["wrapped"] == ranks[0]["alone"]


def test_ranks_stay_equal_in_training_from_the_first_batches(ranks):
    assert ranks[0]["trained"] == ranks[1]["trained"]
    assert any(ranks[0]["trained"]["0.dopt_quantizer.weight_gain"])


def test_what_rank_0_has_loaded_reaches_rank_1_through_the_wrapper(ranks):
    assert ranks[0]["resumed"] == ranks[1]["resumed"] == ranks[0]["wanted"]
