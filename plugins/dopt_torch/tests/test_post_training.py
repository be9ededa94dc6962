"""Post-training in one call: what it does, within a time, and interrupted at any layer and begun again."""

import pytest
import torch
from padded_network import Net, batches, sqnr

from dopt.dopt_torch.opt_main import set_calibrate_state
from dopt_api.errors import CalibrationError, CheckpointError
from dopt_torch import checkpoint
from dopt_torch.post_training import post_training
from dopt_torch.rounding import round_weights


@pytest.fixture
def every_layer_kept(monkeypatch):
    monkeypatch.setattr(checkpoint.KeptWork, "_SECONDS", 0.0)


def stopping_before(count):
    def progress(layers):
        for number, layer in enumerate(layers):
            if number == count:
                raise KeyboardInterrupt
            yield layer

    return progress


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_one_call_is_calibration_and_rounding(make):
    by_hand, at_once = make(), make(calibrate=False)
    expected = round_weights(by_hand, batches()[:2])
    assert post_training(at_once, iter(batches()), samples=16) == expected
    assert same(by_hand, at_once)
    assert sqnr(at_once, Net().eval(), batches(seed=9)) > sqnr(make().eval(), Net().eval(), batches(seed=9)) + 3


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_interrupted_call_goes_on_and_ends_with_the_same_numbers(make, tmp_path, every_layer_kept, layers):
    whole, file = make(), tmp_path / "work.pth"
    expected = round_weights(whole, batches())
    with pytest.raises(KeyboardInterrupt):
        round_weights(make(), batches(), resume=file, progress=stopping_before(layers))
    assert file.exists()
    seen = []
    again = make()
    assert round_weights(again, batches(), resume=file, progress=lambda left: seen.extend(left) or seen) == expected
    assert len(seen) == 4 - layers
    assert same(whole, again)
    assert not file.exists()


def test_the_file_of_other_work_is_refused_and_changes_nothing(make, tmp_path, every_layer_kept):
    file = tmp_path / "work.pth"
    with pytest.raises(KeyboardInterrupt):
        round_weights(make(), batches(), resume=file, progress=stopping_before(2))
    content = file.read_bytes()
    with pytest.raises(CheckpointError, match="with other arguments"):
        round_weights(make(), batches(), positions=7, resume=file)
    other = make(data=batches(seed=3))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="begun on another model"):
        round_weights(other, batches(), resume=file)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert file.read_bytes() == content
    torch.save(make().state_dict(), file)
    with pytest.raises(CheckpointError, match="does not hold unfinished work"):
        round_weights(make(), batches(), resume=file)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        round_weights(make(), batches(), resume=file)


def test_layers_for_which_no_time_is_left_stay_as_they_are(make):
    model, untouched = make(calibrate=False), make()
    report = post_training(model, batches(), seconds=0.0)
    assert {layer.reason for layer in report} == {"no time was left for it"}
    assert same(model, untouched)
    assert all(not layer.reason for layer in post_training(model, batches(), seconds=600.0))


def test_without_data_nothing_is_left_half_calibrated(make):
    model = make(calibrate=False)
    with pytest.raises(CalibrationError):
        post_training(model, [])

    def broken():
        yield batches()[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        post_training(model, broken())
    assert "dopt_hooks" not in model.__dict__
    set_calibrate_state(model, True)  # begins as it should
    assert all(layer.reason == "" for layer in post_training(model, batches()))
