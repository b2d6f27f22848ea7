"""Addresses beyond 2^31 elements, which N V passes in ordinary training, and sizes that no block or tile divides."""

import re

import pytest
import torch
from torch import Tensor

from fused_kd import kd_loss, reference
from fused_kd.launching import compiles_clusters, triton_release

from .oracle import EPSILON, relative_error, value_and_gradient

variants = pytest.importorskip("benchmarks.compiled.variants")
workers = pytest.importorskip("benchmarks.compiled.workers")

# Shape and strides.  Beyond 2^31 elements from the first logit lie a row whose stride passes that by itself; rows whose
# numbers and strides are 32-bit integers but not their products, at multiples of 16 bytes and not; a dimension outside of
# the rows; columns.
LAYOUTS = {
    "one stride": ((2, 500), (2**31 + 64, 1)),
    "rows": ((3, 500), (2**30 + 64, 1)),
    "odd rows": ((3, 500), (2**30 + 7, 1)),
    "outer rows": ((3, 2, 500), (2**30 + 64, 512, 1)),
    "columns": ((3, 40), (1, 2**26 + 64)),
}
BEFORE = 2**31  # elements in front of the logits, where an offset that wraps around finds zeros


def spread(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The values in a storage of 9 GB, of which the system commits no page but those that are written."""
    size = BEFORE + 1 + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    try:
        storage = torch.empty(size, dtype=values.dtype, device=values.device)
    except RuntimeError as error:  # a system that does not promise more than it has; a GPU
        pytest.skip(str(error).splitlines()[0])
    return storage.as_strided(values.shape, strides, BEFORE).copy_(values)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("far", ["student", "teacher"])
def test_offsets_beyond_32_bits(device, layout, far):
    shape, strides = LAYOUTS[layout]
    # float16, since a bfloat16 gradient takes a detour under the interpreter.
    student, teacher = (3 * torch.randn(2, *shape)).half().to(device)
    labels = torch.randint(shape[-1] - 5, shape[:-1], device=device)
    options = {"temperature": 3.0, "vocab_size": shape[-1] - 3}
    expected = value_and_gradient(kd_loss, student, teacher, labels, reduction="none", **options)
    if far == "teacher":
        teacher = spread(teacher, strides)
    else:
        student = spread(student, strides)
    logits = student.requires_grad_().view_as(student)
    loss = kd_loss(logits, teacher, labels, reduction="none", inplace_backward=far == "student", **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.stride() == (strides if far == "student" else student.stride())
    assert gradient.data_ptr() == student.data_ptr() or far == "teacher"
    assert relative_error(loss.detach(), expected[0].double()) <= 4 * EPSILON  # threads take other columns elsewhere
    assert relative_error(gradient, expected[1].double()) <= torch.finfo(torch.float16).eps


def test_many_rows_of_few_columns():
    """Several blocks of the CPU operators, 350 000 rows each."""
    student, teacher = torch.randn(2, 800_001, 3)
    labels = torch.randint(3, (800_001,))
    options = {"temperature": 2.0, "reduction": "none"}
    ours = value_and_gradient(kd_loss, student, teacher, labels, **options)
    oracle = value_and_gradient(reference.kd_loss, student.double(), teacher, labels, **options)
    assert all(relative_error(a, b) <= EPSILON for a, b in zip(ours, oracle, strict=True))


# What the compiled kernels do: the interpreter's integers are Python's where a stride is one.

LOGITS = ("%student_ptr", "%teacher_ptr", "%gradient_ptr", "%teacher_gradient_ptr")


def addresses(code: str) -> tuple[dict[str, list[str]], list[str]]:
    """The types of what is added to each of the pointers to logits, and the lines that put a stride in 32-bit arithmetic.

    Line by line, as a name of a region may stand for another value in the next one.
    """
    pointers = {name: name for name in LOGITS}  # values that point to logits, and to whose
    strides = set(re.findall(r"%\w+_stride_\w+", code))  # and values computed of strides
    offsets: dict[str, list[str]] = {name: [] for name in LOGITS}
    narrow = []
    for line in code.splitlines():
        match = re.match(
            r"\s*(?P<result>%\w+) = \"?(?P<operation>[\w.]+)\"? ?(?P<operands>.*?) : (?P<type>[^(]*)", line
        )
        if match is None or "_stride_" in match["result"]:
            continue
        operands = re.findall(r"%\w+", match["operands"])
        types = match["type"].split(" loc")[0].strip()
        pointer = pointers.get(operands[0]) if operands and match["operation"] in ("tt.addptr", "tt.splat") else None
        of_strides = any(operand in strides for operand in operands)
        pointers.pop(match["result"], None)
        strides.discard(match["result"])
        if pointer is not None:
            pointers[match["result"]] = pointer
            if match["operation"] == "tt.addptr":
                offsets[pointer].append(types.split(", ")[1])
        elif of_strides:
            strides.add(match["result"])
            if match["operation"].startswith("arith.") and not types.endswith(("i64", "i64>")):
                narrow.append(line)
    return offsets, narrow


@pytest.mark.skipif(triton_release() < (3, 4), reason="Triton 3.3 does not print the names of arguments")
def test_every_address_of_a_logit_is_a_64_bit_offset():
    cases = [
        variants.Variant(kernel, "sm_90", "bf16", "bf16", 3.0, "ce+kl", layout, teacher_grad=teacher_grad)
        for kernel, teacher_grad in (("row_statistics", False), ("logit_gradient", False), ("logit_gradient", True))
        for layout in ("dense", "odd", "transposed")
    ]
    in_one_launch = [
        variants.Variant(kernel, "sm_90", "bf16", "bf16", 3.0, "ce+kl", layout)
        for kernel in ("cluster" if compiles_clusters() else "whole", "shared")
        for layout in ("dense", "odd")
        if kernel != "cluster" or layout == "dense"
    ]
    for case, code in workers.in_workers(variants.ttir, in_one_launch, workers=1).items():
        assert isinstance(code, str), code
        offsets, narrow = addresses(code)
        assert not narrow, case.name
        for pointer in LOGITS[:3]:
            rows, columns = (
                [x for x in offsets[pointer] if x.startswith("tensor") == tiles] for tiles in (False, True)
            )
            assert rows, (case.name, pointer)
            assert set(rows) == {"i64"}, (case.name, pointer)
            assert len(columns) >= 4, (case.name, pointer)
            assert all(re.fullmatch(r"tensor<(\d+x)+i64>", column) for column in columns), (case.name, pointer)
    for case, code in workers.in_workers(variants.ttir, cases, workers=1).items():
        assert isinstance(code, str), code
        offsets, narrow = addresses(code)
        assert not narrow, case.name
        for pointer in LOGITS[: 2 if case.kernel == "row_statistics" else 4 if case.teacher_grad else 3]:
            rows, columns = (
                [x for x in offsets[pointer] if x.startswith("tensor") == tiles] for tiles in (False, True)
            )
            # That of the row, and in the statistics that of the label's logit from there.
            of_label = (pointer, case.kernel) == (LOGITS[0], "row_statistics")
            assert rows == ["i64"] * (1 + of_label), (case.name, pointer)
            # Whole tiles and the part of one, in the second sweep also the label's tile and those after it; of the
            # gradient, the zeros of a row that does not count, too.
            sweep = 2 if case.kernel == "row_statistics" else 4
            assert len(columns) == sweep + ("gradient" in pointer), (case.name, pointer)
            assert all(re.fullmatch(r"tensor<(\d+x)+i64>", column) for column in columns), (case.name, pointer)


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
def test_more_than_2_to_the_31_logits(inplace):
    """On a CPU, bfloat16: 4.4 GB of student logits, and as many of their gradient, or of the teacher's logits.

    A row's results have the same bits as by itself, so the bound is 0.  Two cores: 17 and 9 s, at most 9.3 GB resident.
    """
    N, V, distinct = 8448, 262_144, 67  # row 8192 starts at 2^31 elements; equal rows are no power of two apart
    some_student, some_teacher = (3 * torch.randn(2, distinct, V)).bfloat16()

    def repeated(rows: Tensor) -> Tensor:
        logits = torch.empty(N, V, dtype=torch.bfloat16)
        for part in logits.split(distinct):
            part.copy_(rows[: part.shape[0]])
        return logits

    student = repeated(some_student)
    teacher = repeated(some_teacher) if inplace else some_teacher[0].expand(N, V)
    labels = torch.randint(V, (N,))
    logits = student.add_(torch.zeros((), dtype=student.dtype, requires_grad=True))  # computed, and in no memory more
    loss = kd_loss(logits, teacher, labels, temperature=2.0, reduction="none", inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.numel() > 2**31
    for row in (0, 1, N // 2, 8191, 8192, N - 1):
        alone = value_and_gradient(
            kd_loss, some_student[row % distinct, None], teacher[row, None], labels[row, None], temperature=2.0
        )
        assert torch.equal(loss[row], alone[0])
        assert torch.equal(gradient[row], alone[1][0])
