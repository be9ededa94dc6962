"""Two processes that do not do the same: one without data, one with broken data, one with an empty batch."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import dopt_api

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x, head=None):
        y = self.norm(self.stem(x)).mean((2, 3))
        heads = [self.first, self.second] if head is None else [getattr(self, head)]
        return sum(layer(y) for layer in heads)


def build():
    torch.manual_seed(0)
    return TwoHeads()


path = dopt_api.generate_config(build(), "x:1,3,6,6", f"{folder}/config{rank}.json")
path.write_text(path.read_text().replace('"quant_strategy": "float"', '"quant_strategy": "Quant_INT8-8"'))
data = torch.randn(12, 3, 6, 6)


def fresh():
    return dopt_api.optimize(build(), path)


def scales(model):
    return {key: value.tolist() for key, value in model.state_dict().items() if "dopt_quantizer" in key}


def calibrate(model, *calls):
    dopt_api.set_calibrate_state(model, True)
    with torch.no_grad():
        for batch, head in calls:
            model(batch, head)
    try:
        dopt_api.set_calibrate_state(model, False)
        failed = ""
    except dopt_api.DoptError as error:
        failed = str(error)
    return {**scales(model), "failed": failed}


alone = calibrate(fresh(), (data, None))
alone_by_head = calibrate(fresh(), (data[:5], "first"), (data[5:], "second"))
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

spoilt = data.clone()
spoilt[4, 0, 0, 0] = float("nan")
result = {
    "alone": alone,
    "one rank without data": calibrate(fresh(), *[(data, None)] * (rank == 0)),
    "alone by head": alone_by_head,
    "each rank another head": calibrate(fresh(), (data[:5], "first") if rank == 0 else (data[5:], "second")),
    "broken on one rank": calibrate(fresh(), (spoilt if rank else data, None)),
    "no data at all": calibrate(fresh()),
}

model = fresh().train()
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(wrapped.parameters(), 0.01)
for step in range(2):
    batch = data[6 * rank :][:6] * (1 + 9 * rank)  # the second rank's are wider
    optimizer.zero_grad()
    wrapped(batch).square().mean().backward()
    optimizer.step()
result["trained"] = {k: v for k, v in scales(model).items() if "statistics" not in k}

model = fresh().train()
wrapped = DistributedDataParallel(model.first)
wrapped(torch.randn(5 * rank, 4)).sum().backward()  # the first rank's batch is empty
result["first batch empty on one rank"] = scales(model.first)
result["gradient"] = model.first.weight.grad.tolist()
json.dump(result, open(f"{folder}/result{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    runs = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [run.communicate(timeout=120)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()  # one that waits for another that has failed
    assert [run.returncode for run in runs] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(2)]


def test_a_rank_without_data_has_the_scales_of_the_other(ranks):
    assert ranks[0]["one rank without data"] == ranks[1]["one rank without data"] == ranks[0]["alone"]
    assert ranks[0]["alone"]["failed"] == ""


def test_ranks_that_reach_different_layers_have_the_scales_of_both(ranks):
    assert ranks[0]["each rank another head"] == ranks[1]["each rank another head"] == ranks[0]["alone by head"]
    assert ranks[0]["alone by head"]["second.dopt_quantizer.statistics.samples"] == 7


def test_broken_data_on_one_rank_fail_on_both_with_the_same_sentence(ranks):
    assert ranks[0]["broken on one rank"] == ranks[1]["broken on one rank"]
    assert "'stem/Conv2D' had NaN or infinity in 1 of 24 samples" in ranks[0]["broken on one rank"]["failed"]


def test_no_data_on_any_rank_fails_on_both(ranks):
    for rank in ranks:
        assert (
            "'stem/Conv2D' has seen no data (and 2 other layers could not be calibrated)"
            in rank["no data at all"]["failed"]
        )


def test_first_training_batches_of_different_width_give_one_scale(ranks):
    assert ranks[0]["trained"] == ranks[1]["trained"]
    assert ranks[0]["trained"]["stem.dopt_quantizer.ready"] == 1


def test_an_empty_first_batch_of_one_rank_takes_the_scale_of_the_other(ranks):
    first, second = (rank["first batch empty on one rank"] for rank in ranks)
    assert first["dopt_quantizer.input_scale"] == second["dopt_quantizer.input_scale"]
    assert first["dopt_quantizer.statistics.samples"] == second["dopt_quantizer.statistics.samples"] == 5
    assert ranks[0]["gradient"] == ranks[1]["gradient"]
