"""Reading checkpoints: what is refused, and that nothing in a file is ever executed."""

import os
import pickle
import re
import warnings

import pytest
import torch

import dopt_api
from dopt_api.errors import CheckpointError
from dopt_torch.checkpoint import load_checkpoint


@pytest.fixture
def exporting(small_net, quantize, tmp_path):
    """Export a calibrated small network from what ``save`` puts into its checkpoint."""
    quantized = quantize(small_net, small_net.input_shape, torch.randn(8, 3, 12, 12))

    def run(save=lambda state: state, path=tmp_path / "quant.pth"):
        torch.save(save(quantized.state_dict()), path)
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        return dopt_api.export(type(small_net)(), tmp_path / "config.json", path, out)

    return run


class Payload:
    """What an attacker puts into a pickle: unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_malicious_checkpoint_is_refused_and_nothing_in_it_runs(tmp_path, new_format):
    path = tmp_path / "evil.pth"
    state = {"weight": torch.zeros(1), "extra": Payload(tmp_path / "owned")}
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


def test_a_plain_malicious_pickle_is_refused_and_does_not_run(tmp_path):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_and_parameters_of_every_type_are_read(tmp_path, dtype, new_format):
    tensor = torch.ones(2, 3).to(dtype)
    state = {"a": tensor, "b": tensor[:, 1:]}
    if dtype.is_floating_point:
        state["c"] = torch.nn.Parameter(tensor)
    torch.save(state, tmp_path / "s.pth", _use_new_zipfile_serialization=new_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch speaks of its own old storages
        loaded = load_checkpoint(tmp_path / "s.pth")
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"not a checkpoint at all"), "cannot be read"),
        (lambda path: torch.save([torch.zeros(1)], path), "is not a state dict"),
        (
            lambda path: torch.save({"epoch": 3, "state_dict": {"w": torch.zeros(1)}}, path),
            "only the entry 'state_dict'",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_path_with_the_remedy(tmp_path, make, message):
    path = tmp_path / "quant é.pth"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "torch.save(" in str(caught.value) or "Save" in str(caught.value)


def test_a_truncated_checkpoint_is_refused(tmp_path, exporting):
    path = tmp_path / "quant.pth"
    exporting()
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_a_checkpoint_saved_from_a_wrapped_model_is_taken(exporting):
    plain = exporting()
    text, model = plain.params.read_bytes(), plain.model.read_bytes()
    wrapped = exporting(lambda state: {f"module.{key}": value for key, value in state.items()})
    assert (wrapped.params.read_bytes(), wrapped.model.read_bytes()) == (text, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "dopt_quantizer" not in k}, "that of a float model"),
        (lambda s: {k: v for k, v in s.items() if "fc.dopt_quantizer" not in k}, "does not hold the quantizer of 'fc'"),
        (lambda s: {**s, "bn1.dopt_quantizer.input_scale": torch.ones(())}, "holds the quantizer of 'bn1'"),
        (lambda s: {k: v for k, v in s.items() if k != "conv1.weight"}, r"does not fit the model.*conv1\.weight"),
        (lambda s: {**s, "fc.weight": torch.zeros(7, 7)}, r"does not fit the model.*fc\.weight"),
        (lambda s: {**s, "other": torch.zeros(1)}, "does not fit the model.*other"),
        (lambda s: {k: v for k, v in s.items() if k != "fc.dopt_quantizer.input_scale"}, "does not fit.*input_scale"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_leaves_nothing(exporting, tmp_path, change, message):
    with pytest.raises(CheckpointError) as caught:
        exporting(change)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(tmp_path / "quant.pth") in caught.value.where
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_statistics_in_a_checkpoint_are_refused(exporting, tmp_path):
    with pytest.raises(dopt_api.DoptError, match="stored statistics have no 'counts'"):
        exporting(lambda s: {k: v for k, v in s.items() if not k.endswith("statistics.counts")})
    assert list((tmp_path / "out").iterdir()) == []
