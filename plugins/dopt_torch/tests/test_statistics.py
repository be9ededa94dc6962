"""Statistics on the device against the core's: equal in every part, to the bit."""

from unittest import mock

import numpy as np
import pytest
import torch
from dopt_strategies import batches, finite, same_bits, statistics_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import dopt_torch.statistics
from dopt_api.quantizer import Statistics
from dopt_api.quantizer.statistics import BINS, LOWEST_EXPONENT
from dopt_torch.statistics import DeviceStatistics, _coarsen, merge_over_ranks

F32 = np.float32
powers = st.tuples(st.integers(-149, 127), st.sampled_from([-1.0, 1.0])).map(lambda t: t[1] * 2.0 ** t[0])
beside_powers = st.tuples(powers, st.sampled_from([-np.inf, np.inf])).map(
    lambda t: float(np.clip(np.nextafter(F32(t[0]), F32(t[1])), -3e38, 3e38))
)
every_size = st.one_of(finite, powers, beside_powers, st.just(0.0), st.just(-0.0))
broken = st.one_of(every_size, st.sampled_from([np.nan, np.inf, -np.inf]))


def device_statistics_of(*parts, axis=1):
    found = DeviceStatistics.empty()
    for part in parts:
        found.update(part if isinstance(part, torch.Tensor) else torch.from_numpy(np.array(part)), axis)
    return found


def core_statistics_of(*parts, axis=1):
    wanted = Statistics()
    for part in parts:
        wanted.update(part, axis)
    return wanted


def assert_same(found, wanted):
    found = found.to_core()
    for name, part in wanted.arrays().items():
        assert found.arrays()[name].dtype == part.dtype, name
        assert np.array_equal(found.arrays()[name], part), name
    assert same_bits(found, wanted)


class TestUpdating:
    @pytest.mark.parametrize("axis", [1, -1])
    @given(batches(every_size))
    def test_finite_batches(self, axis, parts):
        assert_same(device_statistics_of(*parts, axis=axis), core_statistics_of(*parts, axis=axis))

    @pytest.mark.parametrize("axis", [1, -1])
    @given(batches(broken))
    def test_batches_with_broken_samples(self, axis, parts):
        assert_same(device_statistics_of(*parts, axis=axis), core_statistics_of(*parts, axis=axis))

    @given(hnp.arrays(F32, st.integers(0, 6), elements=broken), st.sampled_from([1, -1]))
    def test_one_dimension_is_one_number_a_sample(self, part, axis):
        assert_same(device_statistics_of(part, axis=axis), core_statistics_of(part, axis=axis))

    @given(st.lists(powers, min_size=1, max_size=6))
    def test_every_exponent(self, values):
        parts = [np.array([[value, value / 3]], F32) for value in values]
        assert_same(device_statistics_of(*parts), statistics_of(*parts))

    def test_every_power_of_two_has_the_core_s_bins(self):
        found, wanted = [], []
        steps = np.linspace(-1, 1, 257)
        for exponent in range(-149, 128):
            part = (steps * 2.0**exponent).astype(F32).reshape(1, -1)
            found.append(device_statistics_of(part).to_core())
            wanted.append(statistics_of(part))
        assert all(same_bits(one, other) for one, other in zip(found, wanted, strict=True))

    @given(hnp.arrays(F32, (3, 2, 3, 2), elements=broken), st.sampled_from([1, -1]))
    def test_any_strides(self, part, axis):
        wanted = core_statistics_of(part, axis=axis)
        x = torch.from_numpy(part)
        wide = torch.zeros(6, 4, 3, 2)[::2, ::2].copy_(x)
        turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        for laid in (x.contiguous(memory_format=torch.channels_last), wide, turned):
            assert_same(device_statistics_of(laid, axis=axis), wanted)

    def test_expanded_batches(self):
        x = torch.tensor([[1.0], [-2.5]]).expand(2, 7)
        assert_same(device_statistics_of(x), statistics_of(x.numpy()))

    @given(st.one_of(hnp.arrays(np.uint64, (3, 2, 2)), hnp.arrays(np.uint16, (3, 2, 2))))
    def test_every_number_of_other_floating_types(self, bits):
        part = bits.view(np.float64 if bits.dtype == np.uint64 else np.float16)
        assert_same(device_statistics_of(part), statistics_of(part))

    def test_bfloat16_counts_as_the_same_numbers_in_float32(self):
        x = (torch.randn(4, 3, 5) * 7).bfloat16()
        assert_same(device_statistics_of(x), statistics_of(x.float().numpy()))

    def test_float64_beyond_float32_is_not_finite(self):
        found = device_statistics_of(np.array([[1e300, 0.0], [1.0, 2.0]])).to_core()
        assert (int(found.non_finite), int(found.samples)) == (1, 1)

    @pytest.mark.parametrize("shape", [(2, 64, 56, 56), (3, 56, 56, 64), (2, 5000), (2, 3, 20000), (1, 8, 9, 30, 31)])
    @pytest.mark.parametrize("axis", [1, -1])
    def test_tensors_that_are_probed_on_a_lattice(self, shape, axis):
        x = torch.randn(shape)
        found = device_statistics_of(x, axis=axis)
        assert int(found.parts["counts"].sum()) < x.numel() or shape == (2, 5000)
        assert_same(found, core_statistics_of(x.numpy(), axis=axis))

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 0), (2, 3, 0)])
    def test_empty_batches_change_nothing(self, shape):
        found = device_statistics_of(torch.ones(2, 3), torch.zeros(shape))
        assert_same(found, statistics_of(np.ones((2, 3), F32)))
        assert not device_statistics_of(torch.zeros(shape)).seen

    def test_only_broken_samples_have_been_seen_all_the_same(self):
        found = device_statistics_of(torch.full((2, 3), float("nan")))
        assert found.seen
        assert_same(found, statistics_of(np.full((2, 3), np.nan, F32)))

    @pytest.mark.parametrize("block", [1, 5, 1000])
    @given(batches(broken))
    def test_blocks_do_not_matter(self, block, parts):
        with mock.patch.object(dopt_torch.statistics, "BLOCK", block):
            found = device_statistics_of(*parts)
        assert_same(found, statistics_of(*parts))

    @given(hnp.arrays(F32, (6, 2, 3), elements=broken), st.lists(st.integers(0, 6), max_size=4), st.randoms())
    def test_any_split_in_any_order_gives_the_same_parts(self, batch, cuts, random):
        parts = np.split(batch, sorted(cuts))
        random.shuffle(parts)
        assert same_bits(device_statistics_of(*parts).to_core(), device_statistics_of(batch).to_core())

    def test_the_batch_is_not_written_to(self):
        x = torch.tensor([[1.0, float("nan")], [-3.0, 2.0]])
        before = x.clone()
        device_statistics_of(x)
        assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))

    def test_earlier_parts_are_not_written_to(self):
        found = device_statistics_of(torch.ones(2, 3))
        kept = dict(found.parts)
        copies = {name: part.clone() for name, part in kept.items()}
        found.update(torch.full((2, 3), 1e6), 1)
        assert all(torch.equal(kept[name], copies[name]) for name in kept)


class TestMoving:
    @given(batches(broken))
    def test_to_the_core_and_back_changes_nothing(self, parts):
        wanted = statistics_of(*parts)
        assert same_bits(DeviceStatistics.from_core(wanted).to_core(), wanted)

    @given(batches(every_size), batches(every_size))
    def test_what_came_from_the_core_can_go_on(self, early, late):
        found = DeviceStatistics.from_core(statistics_of(*early))
        for part in late:
            found.update(torch.from_numpy(part), 1)
        assert_same(found, statistics_of(*early, *late))

    def test_taking_from_the_core_copies(self):
        original = statistics_of(np.ones((2, 3), F32))
        copied = DeviceStatistics.from_core(original)
        copied.parts["counts"].zero_()
        assert original.counts.sum() == 6

    def test_no_data_are_the_core_s_no_data(self):
        assert_same(DeviceStatistics.empty(), Statistics())
        assert not DeviceStatistics.empty().seen

    def test_map_changes_every_part(self):
        found = device_statistics_of(torch.randn(4, 3))
        wanted = found.to_core()
        before = dict(found.parts)
        names = []

        def clone(part):
            names.append(part)
            return part.clone()

        found.map(clone)
        assert len(names) == len(before) == 7
        assert all(found.parts[name] is not part for name, part in before.items())
        assert_same(found, wanted)

    def test_statistics_follow_the_data_to_their_device(self):
        found = DeviceStatistics.empty("meta")
        with mock.patch.object(DeviceStatistics, "map", autospec=True) as moved:
            moved.side_effect = lambda self, _: self.parts.update(DeviceStatistics.empty().parts)
            found.update(torch.ones(2, 3), 1)
        moved.assert_called_once()
        assert_same(found, statistics_of(np.ones((2, 3), F32)))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu_too(self):
        x = torch.randn(8, 16, 30, 30)
        x[3, 2, 1, 0] = float("nan")
        found = DeviceStatistics.empty()
        found.update(x.cuda(), 1)
        assert found.parts["counts"].is_cuda
        assert_same(found, statistics_of(x.numpy()))

    def test_one_process_merges_nothing(self):
        found = device_statistics_of(torch.randn(4, 3))
        wanted = found.to_core()
        merge_over_ranks([found])
        assert_same(found, wanted)


class TestCoarsening:
    @given(hnp.arrays(np.int64, BINS, elements=st.integers(0, 2**40), fill=st.just(1)), st.integers(0, 230))
    def test_is_the_core_s(self, counts, shift):
        start = Statistics(exponent=np.asarray(LOWEST_EXPONENT, np.int64), counts=counts)
        found = _coarsen(torch.from_numpy(counts), torch.tensor(shift))
        assert np.array_equal(found.numpy(), start._counts_at(LOWEST_EXPONENT + shift))

    def test_every_shift_keeps_every_count(self):
        counts = torch.arange(BINS)
        for shift in range(230):
            assert int(_coarsen(counts, torch.tensor(shift)).sum()) == int(counts.sum())
