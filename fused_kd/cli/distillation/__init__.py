"""The parts of `fused-kd distill`: models, text, training, report."""
