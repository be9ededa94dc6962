"""Statistics in the graph against the core's, to the bit."""

import numpy as np
import pytest
import tensorflow as tf
from collector import Collector
from graphs import session

from dopt_api.quantizer import Statistics, lattice
from dopt_tf.statistics import probe, rectified

v1 = tf.compat.v1


def check(found, batches, axis):
    wanted = Statistics()
    for batch in batches:
        wanted.update(batch, axis)
    for name, part in wanted.arrays().items():
        np.testing.assert_array_equal(found[name], part, err_msg=name)


SHAPES = [((7,), 1), ((9, 8, 3), 3), ((3, 9, 8), 1), ((4, 5, 6, 2), 4), ((70, 71, 2), -1), ((2, 70, 71), 1)]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_batches_of_any_split_give_the_core_s_statistics(shape, axis, known):
    rng = np.random.default_rng(0)
    data = (rng.standard_normal((9, *shape)) * 2.0 ** rng.integers(-20, 20, (9, *[1] * len(shape)))).astype(np.float32)
    with session() as (sess, _):
        collect = Collector(sess, [None, *(shape if known else [None] * len(shape))], axis)
        for split in ([9], [4, 9], [1, 2, 9]):
            batches = np.split(data, split[:-1])
            check(collect(*batches), batches, axis)
        check(collect(data[::-1]), [data], axis)


def test_what_is_known_not_to_be_negative_gives_the_same_statistics():
    rng = np.random.default_rng(0)
    batch = np.maximum(rng.standard_normal((4, 6, 5, 3)), 0).astype(np.float32)
    bad, few, negative_zero = batch.copy(), batch + np.float32(0.25), np.where(batch == 0, np.float32(-0.0), batch)
    bad[1, 2, 2, 0], bad[2, 0, 0, 1] = np.nan, np.inf
    few[0, 3, 3, 1] = 0
    with session() as (sess, _):
        collect = Collector(sess, [None, 6, 5, 3], -1, True)
        for batches in ([batch], [batch + 1], [few], [bad], [batch[:0], bad, few, batch], [negative_zero], [batch * 0]):
            check(collect(*batches), batches, -1)


def test_what_comes_from_a_rectifier_is_known_not_to_be_negative():
    with tf.Graph().as_default():
        x = v1.placeholder(tf.float32, [None, 4, 4, 3])
        assert rectified(tf.identity(tf.nn.max_pool2d(tf.nn.relu6(x), 2, 2, "SAME")))
        assert rectified(tf.reshape(tf.nn.relu(x), [-1, 48]))
        assert not rectified(x)
        assert not rectified(tf.nn.relu(x) + x)
        assert not rectified(tf.nn.leaky_relu(x))


def test_odd_batches():
    rng = np.random.default_rng(1)
    batch = rng.standard_normal((4, 6, 5, 3)).astype(np.float32)
    bad = batch.copy()
    bad[1, 2, 2, 0], bad[2, 0, 0, 1] = np.nan, np.inf
    wide = [batch * np.float32(2.0**e) for e in (-90, 60, -10, 100)]
    with session() as (sess, _):
        collect = Collector(sess, [None, 6, 5, 3], -1)
        for batches in (
            [bad],
            [np.full_like(batch, np.nan)],
            [np.zeros_like(batch)],
            [-np.zeros_like(batch), batch],
            [batch[:0]],
            [batch[:0], batch, batch[:0]],
            wide,
            wide[::-1],
            [np.full_like(batch, 3.0e38)],
            [np.full_like(batch, -(2.0**-20))],
        ):
            check(collect(*batches), batches, -1)


@pytest.mark.parametrize(
    "shape", [(3, 40, 50, 8), (2, 8, 40, 50), (2, 5), (1, 100, 3), (2, 1, 1, 5000), (2, 17, 18, 19, 3)]
)
@pytest.mark.parametrize("axis", [1, -1])
def test_open_shapes_are_probed_where_the_core_says(shape, axis):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with session() as (sess, _):
        given = v1.placeholder(tf.float32, [None] * len(shape))
        found = sess.run(probe(given, axis), {given: x})
    np.testing.assert_array_equal(found.ravel(), x[lattice(shape, axis)].ravel())
