"""Proof and measurement on a machine with a GPU, in eight minutes: `python -m benchmarks.gpu`."""
