"""Calibration and retraining of a small network in PyTorch."""
