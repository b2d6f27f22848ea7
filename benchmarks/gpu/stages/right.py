"""Right: losses within the bounds of `fused-kd check`, kernels beside the formula in float64, equal bits in three runs.

Cases are shared out to processes, since most of their time is the compilation of kernels.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime  # the built-in one since Python 3.11
from typing import Any

import torch
from torch import Tensor

from fused_kd.launching import ONE, TWO
from fused_kd.testing import accuracy, linear_accuracy

from ...simulated.cases import covering_cases
from ..context import Context, is_rehearsal, prepare
from ..subjects import reason

RUNS = 3  # of each result, for equal bits
SUITES = {"linear_kd_loss": linear_accuracy, "kd_loss": accuracy}
BF16, FP32 = torch.bfloat16, torch.float32
REHEARSED: dict[str, list[Any]] = {
    "kd_loss": [
        accuracy.Case(8, 1040, BF16, BF16, 2.0, 0.3, "flat", "ignored", "mean", 0),
        accuracy.Case(8, 611, FP32, FP32, 2.5, 0.3, "peaked", "all", "none", 1),
    ],
    "linear_kd_loss": [linear_accuracy.LinearCase(8, 611, FP32, FP32, 2.0, 0.3, "flat", "all", "mean", 2)],
}


def results(context: Context) -> Iterator[dict[str, Any]]:
    work = [*launches(), *cases()]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(context.sizes.workers, spawned, initializer=prepare) as pool:
        futures = {pool.submit(measure, *item, str(context.device)): item for item in work}
        left = dict(futures)
        with contextlib.suppress(OutOfTime):
            for future in as_completed(futures, timeout=max(0.0, context.left())):
                error = future.exception()
                yield named(*left.pop(future)) | (future.result() if error is None else {"finding": reason(error)})
        pool.shutdown(wait=False, cancel_futures=True)
        yield from (named(*item) | {"reason": "no time was left"} for item in left.values())


def named(suite: str, case: Any) -> dict[str, Any]:
    return {"suite": suite, "case": getattr(case, "name", str(case))}


def cases() -> list[tuple[str, Any]]:
    """Return the quick table of `fused-kd check`, with both launches for each loss that can take one launch."""
    found = []
    for name, suite in SUITES.items():
        for case in REHEARSED[name] if is_rehearsal() else suite.cases(quick=True):  # type: ignore[attr-defined]
            has_choice = suite is linear_accuracy or (case.reduction != "none" and case.student_dtype != torch.float16)
            found += [
                (name, dataclasses.replace(case, launch=launch)) for launch in ((ONE, TWO) if has_choice else (TWO,))
            ]
    return found


def launches() -> list[tuple[str, Any]]:
    """Return launches of the kernels in which any two options meet."""
    found = covering_cases(2)
    return [("kernels", case) for case in ({case.form: case for case in found}.values() if is_rehearsal() else found)]


def measure(suite: str, case: Any, device: str) -> dict[str, Any]:
    """Return the errors of a case, and a finding if one is too large; runs in a worker."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    if suite == "kernels":
        return of_launch(case, torch.device(device))
    module: Any = SUITES[suite]
    errors = module.measure(case, torch.device(device))
    found = errors.failures(case.has_right_values)
    given = module.inputs(case, torch.device(device), seed=1000 * case.seed)
    if not same_bits([module.fused(case, given) for _ in range(RUNS)]):
        found.append("other bits in another run")
    return {**dataclasses.asdict(errors), **({"finding": "; ".join(found)} if found else {})}


def of_launch(case: Any, device: torch.device) -> dict[str, Any]:
    from ...simulated import launches

    outcomes, results = zip(*(launches.on_device(case, device) for _ in range(RUNS)), strict=True)
    found = list(outcomes[0].findings)
    if not same_bits([list(of.values()) for of in results]):
        found.append("other bits in another run")
    figures = {difference.result: difference.epsilons for difference in outcomes[0].differences}
    return {"epsilons": figures, **({"finding": "; ".join(found)} if found else {})}


def same_bits(runs: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether each run has the results of the first, bit for bit; NaN is equal to itself."""
    return all(
        torch.equal(bytes_of(a), bytes_of(b)) for run in runs[1:] for a, b in itertools.zip_longest(runs[0], run)
    )


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of the elements; a copy, since a tensor of one column is contiguous with any stride."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)
