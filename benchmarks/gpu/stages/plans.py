"""Plans: the one-launch kernel by itself, launched otherwise than planned; the best beside what the plan picked."""

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from fused_kd.launch import AUTO, device_of
from fused_kd.testing.accuracy import planned

from ..context import Context, prepare
from ..subjects import TEMPERATURE, reason, released
from ..timing import timed

CLUSTERS = (4, 8, 16)
COMPILED_ROWS = 2  # no length of rows is compiled in


def results(context: Context) -> Iterator[dict[str, Any]]:
    errors = compiled(context)
    for vocabulary in context.sizes.vocabularies:
        yield from at(context, vocabulary, {text: errors[vocabulary, text] for text in texts(context)})
        released()


def texts(context: Context) -> list[str]:
    """Return launches as FUSED_KD_PLAN names them; the planned one is the first."""
    device = device_of(context.device)
    programs = [
        f"programs={count},warps={warps},columns={columns}"
        for (warps, columns), count in itertools.product(context.sizes.programs_of, context.sizes.programs)
    ]
    clusters = [f"cluster={ctas},warps=8,columns=8" for ctas in CLUSTERS if device is not None and device.clusters]
    return [AUTO, *clusters, *programs]


def at(context: Context, vocabulary: int, errors: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    run = kernel(context.device, context.sizes.dtype, context.sizes.rows, vocabulary)
    for text, error in errors.items():
        result: dict[str, Any] = {"vocabulary": vocabulary, "rows": context.sizes.rows, "plan": text}
        if error is not None or not context.has(3):
            yield {**result, "reason": error or "no time was left"}
            continue
        with planned(text):
            timing = timed({0: run}, context.sizes.batches, context.sizes.rounds)[0]
        yield {**result, **timing._asdict(), **(launch(context, vocabulary) if text == AUTO else {})}


def compiled(context: Context) -> dict[tuple[int, str], str | None]:
    """Compile all launches in several processes, for the cache that they share; give the error of each, or None."""
    wanted = list(itertools.product(context.sizes.vocabularies, texts(context)))
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(context.sizes.workers, spawned, initializer=prepare) as pool:
        arguments = str(context.device), context.sizes.dtype
        futures = {(V, text): pool.submit(compile_launch, text, *arguments, V) for V, text in wanted}
    return {key: future.result() for key, future in futures.items()}


def compile_launch(text: str, device: str, dtype: torch.dtype, vocabulary: int) -> str | None:
    """Return why a launch does not compile and run, or None; runs in a worker."""
    try:
        with planned(text):
            kernel(torch.device(device), dtype, COMPILED_ROWS, vocabulary)()
            torch.cuda.synchronize()
    except Exception as error:
        return reason(error)
    return None


def kernel(device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int) -> Callable[[], object]:
    from fused_kd.backends import triton as kernels

    student, teacher = (torch.empty(1, rows, vocabulary, dtype=dtype, device=device).normal_(0, 3) for _ in range(2))
    labels = torch.randint(vocabulary, (rows,), device=device)
    weight, gradient = torch.ones(rows, dtype=torch.float64, device=device), torch.empty_like(student)
    return lambda: kernels.loss_and_gradient(student, teacher, labels, weight, weight, TEMPERATURE, gradient)


def launch(context: Context, vocabulary: int) -> dict[str, Any]:
    """Return the launch that is planned."""
    from fused_kd.devices import one_launch_plan

    device, size = device_of(context.device), context.sizes.dtype.itemsize
    assert device is not None
    return {"launch": one_launch_plan(context.sizes.rows, vocabulary, 2 * size, size, device)._asdict()}
