"""What `fused-kd distill` does, a file for each part of it; `experiment.py` runs them in order."""
