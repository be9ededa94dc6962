"""EfficientNet-Lite0 with its real ImageNet weights: from strategy file to deployable model."""
