"""What the examples on Fashion-MNIST share, without any framework."""
