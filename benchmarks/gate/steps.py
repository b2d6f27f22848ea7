"""Launches of a training step on a GPU, and the cost of its products: counted on fake tensors, without a GPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import kd_loss, linear_kd_loss, plan_chunks
from fused_kd.testing.launches import Launches, fake_gpu

from .figures import Figures
from .record import Operators

Step = Callable[[], object]

V, H_S, H_T = 128_256, 1024, 2048
CHUNK = 1024  # rows
T = 2.0
LINEAR: dict[str, tuple[tuple[bool, bool], dict[str, Any]]] = {  # gradients of hidden states and weight, options
    "trained head": ((True, True), {}),
    "trained head, float32 logits": ((True, True), {"logits_dtype": torch.float32}),
    "trained head, teacher_grad": ((True, True), {"teacher_grad": True}),
    "frozen head": ((True, False), {}),
    "loss only": ((False, False), {}),
    'reduction="none"': ((True, True), {"reduction": "none"}),
}


def from_logits(rows: int, **options: bool) -> Step:
    student, teacher = (torch.randn(rows, V, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    logits = student.clone()  # a gradient takes the memory of a model's output, not of a parameter
    leaves = [logits, teacher] if options.get("teacher_grad") else [logits]
    teacher.requires_grad_(len(leaves) > 1)
    labels = torch.randint(V, (rows,))
    return lambda: torch.autograd.grad(kd_loss(logits, teacher, labels, temperature=T, **options), leaves)


def from_hidden_states(chunks: int, needed: tuple[bool, bool], dtype: torch.dtype, options: dict[str, Any]) -> Step:
    N = chunks * CHUNK
    heads = [torch.randn(shape, dtype=dtype) for shape in ((N, H_S), (V, H_S), (N, H_T), (V, H_T))]
    of_teacher = needed if options.get("teacher_grad") else (False, False)
    leaves = [tensor.requires_grad_() for tensor, need in zip(heads, needed + of_teacher, strict=True) if need]
    labels = torch.randint(V, (N,))
    names = ("hidden_grad", "weight_grad", "teacher_hidden_grad", "teacher_weight_grad")
    one_row = plan_chunks(
        1, V, H_S, H_T, dtype=dtype, logits_dtype=options.get("logits_dtype"),
        **dict(zip(names, needed + of_teacher, strict=True)),
    )  # fmt: skip
    bound = CHUNK * one_row.workspace_bytes

    def step() -> None:
        loss = linear_kd_loss(*heads, labels, temperature=T, workspace_bytes=bound, **options)
        if leaves:
            torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    return step


def launched(make: Callable[[], Step]) -> Launches:
    with fake_gpu() as launches:
        step = make()
        with launches:
            step()
    return launches


def launches() -> tuple[Figures, Operators]:
    """Count the launches of a step in bfloat16; for heads, of one chunk of logits and of each further chunk."""
    figures: Figures = {"Triton launches": {}, "other launches": {}}
    operators = {}
    for name, kernels, others in _launches():
        figures["Triton launches"][name] = sum(kernels.values())
        figures["other launches"][name] = sum(others.values())
        operators[name] = dict(sorted(others.items()))
    return figures, operators


def _launches() -> Iterator[tuple[str, dict[str, float], dict[str, float]]]:
    for name, rows, options in (
        ("kd_loss", 8192, {}),
        ("kd_loss, rows split", 8, {}),
        ("kd_loss, inplace_backward", 8192, {"inplace_backward": True}),
        ("kd_loss, teacher_grad", 8192, {"teacher_grad": True}),
    ):
        one = launched(lambda rows=rows, options=options: from_logits(rows, **options))
        yield name, one.kernels, one.operators
    for name, given in LINEAR.items():
        one, three = (
            launched(lambda chunks=chunks, given=given: from_hidden_states(chunks, given[0], torch.bfloat16, given[1]))
            for chunks in (1, 3)
        )
        yield f"linear_kd_loss, {name}", one.kernels, one.operators
        added = _half(three.kernels - one.kernels), _half(three.operators - one.operators)
        yield f"linear_kd_loss, {name}, a further chunk", *added


def _half(counts: Counter[str]) -> dict[str, float]:
    return {name: count / 2 for name, count in counts.items()}


def multiplications() -> Figures:
    """Count multiplications in units of one student projection; a projection of this teacher, twice as wide, takes two.

    In float32: PyTorch's counter does not take the 16-bit products with a float32 result.  The package's operator is
    counted by a formula of its own where it stays closed; here its products are.
    """
    counts = {}
    for name, (needed, options) in LINEAR.items():
        if name == "trained head, float32 logits":
            continue
        with fake_gpu():
            step = from_hidden_states(3, needed, torch.float32, options)
            with FlopCounterMode(display=False) as counter:
                step()
        counts[f"linear_kd_loss, {name}"] = counter.get_total_flops() / (2 * 3 * CHUNK * V * H_S)
    return {"projections": counts}
