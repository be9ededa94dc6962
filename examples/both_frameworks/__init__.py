"""One strategy file for the same network in both frameworks."""
