"""The parts of `fused-kd bench`: measurement, results, tables, plots, comparison with an earlier run."""
