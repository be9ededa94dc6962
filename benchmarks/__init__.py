"""What quantization costs, in time, memory and accuracy; see the README beside this file."""
