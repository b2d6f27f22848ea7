"""What a machine with a GPU proves and measures in eight minutes: `python -m benchmarks.gpu`."""
