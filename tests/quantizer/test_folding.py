"""Folding a batch normalization: the folded layer computes what layer and normalization computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopt_api.quantizer import BatchNorm, fold_batch_norm

F32, F64 = np.float32, np.float64


def random_norm(generator: np.random.Generator, channels: int, affine: bool = True) -> BatchNorm:
    return BatchNorm(
        gamma=generator.normal(1.0, 0.5, channels).astype(F32) if affine else None,
        beta=generator.normal(size=channels).astype(F32) if affine else None,
        mean=generator.normal(size=channels).astype(F32),
        variance=generator.uniform(0.1, 3.0, channels).astype(F32),
        epsilon=1e-3,
    )


def normalize(y, norm: BatchNorm):
    """Return the normalization of ``y [..., C]`` in float64."""
    gamma = 1.0 if norm.gamma is None else norm.gamma.astype(F64)
    beta = 0.0 if norm.beta is None else norm.beta.astype(F64)
    return gamma * (y - norm.mean.astype(F64)) / np.sqrt(norm.variance.astype(F64) + norm.epsilon) + beta


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([0, 1, -1]))
def test_folded_linear_layer_computes_both(seed, inputs, channels, has_bias, affine, axis):
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(channels, inputs)).astype(F32)
    bias = generator.normal(size=channels).astype(F32) if has_bias else None
    norm = random_norm(generator, channels, affine)
    stored = weight if axis == 0 else weight.T
    folded, shift = fold_batch_norm(stored, bias, norm, axis=axis)
    assert folded.dtype == shift.dtype == F32
    assert folded.shape == stored.shape
    x = generator.normal(size=(7, inputs))
    plain = x @ weight.T.astype(F64) + (0.0 if bias is None else bias.astype(F64))
    both = x @ (folded if axis == 0 else folded.T).T.astype(F64) + shift
    np.testing.assert_allclose(both, normalize(plain, norm), rtol=1e-5, atol=1e-5)


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([(), (2,), (2, 3)]))
def test_folded_grouped_transposed_convolution_computes_both(seed, groups, inputs, outputs, kernel):
    """Weight ``[groups * inputs, outputs, *kernel]``: every tap is a matrix for each group."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(groups * inputs, outputs, *kernel)).astype(F32)
    norm = random_norm(generator, groups * outputs)
    folded, shift = fold_batch_norm(weight, None, norm, axis=1)
    x = generator.normal(size=(groups, inputs))

    def taps(values):
        parts = values.astype(F64).reshape(groups, inputs, outputs, -1)
        return np.einsum("gi,giot->tgo", x, parts).reshape(-1, groups * outputs)

    np.testing.assert_allclose(taps(folded) + shift, normalize(taps(weight), norm), rtol=1e-5, atol=1e-5)


@given(seeds)
def test_factor_is_rounded_once(seed):
    norm = random_norm(np.random.default_rng(seed), 4)
    exact = norm.gamma.astype(F64) / np.sqrt(norm.variance.astype(F64) + 1e-3)
    assert norm.factor.tolist() == exact.astype(F32).tolist()


@given(seeds)
def test_folded_weight_is_one_float32_product(seed):
    generator = np.random.default_rng(seed)
    norm = random_norm(generator, 3)
    weight = generator.normal(size=(3, 2)).astype(F32)
    folded, _ = fold_batch_norm(weight, None, norm, axis=0)
    assert folded.tolist() == [[float(w * f) for w in row] for row, f in zip(weight, norm.factor, strict=True)]


def test_an_identity_changes_nothing():
    norm = BatchNorm(None, None, np.zeros(2), np.ones(2), 0.0)
    weight, bias = fold_batch_norm(np.array([[1.5], [-2.5]]), np.array([0.1, 0.2]), norm, axis=0)
    assert weight.tolist() == [[1.5], [-2.5]]
    assert bias.tolist() == [float(F32(0.1)), float(F32(0.2))]


@pytest.mark.parametrize("variance", [-1.0, 0.0, np.nan])
def test_a_variance_that_makes_no_sense_shows_in_the_result_and_warns_of_nothing(variance):
    norm = BatchNorm(None, None, np.zeros(1), np.array([variance]), 0.0)
    weight, _ = fold_batch_norm(np.ones((1, 1)), None, norm, axis=0)
    assert not np.isfinite(weight).any()
