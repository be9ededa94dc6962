"""EfficientNet-Lite0 in a TensorFlow session graph: from strategy file to deployable model."""
