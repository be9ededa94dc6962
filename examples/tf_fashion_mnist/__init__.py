"""Calibration and retraining of a small network in TensorFlow sessions."""
