"""The compiled kernels, read without a GPU: variants, their machine code, its main loop, bounds on it."""
