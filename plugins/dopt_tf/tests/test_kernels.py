"""The arithmetic on tensors against the core: values to the bit, gradients against the NumPy reference."""

import numpy as np
import pytest
import tensorflow as tf
from graphs import session
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dopt_api import quantizer as core
from dopt_api.quantizer import Grid
from dopt_tf.fake_quantize import (
    _pays_to_compile,
    fake_quantize,
    learned_fake_quantize,
    learned_scale,
    weight_scale,
)
from dopt_tf.layer_kinds import Layout, on_weight
from dopt_tf.quantizer import _relative_error

v1 = tf.compat.v1
F32 = np.float32
SYMMETRIC = Grid(8, signed=True, symmetric=True, narrow=True, per_channel=True)
# TensorFlow's kernels flush subnormal numbers to zero, so none are drawn
normal = st.one_of(
    st.just(0.0), st.floats(2.0**-100, 2.0**100, width=32), st.floats(-(2.0**100), -(2.0**-100), width=32)
)
scales = st.floats(2.0**-20, 2.0**20, width=32)
vectors = hnp.arrays(F32, st.integers(1, 20), elements=st.one_of(normal, st.floats(-500, 500, width=16)))


@pytest.fixture(scope="module", params=["compiled", "open shape"])
def ops(request):
    """Build every function once, over placeholders: compiled ones, and those for shapes that are not known."""
    shape = [None] if request.param == "compiled" else None
    with session() as (sess, _):
        x, dy = v1.placeholder(tf.float32, shape), v1.placeholder(tf.float32, shape)
        assert _pays_to_compile(x) == (request.param == "compiled")
        scale, low, high = (v1.placeholder(tf.float32, []) for _ in range(3))
        y = learned_fake_quantize(x, scale, low, high)
        gain = v1.placeholder(tf.float32, [None])
        learned = learned_scale(scale, gain)
        fetches = {
            "plain": fake_quantize(x, scale, low, high),
            "learned": y,
            "gradients": tf.gradients(y, [x, scale], dy),
            "scale": learned,
            "slope": tf.gradients(learned, gain)[0],
            "error": _relative_error(x, scale, low, high),
        }

        def run(fetch, **feeds):
            names = {"x": x, "dy": dy, "scale": scale, "low": low, "high": high, "gain": gain}
            return sess.run(fetches[fetch], {names[name]: value for name, value in feeds.items()})

        yield run


@given(vectors, scales, st.integers(0, 255))
def test_fake_quantization_is_the_core_s_to_the_bit(ops, x, scale, zero):
    wanted = core.fake_quantize(x, scale, zero, Grid(8))
    for kind in ("plain", "learned"):
        found = ops(kind, x=x, scale=scale, low=-zero, high=255 - zero)
        np.testing.assert_array_equal(found, wanted)


def test_ties_go_to_the_even_integer_and_infinities_saturate(ops):
    x = [-1.5, -0.5, 0.5, 1.5, 2.5, np.inf, -np.inf]
    found = ops("plain", x=x, scale=1.0, low=-8, high=7)
    assert found.tolist() == [-2, 0, 0, 2, 2, 7, -8]


@given(vectors, st.floats(2.0**-6, 8.0, width=32), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_gradients_are_those_of_the_core(ops, x, scale, zero, seed):
    dy = np.random.default_rng(seed).normal(size=x.shape).astype(F32)
    dx, dscale = ops("gradients", x=x, dy=dy, scale=scale, low=-zero, high=255 - zero)
    wanted_x, wanted = core.fake_quantize_gradients(dy, x, scale, zero, Grid(8))
    np.testing.assert_array_equal(dx, wanted_x)
    size = float(np.abs(dy).sum()) * 256  # every term is at most an end of the grid
    assert abs(float(dscale) - float(wanted)) <= 1e-5 * size


@pytest.mark.parametrize("end", [np.inf, -np.inf])
def test_an_infinite_input_counts_as_clipped(ops, end):
    x, dy = F32([1.0, end, -2.0, 700.0]), F32([1, 2, 3, 4])
    dx, dscale = ops("gradients", x=x, dy=dy, scale=0.5, low=-100, high=155)
    wanted_x, wanted = core.fake_quantize_gradients(dy, x, 0.5, 100, Grid(8))
    np.testing.assert_array_equal(dx, wanted_x)
    assert dscale == pytest.approx(float(wanted))


def test_the_half_steps_at_the_ends_belong_to_the_grid(ops):
    low, high = F32(-3.5), F32(4.5)
    x = [low, np.nextafter(low, F32(-9)), high, np.nextafter(high, F32(9))]
    dx, _ = ops("gradients", x=x, dy=np.ones(4), scale=1.0, low=-3, high=4)
    assert dx.tolist() == [1, 0, 1, 0]


@given(
    scales,
    hnp.arrays(
        F32, st.integers(1, 9), elements=st.floats(-1e6, 1e6, width=32).filter(lambda g: g == 0 or abs(g) > 1e-30)
    ),
)
def test_learned_scales_are_the_core_s_to_the_bit(ops, scale, gain):
    np.testing.assert_array_equal(ops("scale", scale=scale, gain=gain), core.learned_scale(scale, gain))
    slope = ops("slope", scale=scale, gain=gain)
    np.testing.assert_allclose(slope, core.gain_gradient(1.0, scale, gain), rtol=1e-5, atol=1e-30)


@given(hnp.arrays(F32, st.integers(1, 20), elements=st.floats(-300, 300, width=16)), st.floats(0.0625, 4, width=16))
def test_relative_error_is_the_core_s(ops, x, scale):
    found = ops("error", x=x, scale=scale, low=-100, high=155)
    assert found == pytest.approx(core.relative_squared_error(x, scale, 100, Grid(8)), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_and_their_gradients_are_the_core_s(axis, folded, compiled):
    rng = np.random.default_rng(axis)
    weight, dy = rng.normal(size=(2, 3, 4, 5, 6)).astype(F32)
    weight.flat[0] = 100.0
    channels = weight.shape[axis]
    factor = rng.choice([-1, 1], channels) * rng.uniform(0.5, 2, channels)
    shape = [-1 if i == axis else 1 for i in range(4)]
    folding = factor.astype(F32).reshape(shape)
    scale = rng.uniform(0.005, 0.02, channels).astype(F32)
    with session() as (sess, _):
        leaf, step = v1.placeholder(tf.float32, weight.shape if compiled else [None] * 4), tf.constant(scale)
        y = learned_fake_quantize(
            leaf * folding if folded else leaf, on_weight(step, 4, Layout(0, 1, axis, -1, -1)), -127, 127
        )
        y = y / folding if folded else y
        derived = weight_scale(leaf, SYMMETRIC, axis, tf.constant(folding.ravel()) if folded else None)
        fetches = [y, tf.gradients(y, [leaf, step], tf.constant(dy)), derived]
        found, (dx, dscale), derived = sess.run(fetches, {leaf: weight})
    zeros = np.zeros(channels, np.int32)
    x = (weight * folding if folded else weight).astype(F32)
    inner = dy / folding if folded else dy
    wanted = core.fake_quantize(x, scale, zeros, SYMMETRIC, axis=axis)
    if folded:
        np.testing.assert_allclose(found * folding, wanted, rtol=3e-7)
    else:
        np.testing.assert_array_equal(found, wanted)
    wanted_x, _ = core.fake_quantize_gradients(dy, x, scale, zeros, SYMMETRIC, axis=axis)
    _, wanted_scale = core.fake_quantize_gradients(inner, x, scale, zeros, SYMMETRIC, axis=axis)
    np.testing.assert_allclose(dx, wanted_x, rtol=3e-7 if folded else 0)
    np.testing.assert_allclose(dscale, wanted_scale, rtol=1e-4, atol=1e-3)
    extreme = core.channel_maximum(x, axis)
    np.testing.assert_array_equal(derived, core.scale_zero_point(-extreme, extreme, SYMMETRIC)[0])


def test_a_channel_of_zeros_has_a_scale_of_one():
    with session() as (sess, _):
        found = sess.run(weight_scale(tf.constant([[0.0, 2.0], [-0.0, 1.0]]), SYMMETRIC, 1))
    assert found.tolist() == [1.0, F32(2.0 / 127)]
