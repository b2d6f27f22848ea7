"""Launches of a training step on a GPU, and the cost of its products: counted on fake tensors, without a GPU."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import KDLossOutput, kd_loss, linear_kd_loss
from fused_kd.testing.launches import Launches, fake_gpu
from fused_kd.testing.plans import in_chunks

from .figures import Figures
from .record import Operators

Step = Callable[[], object]

V, H_S, H_T = 128_256, 1024, 2048
CHUNK = 1024  # rows
T = 2.0
LOGITS: dict[str, tuple[int, dict[str, Any]]] = {  # rows, options
    "kd_loss": (8192, {}),
    "kd_loss, rows split": (8, {}),
    "kd_loss, everything": (8192, {"everything": True}),
    "kd_loss, inplace_backward": (8192, {"inplace_backward": True}),
    "kd_loss, teacher_grad": (8192, {"teacher_grad": True}),
    'kd_loss, reduction="none"': (8192, {"reduction": "none"}),
    "kd_loss, float16": (8192, {"dtype": torch.float16}),
    "kd_loss, jsd": (8192, {"divergence": "jsd"}),  # two sweeps of statistics, here in one launch with the gradient
    "kd_loss, jsd, teacher_grad": (8192, {"divergence": "jsd", "teacher_grad": True}),  # each sweep a launch
}
LINEAR: dict[str, tuple[tuple[bool, bool], dict[str, Any]]] = {  # gradients of hidden states and weight, options
    "trained head": ((True, True), {}),
    "trained head, everything": ((True, True), {"everything": True}),
    "trained head, one group": ((True, True), {"one_group": True}),
    "trained head, 16-bit logits": ((True, True), {"logits_dtype": torch.bfloat16}),
    "trained head, float32": ((True, True), {"dtype": torch.float32}),
    "trained head, float16": ((True, True), {"dtype": torch.float16}),
    "trained head, jsd": ((True, True), {"divergence": "jsd"}),
    "trained head, bias": ((True, True), {"bias": True}),
    "trained head, teacher_grad": ((True, True), {"teacher_grad": True}),
    "frozen head": ((True, False), {}),
    "loss only": ((False, False), {}),
    'reduction="none"': ((True, True), {"reduction": "none"}),
    # As many tokens count as in the others.
    "trained head, as many ignored": ((True, True), {"as_many_ignored": True}),
}
LEAN = {"trained head, lean": ((True, True), {"memory": "lean"})}  # its launches are those of slabs, not of chunks
MULTIPLIED = (
    "trained head", "trained head, teacher_grad", "frozen head", "loss only", 'reduction="none"',
    "trained head, as many ignored", "trained head, lean",
)  # fmt: skip
A_CHUNK = ", a further chunk"
ENGINE = "ones_like"  # the upstream gradient of a step, which the autograd engine makes
# The ceilings of `figures.KINDS` are for one sweep of chunks that gives two gradients.  With teacher_grad each chunk takes
# two products and a sweep more, and each gradient a launch of `scale` in backward.  A bias takes a sum and an addition per
# chunk.  For row losses each chunk is projected and swept in forward, and again in backward.
# Rows that count are gathered without a synchronisation, in about twenty small operations per step.
MORE_WORK = ("trained head, bias", "trained head, teacher_grad", 'reduction="none"', "trained head, as many ignored")


def _given(rows: int, everything: bool, options: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the leading dimensions of the inputs, and the options of the loss.

    `everything` stands for all options that weigh rows, and for the parts.  Fake labels have no values, so any of them may
    be ignored.
    """
    options = {"temperature": T, **options}
    if not everything:
        return (rows,), options
    shape = 8, rows // 8
    weights, alpha, num_items = torch.rand(shape), torch.rand(shape), torch.tensor(5)
    of_rows = {"shift": True, "token_weights": weights, "alpha": alpha, "num_items": num_items, "return_parts": True}
    return shape, of_rows | options


def _backward(found: torch.Tensor | KDLossOutput, leaves: Sequence[torch.Tensor]) -> None:
    loss = found.loss if isinstance(found, KDLossOutput) else found
    if leaves:
        torch.autograd.grad(loss, leaves, torch.ones_like(loss))


def from_logits(rows: int, dtype: torch.dtype = torch.bfloat16, everything: bool = False, **options: Any) -> Step:
    shape, options = _given(rows, everything, options)
    student, teacher = (torch.randn(*shape, V, dtype=dtype, requires_grad=True) for _ in range(2))
    logits = student.clone()  # a gradient takes the memory of a model's output, not of a parameter
    leaves = [logits, teacher] if options.get("teacher_grad") else [logits]
    teacher.requires_grad_(len(leaves) > 1)
    labels = torch.randint(V, shape)
    return lambda: _backward(kd_loss(logits, teacher, labels, **options), leaves)


def from_hidden_states(
    chunks: int,
    needed: tuple[bool, bool],
    dtype: torch.dtype = torch.bfloat16,
    everything: bool = False,
    bias: bool = False,
    one_group: bool = False,
    as_many_ignored: bool = False,
    **options: Any,
) -> Step:
    shape, options = _given(chunks * CHUNK * (1 + as_many_ignored), everything, options)
    if as_many_ignored:
        options["counted_rows"] = chunks * CHUNK
    heads = [torch.randn(size, dtype=dtype) for size in ((*shape, H_S), (V, H_S), (*shape, H_T), (V, H_T))]
    of_teacher = needed if options.get("teacher_grad") else (False, False)
    leaves = [tensor.requires_grad_() for tensor, need in zip(heads, needed + of_teacher, strict=True) if need]
    if bias:
        options["student_bias"] = torch.randn(V, dtype=dtype, requires_grad=True)
        leaves.append(options["student_bias"])
    labels = torch.randint(V, shape)

    def step() -> None:
        with in_chunks(CHUNK, chunks * CHUNK if one_group else CHUNK):
            _backward(linear_kd_loss(*heads, labels, **options), leaves)

    return step


def launched(make: Callable[[], Step]) -> Launches:
    with fake_gpu() as launches:
        step = make()
        with launches:
            step()
    return launches


def launches() -> tuple[Figures, Operators]:
    """Count the launches of a step in bfloat16; for heads, of one chunk of logits and of each further chunk.

    That of one chunk is a step of several without the further ones, so that the rounding of their sum is in it.
    """
    figures: Figures = {"Triton launches": {}, "other launches": {}, "operations": {}, "operations per chunk": {}}
    operators = {}
    for name, kernels, others in _launches():
        figures["Triton launches"][name] = sum(kernels.values())
        figures["other launches"][name] = sum(others.values())
        operators[name] = dict(sorted(others.items()))
    totals = {
        name: kernels + figures["other launches"][name] - operators[name].get(ENGINE, 0)
        for name, kernels in figures["Triton launches"].items()
    }
    figures["operations"] = {name: totals[name] for name in LOGITS}
    for name in (name for name in LINEAR if name not in MORE_WORK):
        step = f"linear_kd_loss, {name}"
        figures["operations per chunk"][step] = totals[step + A_CHUNK]
        figures["operations"][f"{step}, beside its chunks"] = totals[step] - totals[step + A_CHUNK]
    return figures, operators


def _launches() -> Iterator[tuple[str, dict[str, float], dict[str, float]]]:
    for name, (rows, options) in LOGITS.items():
        one = launched(lambda rows=rows, options=options: from_logits(rows, **options))
        yield name, one.kernels, one.operators
    for name, (needed, options) in LINEAR.items():
        two, four = (
            launched(
                lambda chunks=chunks, needed=needed, options=options: from_hidden_states(chunks, needed, **options)
            )
            for chunks in (2, 4)
        )
        added = _half(four.kernels - two.kernels), _half(four.operators - two.operators)
        yield f"linear_kd_loss, {name}", two.kernels - Counter(added[0]), two.operators - Counter(added[1])
        yield f"linear_kd_loss, {name}{A_CHUNK}", *added


def _half(counts: Counter[str]) -> dict[str, float]:
    return {name: count / 2 for name, count in counts.items()}


def multiplications() -> Figures:
    """Count multiplications in units of one student projection; a projection of this teacher, twice as wide, takes two.

    In float32: PyTorch's counter does not take the 16-bit products with a float32 result.  The package's operator is
    counted by a formula of its own where it stays closed; here its products are.
    """
    counts = {}
    for name in MULTIPLIED:
        needed, options = (LINEAR | LEAN)[name]
        with fake_gpu():
            step = from_hidden_states(3, needed, torch.float32, **options)
            with FlopCounterMode(display=False) as counter:
                step()
        counts[f"linear_kd_loss, {name}"] = counter.get_total_flops() / (2 * 3 * CHUNK * V * H_S)
    return {"projections": counts}
