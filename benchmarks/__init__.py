"""Measurements of the package: run each from the checkout, as in `python -m benchmarks.static_profile --help`."""
