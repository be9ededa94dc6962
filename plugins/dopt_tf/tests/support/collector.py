"""Statistics of a placeholder, as a layer's calibration takes them."""

import tensorflow as tf

from dopt_tf.statistics import DeviceStatistics, arrangement, merge

v1 = tf.compat.v1


class Collector:
    """Statistics of a placeholder, in a session of their own."""

    def __init__(self, sess, shape, axis, not_negative=False):
        self.sess, self.x = sess, v1.placeholder(tf.float32, shape)
        self.statistics = DeviceStatistics()
        parts = self.statistics.parts
        shape, positions = arrangement(self.x, axis)
        before = {name: part.read_value() for name, part in parts.items()}
        after = merge(before, tf.reshape(self.x, shape), positions, not_negative)
        with tf.control_dependencies(list(after.values())):
            self.step = tf.group(*(parts[name].assign(value) for name, value in after.items()))
        self.reset()

    def reset(self):
        self.sess.run([variable.initializer for variable in self.statistics.parts.values()])

    def __call__(self, *batches):
        self.reset()
        for batch in batches:
            self.sess.run(self.step, {self.x: batch})
        return self.sess.run(self.statistics.parts)
