"""The vendor's import path for TensorFlow: ``from dopt.dopt_tf.opt_main import ...``."""
