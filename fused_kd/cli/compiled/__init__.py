"""What the compiled kernels consist of, without a GPU: variants, their machine code, its main loop, bounds on it."""
