"""Stand-ins for a GPU in a rehearsal: CUDA's functions on a CPU, interpreted kernels, tools that only print.

Stages run line by line as they would on a GPU, on small tensors.  No figure of a rehearsal means anything; what is right
or wrong does.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from fused_kd import sweep
from fused_kd.devices import DEVICES
from fused_kd.testing import accuracy, interpreter, launching

from . import cuda

DEVICE = DEVICES["H100"]._replace(clusters=False)  # what launches are planned for
TOO_LARGE = 1.003  # a wrong kernel's gradient, times the right one


_HELD = contextlib.ExitStack()  # contexts that last as long as the process: one that nobody holds is left at once


def install(wrong: bool = False) -> None:
    """Put the stand-ins in their places, for this process; call it once."""
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    torch.set_num_threads(1)
    interpreter.hasten()
    replacements: dict[Any, dict[str, Any]] = {
        torch.cuda: cuda.REPLACEMENTS,
        accuracy: {"SAMPLE_ELEMENTS": 2**13},  # each costs hundreds of times what it does on a GPU
        sweep: {"scale": cuda.as_operator(sweep.scale)},
        torch: {"compile": functools.partial(torch.compile, backend="eager")},
    }
    for module, functions in replacements.items():
        for name, function in functions.items():
            patch.object(module, name, function).start()
    _HELD.enter_context(launching(device=DEVICE))
    if wrong:
        _spoil()


def _spoil() -> None:
    """Make the kernels' gradients too large, as a wrong factor would."""
    kernels: Any = sweep._kernels()
    kernels.logit_gradient = _spoiled(kernels.logit_gradient, gradient=6)
    kernels.statistics_and_gradient = _spoiled(kernels.statistics_and_gradient, gradient=5)


def _spoiled(kernel: Callable[..., Any], gradient: int) -> Callable[..., Any]:
    def spoiled(*arguments: Any, **options: Any) -> Any:
        result = kernel(*arguments, **options)
        arguments[gradient].mul_(TOO_LARGE)
        return result

    return spoiled
