"""The figures of `regression.py`, one module for each way to measure them, their record and the comparison with it."""
