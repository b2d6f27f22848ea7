"""The parts of `fused-kd distill`, one per file; `experiment.py` runs them in order."""
