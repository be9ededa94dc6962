"""Wrong statistics of activations: each is the core's with another way of taking in a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest

from dopt_api.quantizer import Statistics
from mutants.mutant import mutant, replace

LAW = "laws/test_statistics.py::"

take_in = Statistics.update


def statistics(update: Callable[[Any, Any], None]) -> type[Statistics]:
    """Return statistics that take in batches by another function."""

    class Wrong(Statistics):
        def update(self, batch: Any, channel_axis: int = 1) -> None:
            update(self, batch)

    return Wrong


@mutant(LAW + "test_batches_do_not_matter")
def the_first_batch_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Calibration begins with the second batch."""
    seen: WeakKeyDictionary[Statistics, bool] = WeakKeyDictionary()

    def update(self: Statistics, batch: Any) -> None:
        if seen.setdefault(self, False):
            take_in(self, batch)
        seen[self] = True

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_one_batch_is_the_reference_s_to_the_bit")
def the_last_batch_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A batch is taken in when the next one comes."""
    pending: WeakKeyDictionary[Statistics, Any] = WeakKeyDictionary()

    def update(self: Statistics, batch: Any) -> None:
        if self in pending:
            take_in(self, pending[self])
        pending[self] = np.array(batch)

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_one_batch_is_the_reference_s_to_the_bit")
def batches_count_twice(patch: pytest.MonkeyPatch) -> None:
    """Every batch is taken in two times."""

    def update(self: Statistics, batch: Any) -> None:
        take_in(self, batch)
        take_in(self, batch)

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_batches_do_not_matter")
def the_histogram_is_that_of_the_first_batch(patch: pytest.MonkeyPatch) -> None:
    """Extremes of all batches, a histogram of one."""

    def update(self: Statistics, batch: Any) -> None:
        counts = self.counts if int(self.samples) else None
        take_in(self, batch)
        if counts is not None:
            self.counts = counts

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_batches_do_not_matter")
def the_histogram_is_not_rescaled(patch: pytest.MonkeyPatch) -> None:
    """Counts of fine bins are added to those of coarse ones as they are."""

    def update(self: Statistics, batch: Any) -> None:
        before, new = self.counts, Statistics()
        take_in(new, batch)
        take_in(self, batch)
        self.counts = before + new.counts

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_one_batch_is_the_reference_s_to_the_bit")
def the_maximum_is_a_minimum(patch: pytest.MonkeyPatch) -> None:
    """The greatest value is the least of the samples' greatest."""

    def update(self: Statistics, batch: Any) -> None:
        take_in(self, batch)
        if np.size(batch) and np.isfinite(batch).all():
            self.maximum = np.asarray(np.max(batch, axis=tuple(range(1, np.ndim(batch)))).min())

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_batches_do_not_matter")
def mean_extremes_are_those_of_batches(patch: pytest.MonkeyPatch) -> None:
    """A batch counts as one sample in the mean of the extremes, times its size."""

    def update(self: Statistics, batch: Any) -> None:
        sums, whole = self.sums, Statistics()
        take_in(self, batch)
        if np.size(batch) and np.isfinite(batch).all():
            take_in(whole, np.reshape(batch, (1, 1, -1)))
            self.sums = sums + len(batch) * whole.sums

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_one_batch_is_the_reference_s_to_the_bit")
def the_histogram_looks_at_other_positions(patch: pytest.MonkeyPatch) -> None:
    """The lattice is that of another axis of channels."""

    def update(self: Statistics, batch: Any) -> None:
        before, new = Statistics.from_arrays(self.arrays()), Statistics()
        take_in(new, batch, -1)
        self.__dict__.update(before.merge(new).__dict__)

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_samples_with_nan_or_infinity_are_counted_and_left_out")
def nan_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Samples with NaN or infinity are left out and not told."""

    def update(self: Statistics, batch: Any) -> None:
        take_in(self, batch)
        self.non_finite = np.zeros((), np.int64)

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_samples_with_nan_or_infinity_are_counted_and_left_out")
def nan_spoils_its_batch(patch: pytest.MonkeyPatch) -> None:
    """A batch with NaN or infinity is left out as a whole."""

    def update(self: Statistics, batch: Any) -> None:
        bad = sum(not np.isfinite(sample).all() for sample in batch)
        if not bad:
            take_in(self, batch)
        self.non_finite = self.non_finite + np.int64(bad)

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_constant_data")
def zero_keeps_its_sign(patch: pytest.MonkeyPatch) -> None:
    """The least value of zeros may be -0.0."""

    def update(self: Statistics, batch: Any) -> None:
        take_in(self, batch)
        if np.size(batch) and self.minimum == 0:
            self.minimum = np.asarray(np.min(batch))

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_no_batch_and_empty_batches_leave_nothing")
def an_empty_batch_has_zeros(patch: pytest.MonkeyPatch) -> None:
    """A batch without samples counts as a sample of zeros."""

    def update(self: Statistics, batch: Any) -> None:
        take_in(self, batch if len(batch) else np.zeros((1, *np.shape(batch)[1:]), np.float32))

    replace(patch, "Statistics", statistics(update))


@mutant(LAW + "test_subnormal_samples")
def subnormal_samples_count_as_zero(patch: pytest.MonkeyPatch) -> None:
    """Subnormal numbers are flushed."""

    def update(self: Statistics, batch: Any) -> None:
        take_in(self, np.where(np.abs(batch) < np.finfo(np.float32).tiny, np.float32(0), batch))

    replace(patch, "Statistics", statistics(update))
