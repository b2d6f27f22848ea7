"""Plans: the one-launch kernel by itself, as planned and otherwise, beside the kernels of two launches."""

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fused_kd import statistics as stats
from fused_kd.divergences import Objective
from fused_kd.launching import AUTO, TWO, device_of
from fused_kd.testing import launching

from ..context import Context, prepare
from ..subjects import TEMPERATURE, reason, released
from ..timing import timed

CLUSTERS = (4, 8, 16)
WARPS = (1, 4, 8)  # of a program that takes a row whole
COMPILED_ROWS = 2  # no length of rows is compiled in


def results(context: Context) -> Iterator[dict[str, Any]]:
    errors = compiled(context)
    for vocabulary in (*context.sizes.short, *context.sizes.vocabularies):
        yield from at(context, vocabulary, {text: errors[vocabulary, text] for text in texts(context, vocabulary)})
        released()


def texts(context: Context, vocabulary: int) -> list[str]:
    """Return launches as FUSED_KD_PLAN names them; the planned one is the first, two launches are the second."""
    if vocabulary in context.sizes.short:
        return [AUTO, TWO, *(f"cluster=1,warps={warps},columns=8" for warps in WARPS)]
    device = device_of(context.device)
    programs = [
        f"programs={count},warps={warps},columns={columns}"
        for (warps, columns), count in itertools.product(context.sizes.programs_of, context.sizes.programs)
    ]
    clusters = [f"cluster={ctas},warps=8,columns=8" for ctas in CLUSTERS if device is not None and device.clusters]
    return [AUTO, TWO, *clusters, *programs]


def at(context: Context, vocabulary: int, errors: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    rows = context.sizes.rows * max(1, context.sizes.judged[0] // vocabulary)  # short rows, until memory takes its time
    inputs = problem(context.device, context.sizes.dtype, rows, vocabulary)
    for text, error in errors.items():
        result: dict[str, Any] = {"vocabulary": vocabulary, "rows": rows, "plan": text}
        if error is not None or not context.has(3):
            yield {**result, "reason": error or "no time was left"}
            continue
        with launching(text):
            timing = timed({0: launched(text, *inputs)}, context.sizes.batches, context.sizes.rounds)[0]
        yield {**result, **timing._asdict(), **(launch(context, vocabulary) if text == AUTO else {})}


def compiled(context: Context) -> dict[tuple[int, str], str | None]:
    """Compile all launches in several processes, for the cache that they share; give the error of each, or None."""
    wanted = [(V, text) for V in (*context.sizes.short, *context.sizes.vocabularies) for text in texts(context, V)]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(context.sizes.workers, spawned, initializer=prepare) as pool:
        arguments = str(context.device), context.sizes.dtype
        futures = {(V, text): pool.submit(compile_launch, text, *arguments, V) for V, text in wanted}
    return {key: future.result() for key, future in futures.items()}


def compile_launch(text: str, device: str, dtype: torch.dtype, vocabulary: int) -> str | None:
    """Return why a launch does not compile and run, or None; runs in a worker."""
    try:
        with launching(text):
            launched(text, *problem(torch.device(device), dtype, COMPILED_ROWS, vocabulary))()
            torch.cuda.synchronize()
    except Exception as error:
        return reason(error)
    return None


def problem(device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Return logits of student and teacher, labels, the weights and the statistics of the rows, and a gradient."""
    student, teacher = (torch.empty(1, rows, vocabulary, dtype=dtype, device=device).normal_(0, 3) for _ in range(2))
    labels = torch.randint(vocabulary, (rows,), device=device)
    weights = torch.ones(3, rows, dtype=torch.float64, device=device)
    statistics = torch.empty(stats.COUNT, rows, device=device)
    return student, teacher, labels, weights, statistics, torch.empty_like(student)


def launched(text: str, *inputs: Tensor) -> Callable[[], object]:
    """Return what launches the kernels of a plan."""
    from fused_kd.backends import triton as kernels
    from fused_kd.launching import single_pass

    student, teacher, labels, weights, statistics, gradient = inputs
    objective = Objective(temperature=TEMPERATURE)

    def in_two() -> None:
        kernels.row_statistics(student, teacher, labels, weights, statistics, None, objective, False)
        kernels.logit_gradient(student, teacher, labels, statistics, weights, None, gradient, None, objective)

    if text == TWO:
        return in_two
    planned = single_pass(student, teacher, in_place=False, always=True)
    return lambda: kernels.statistics_and_gradient(
        student, teacher, labels, weights, statistics, gradient, None, planned, objective, False
    )


def launch(context: Context, vocabulary: int) -> dict[str, Any]:
    """Return the launch that is planned."""
    from fused_kd.launch import best_single_pass

    device, size = device_of(context.device), context.sizes.dtype.itemsize
    assert device is not None
    return {"launch": best_single_pass(context.sizes.rows, vocabulary, 2 * size, size, device).launch._asdict()}
