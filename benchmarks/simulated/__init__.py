"""Launches of the compiled kernels on a simulator: the cases, and what their results must be."""
