"""The blocks of the CPU operators: scattered rows are gathered, and long runs are read and written in place."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import kd_loss
from fused_kd.backends import cpu, cpu_blocks
from fused_kd.divergences import Objective
from fused_kd.testing.blocks import blocks_of

from .oracle import assert_matches_oracle

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES, LENGTH, V = 12, 5, 37
N = SEQUENCES * LENGTH

# Which rows do not count.
IGNORED = {
    "none": slice(0, 0),
    "every other": slice(1, None, 2),
    "the last of each sequence": slice(LENGTH - 1, None, LENGTH),
    "a tenth": [3, 17, 18, 40, 41, 59],
    "a prompt": slice(0, 33),
    "all but one": [row for row in range(N) if row != 22],
}

# Of logits [SEQUENCES, LENGTH, V], the same values in other memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda z: z.clone(),
    "a slice of each sequence": lambda z: torch.cat([z, z[:, :1]], 1)[:, :-1],
    "the sequence outermost": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "strides without a divisor": lambda z: in_memory(z, (V + 3) * LENGTH + 7, V + 3),
    "padded columns": lambda z: torch.cat([z, z], -1)[..., :V],
    "the columns outermost": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


def in_memory(z: Tensor, outer: int, inner: int) -> Tensor:
    return z.new_zeros(SEQUENCES * outer).as_strided(z.shape, (outer, inner, 1)).copy_(z)


@pytest.fixture(params=[False, True], ids=["one block", "many blocks"])
def blocks(request):
    """Small ones: of eight rows, of three where they are gathered."""
    with blocks_of(8 * V, gathered=3 * V) if request.param else contextlib.nullcontext():
        yield


def labels_of(ignored: str) -> Tensor:
    labels = torch.randint(V, (N,))
    labels[IGNORED[ignored]] = -100
    return labels.view(SEQUENCES, LENGTH)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_have_the_bits_of_those_that_count_alone(layout, ignored, dtype):
    """Loss and gradients, also in place; 0 for the others, which hold NaN and infinities."""
    student, teacher = (3 * torch.randn(2, SEQUENCES, LENGTH, V)).to(dtype)
    labels = labels_of(ignored)
    counted = labels != -100
    options = {"temperature": 3.0, "reduction": "none", "logit_softcap": (None, 5.0), "teacher_grad": True}

    def run(place: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, labels: Tensor, **more: bool):
        logits, teacher = place(student.clone().requires_grad_()), place(teacher).requires_grad_()
        loss = kd_loss(logits, teacher, labels, **options, **more)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), (logits, teacher))]

    expected = run(Tensor.clone, student[counted], teacher[counted], labels[counted])
    student[~counted], teacher[~counted] = torch.nan, -torch.inf
    for inplace in (False, True):
        found = run(LAYOUTS[layout], student, teacher, labels, inplace_backward=inplace)
        for result, alone in zip(found, expected, strict=True):
            assert torch.equal(result[counted], alone)
            assert not result[~counted].any()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_match_the_oracle(layout, ignored):
    student, teacher = 3 * torch.randn(2, SEQUENCES, LENGTH, V)
    other, labels = LAYOUTS["a slice of each sequence"](teacher), labels_of(ignored)
    for alpha in (0.0, 0.4, 1.0):  # without the teacher, with both, without the labels
        assert_matches_oracle(kd_loss, LAYOUTS[layout](student), other, labels, alpha=alpha, temperature=2.0)


def test_an_expanded_teacher():
    student, labels = torch.randn(SEQUENCES, LENGTH, V), labels_of("every other")
    for teacher in (torch.randn(V).expand(SEQUENCES, LENGTH, V), torch.randn(SEQUENCES, 1, V).expand(-1, LENGTH, -1)):
        assert_matches_oracle(kd_loss, student, teacher, labels, temperature=2.0)


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


def operators(rows: int, vocabulary: int, ignored: slice, layout: Callable[[Tensor], Tensor]) -> int:
    """Count the operators of a single pass."""
    student, teacher, gradient = (layout(torch.randn(rows // 2, 2, vocabulary)) for _ in range(3))
    weights = torch.ones(3, student.shape[:2].numel(), dtype=torch.float64)
    weights[:, ignored] = 0
    labels, statistics = torch.zeros(weights.shape[1], dtype=torch.int64), torch.zeros(9, weights.shape[1])
    with Operators() as found:
        cpu.statistics_and_gradient(
            student, teacher, labels, weights, statistics, gradient, None, None, Objective(temperature=3.0)
        )
    return found.count


@pytest.mark.parametrize("layout", [lambda z: z, lambda z: z[:, :1]], ids=["dense", "a slice of each sequence"])
@pytest.mark.parametrize("ignored", [slice(1, None, 2), slice(2, None, 3), slice(0, 0)])
def test_rows_between_others_are_no_blocks_of_their_own(layout, ignored):
    """Time, on a CPU, of few columns is that of the operators: 48 of 1 000 rows where nothing is ignored, 2 100 of rows
    one by one.
    """
    assert operators(1000, 64, ignored, layout) <= 120


def test_blocks_that_are_gathered_are_few():
    """As many elements of a block, or an eighth of it, as there are."""
    rows, vocabulary = 4 * cpu_blocks.BLOCK_ELEMENTS // 512, 512
    most = -(-rows * vocabulary // 2 // cpu_blocks.GATHERED_ELEMENTS)
    assert operators(rows, vocabulary, slice(1, None, 2), lambda z: z) <= 100 * (1 + most)
