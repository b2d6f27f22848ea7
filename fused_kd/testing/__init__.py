"""The modules that tests, benchmarks and commands share.  `launching` chooses the launch, and the device to plan for."""

from ..launching import launching

__all__ = ["launching"]
