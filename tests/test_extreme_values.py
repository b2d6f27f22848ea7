"""Logits, temperatures, weights and sizes at the ends of their ranges: no NaN where the mathematics has a number.

Each row is compared with the float64 reference, infinities and NaN included.  Where the reference multiplies an infinite
term by a weight of 0, the row is compared with the mathematical value.
"""

import math
import os

import pytest
import torch
from torch import Tensor

from fused_kd import kd_loss, linear_kd_loss, reference

from .oracle import EPSILON, relative_error, value_and_gradient

N, V = 4, 1237
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = [0.05, 1.0, 2.0, 3.0, 1000.0]


def make(device, dtype=torch.float32, scale=3.0, rows=N, vocabulary=V):
    student, teacher = (scale * torch.randn(2, rows, vocabulary)).to(dtype).to(device)
    return student, teacher, torch.randint(vocabulary, (rows,), device=device)


def assert_close(ours: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """Infinities and NaNs are the same in both; the rest is within twice eager's error, or the rounding of its dtype."""
    exact = oracle.to(ours.dtype)
    torch.testing.assert_close(ours.where(~exact.isfinite(), 0), exact.where(~exact.isfinite(), 0), equal_nan=True)
    finite = exact.isfinite()
    info = torch.finfo(ours.dtype)
    rounding = info.eps if ours.dtype.itemsize == 2 else 4 * EPSILON
    error, eager_error = ((tensor.double() - oracle)[finite].norm() for tensor in (ours, eager))
    subnormal = info.smallest_normal * info.eps * finite.sum().sqrt()  # float16 has no number below 6e-8
    assert error <= max(2 * eager_error.nan_to_num(0.0, 0.0), rounding * oracle[finite].norm() + subnormal)


def assert_rows_match(student, teacher, labels, *, alpha=0.5, upstream=1.0, **options) -> tuple[Tensor, Tensor]:
    """Row losses and gradients against the reference's in float64; they are returned."""
    options |= {"alpha": alpha, "reduction": "none", "upstream": upstream}
    ours = value_and_gradient(kd_loss, student, teacher, labels, **options)
    labels = None if alpha == 1 else labels  # the reference multiplies a term by its weight, an infinite one by 0 too
    eager, oracle = (
        value_and_gradient(reference.kd_loss, student.to(dtype), teacher.to(dtype), labels, **options)
        for dtype in (torch.float32, torch.float64)
    )
    for results in zip(ours, eager, oracle, strict=True):
        assert_close(*results)
    return ours


# Minus infinity: a token that is masked.  Each of these changes student, teacher and labels in place.


def the_same_columns(student, teacher, labels):
    student[:, 10:20] = teacher[:, 10:20] = -torch.inf
    labels.fill_(50)


def more_columns_of_the_teacher(student, teacher, labels):
    student[:, 10:20] = teacher[:, 10:30] = -torch.inf
    labels.fill_(50)


def a_column_of_the_student(student, teacher, labels):
    student[1, 5] = -torch.inf
    teacher[1, 5] = 0.0
    labels.fill_(50)


def all_columns_but_one(student, teacher, labels):
    for row, logits in enumerate([[student, teacher], [teacher], [student]]):
        for tensor in logits:
            tensor[row, torch.arange(V) != 7] = -torch.inf
    labels.fill_(7)


def the_label(student, teacher, labels):
    labels.fill_(50)
    student[:, 50] = teacher[:, 50] = -torch.inf
    teacher[2, 50] = 0.0


def a_whole_row(student, teacher, labels):
    student[1] = -torch.inf
    teacher[2] = -torch.inf
    student[3] = teacher[3] = -torch.inf


# (rows of infinite loss, rows of NaN) where alpha is 0, 0.5, 1
MASKS = {
    the_same_columns: [([], [])] * 3,
    more_columns_of_the_teacher: [([], [])] * 3,
    a_column_of_the_student: [([], []), ([1], []), ([1], [])],
    all_columns_but_one: [([], []), ([2], []), ([2], [])],
    the_label: [([0, 1, 2, 3], []), ([0, 1, 2, 3], []), ([2], [])],
    a_whole_row: [([], [1, 3]), ([], [1, 2, 3]), ([], [1, 2, 3])],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.5, 3.0), (1.0, 2.0)])
def test_masked_tokens(device, mask, alpha, temperature):
    student, teacher, labels = make(device)
    mask(student, teacher, labels)
    loss, gradient = assert_rows_match(student, teacher, labels, alpha=alpha, temperature=temperature)
    infinite, nan = MASKS[mask][[0.0, 0.5, 1.0].index(alpha)]
    assert loss.isposinf().nonzero().flatten().tolist() == infinite
    assert loss.isnan().nonzero().flatten().tolist() == nan
    assert gradient.isnan().all(1).nonzero().flatten().tolist() == nan
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == nan
    masked = student.isneginf() & teacher.isneginf()
    masked[nan] = False
    masked[torch.arange(N), labels] = False
    assert not gradient[masked].any()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("mask", [the_same_columns, more_columns_of_the_teacher, a_column_of_the_student])
def test_masked_tokens_in_16_bits(device, mask, dtype):
    student, teacher, labels = make(device, dtype)
    mask(student, teacher, labels)
    assert_rows_match(student, teacher, labels, temperature=2.0)


def test_a_softcap_makes_masked_tokens_finite(device):
    """As in PyTorch: c tanh(-inf) is -c."""
    student, teacher, labels = make(device)
    student[:, 10:20] = teacher[:, 5:15] = -torch.inf
    loss, _ = assert_rows_match(student, teacher, labels, logit_softcap=4.0)
    assert loss.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("of_teacher", [False, True])
def test_nan_and_infinity_give_nan_in_their_row_only(device, bad, of_teacher):
    student, teacher, labels = make(device)
    (teacher if of_teacher else student)[2, 7] = bad
    loss, gradient = assert_rows_match(student, teacher, labels)
    assert loss.isnan().tolist() == gradient.isnan().all(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (1.0, 2.0), (1.0, 3.0), (1.0, 1000.0)])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under the interpreter
def test_the_largest_logits(device, dtype, alpha, temperature):
    """A loss beyond float32 is infinite, and may be so where V times a difference of logits is: 1e33 is far from that."""
    student, teacher, labels = make(device, dtype, rows=6)
    largest = torch.finfo(dtype).max
    student[0], teacher[0] = largest * student[0].sign(), largest * teacher[0].sign()
    student[1] = teacher[1] = largest * student[1].sign()
    labels[1] = student[1].argmax()
    student[2, 10:20] = teacher[2, 10:30] = -largest  # how some models mask tokens
    labels[2] = 50
    teacher[3], student[3, 7] = -largest, largest  # a uniform teacher, at what stands for the maximum of no columns
    student[4], teacher[4, 7] = -largest, largest
    student[5], teacher[5] = -largest, largest
    loss, gradient = assert_rows_match(student, teacher, labels, alpha=alpha, temperature=temperature)
    assert loss[[1, 2, 4, 5]].isfinite().all()
    assert gradient.isfinite().all()


def far_apart(device, vocabulary, dtype=torch.float32):
    """Logits whose differences, or the sum of these over the vocabulary, are beyond float32."""
    student, teacher = torch.zeros(2, 5, vocabulary)
    student[0, 0], student[0, 1:] = 1e38, -2.5e38
    teacher[0, 0], teacher[0, 1:] = -2.5e38, -2.5e38
    teacher[0, 1] = 1e38
    student[1], student[1, 1] = 3e38, -3e38  # under a uniform teacher
    student[2, -1] = 1e38
    student[3], teacher[3, : vocabulary // 2] = -3e38, 3e38  # under a teacher that has masked half
    student[3, 0], teacher[3, vocabulary // 2 :] = 3e38, -3e38
    student[4, 1] = -1e35
    return student.to(dtype).to(device), teacher.to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 7.0, 1000.0, 1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("vocabulary", [2, V])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under the interpreter
def test_differences_of_logits_beyond_float32(device, dtype, temperature, vocabulary):
    if temperature in (1, 2, 3, 4) and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET")):
        pytest.skip("the kernels' loss may be infinite there")
    student, teacher = far_apart(device, vocabulary, dtype)
    loss, gradient = assert_rows_match(student, teacher, None, alpha=1.0, temperature=temperature)
    assert gradient.isfinite().all()
    if temperature == 0.05:
        assert loss.isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_differences_of_logits_beyond_float32_of_a_head(device):
    heads = Heads(device)
    heads.bias.fill_(1e38)[7], heads.teacher_bias.fill_(-2.5e38)[7] = -2.5e38, 1e38
    loss, *_ = heads.assert_match(alpha=1.0, temperature=0.05, reduction="none")
    torch.testing.assert_close(loss, torch.full_like(loss, 1.75e37))


@pytest.mark.parametrize(("dtype", "temperature"), list(zip(DTYPES, [0.05, 2.0, 3.0], strict=True)))
def test_subnormal_logits(device, dtype, temperature):
    student, teacher, labels = make(device)
    student, teacher = ((torch.finfo(dtype).smallest_normal / 10 * z.double()).to(dtype) for z in (student, teacher))
    assert student.any()
    loss, _ = assert_rows_match(student, teacher, labels, temperature=temperature)
    torch.testing.assert_close(loss, torch.full_like(loss, 0.5 * math.log(V)), rtol=1e-5, atol=0)  # all but uniform


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("temperature", [0.05, 1000.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_temperatures(device, dtype, temperature, scale):
    loss, gradient = assert_rows_match(*make(device, dtype, scale), temperature=temperature, alpha=1.0)
    assert loss.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (N, 1), (N, 2), (1, V)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_smallest_sizes(device, shape, temperature):
    arguments = make(device, rows=shape[0], vocabulary=shape[1])
    loss, gradient = assert_rows_match(*arguments, temperature=temperature)
    if shape[1] == 1:  # nothing to learn
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_at_all(device, reduction):
    loss, gradient = value_and_gradient(kd_loss, *make(device, rows=0), reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert not loss.any()
    assert gradient.shape == (0, V)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_student_equal_to_its_teacher(device, dtype, temperature):
    teacher, _, _ = make(device, dtype)
    options = {"alpha": 1.0, "temperature": temperature}
    output = kd_loss(teacher.float(), teacher, None, return_parts=True, **options)
    assert output.divergence.abs() <= 1e-6
    _, gradient = value_and_gradient(kd_loss, teacher, teacher, None, reduction="sum", **options)
    assert (gradient.abs() <= 4 * EPSILON * temperature * (teacher.double() / temperature).softmax(1)).all()


@pytest.mark.parametrize("others", [-torch.inf, -1e4])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_one_hot_teacher_is_a_label(device, others, dtype):
    student, teacher, labels = make(device, dtype)
    teacher.fill_(others).scatter_(1, labels[:, None], 0.0)
    by_teacher = assert_rows_match(student, teacher, labels, alpha=1.0)
    by_label = value_and_gradient(kd_loss, student, teacher, labels, alpha=0.0, reduction="none")
    for ours, theirs in zip(by_teacher, by_label, strict=True):
        torch.testing.assert_close(ours, theirs)
    if others != -torch.inf:  # a student as sure as its teacher, of another token
        loss, _ = assert_rows_match(teacher.roll(1, dims=1), teacher, labels, alpha=1.0, temperature=2.0)
        torch.testing.assert_close(loss, torch.full_like(loss, 2 * -others), rtol=2e-3, atol=0)


@pytest.mark.parametrize("vocabulary", [V, 8192])  # with a part of a tile, and of whole ones
@pytest.mark.parametrize("padding", [0, 5])
def test_labels_at_both_ends_of_the_vocabulary(device, vocabulary, padding):
    student, teacher, labels = make(device, rows=3, vocabulary=vocabulary + padding)
    labels[0], labels[1] = 0, vocabulary - 1
    labels[2] = vocabulary // 2
    _, gradient = assert_rows_match(student, teacher, labels, vocab_size=vocabulary, alpha=0.2)
    assert (gradient.argmin(1) == labels).all()
    assert not gradient[:, vocabulary:].any()


WEIGHTS = {
    "float32": torch.tensor([1e-38, 0.0, 1.0, 3e38]),
    "float64": torch.tensor([1e-300, 1e-50, 1.0, 1e-10], dtype=torch.float64),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_weights_of_extreme_sizes(device, weights, reduction):
    """A weight that float32 does not hold is no weight of 0: its row is read, and its loss is a number."""
    student, teacher, labels = make(device)
    token_weights = WEIGHTS[weights].to(device)
    ours, oracle = (
        value_and_gradient(loss, z, teacher, labels, token_weights=token_weights, reduction=reduction)
        for loss, z in ((kd_loss, student), (reference.kd_loss, student.double()))
    )
    torch.testing.assert_close(ours[0], oracle[0].float(), rtol=1e-6, atol=0)
    subnormal = EPSILON * torch.finfo(torch.float32).smallest_normal * V**0.5
    assert ((ours[1] - oracle[1]).norm(dim=1) <= 1e-6 * oracle[1].norm(dim=1) + subnormal).all()


# Terms of weight 0 that are infinite: 0 times infinity is 0 here, as the term is not there.


def with_infinite_terms(device):
    """KL is infinite in row 0, CE in row 1, both in row 2."""
    student, teacher, labels = make(device)
    labels.fill_(50)
    student[0, 5] = student[1, 50] = student[2, 50] = -torch.inf
    teacher[1, 50] = -torch.inf
    return student, teacher, labels


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("return_parts", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_infinite_term_of_weight_zero_adds_nothing(device, as_tensor, return_parts, alpha):
    student, teacher, labels = with_infinite_terms(device)
    weights = torch.linspace(0.5, 1, N, device=device).requires_grad_()
    student.requires_grad_()
    result = kd_loss(
        student, teacher, labels, alpha=torch.full((N,), alpha, device=device) if as_tensor else alpha,
        temperature=2.0, reduction="none", token_weights=weights, return_parts=return_parts,
    )  # fmt: skip
    loss = result.loss if return_parts else result
    if return_parts:
        assert result.divergence.isposinf().tolist() == [True, False, True, False]
        assert result.ce.isposinf().tolist() == [False, True, True, False]
        assert not result.divergence.isnan().any()
    expected = reference.kd_loss(
        student.double(), teacher, None if alpha == 1 else labels, alpha=alpha, temperature=2.0, reduction="none",
        token_weights=weights.double(),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected.float())
    gradients = [torch.autograd.grad(value.sum(), (student, weights)) for value in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_alpha_is_infinite_where_a_term_is(device):
    student, teacher, labels = with_infinite_terms(device)
    alpha = torch.zeros(N, device=device, requires_grad=True)
    loss = kd_loss(student, teacher, labels, alpha=alpha, reduction="none")[[0, 1, 3]]
    (gradient,) = torch.autograd.grad(loss.sum(), alpha)
    assert gradient[:2].tolist() == [torch.inf, -torch.inf]
    assert gradient[3:].isfinite().all()


# The main ones again, from hidden states; minus infinity comes in by the bias.


class Heads:
    def __init__(self, device, rows=N, vocabulary=V, scale=3.0):
        self.hidden, self.teacher_hidden = torch.randn(rows, 16, device=device), torch.randn(rows, 24, device=device)
        self.weight, self.teacher_weight = (
            scale * torch.randn(vocabulary, width, device=device) / width**0.5 for width in (16, 24)
        )
        self.bias, self.teacher_bias = torch.zeros(2, vocabulary, device=device)
        self.labels = torch.randint(vocabulary, (rows,), device=device)

    def run(self, loss, dtype=torch.float32, **options):
        """The value, and the gradients of hidden states, weight and bias."""
        student = [tensor.to(dtype).requires_grad_() for tensor in (self.hidden, self.weight, self.bias)]
        teacher = [tensor.to(dtype) for tensor in (self.teacher_hidden, self.teacher_weight, self.teacher_bias)]
        labels = None if loss is reference.linear_kd_loss and options.get("alpha") == 1 else self.labels
        value = loss(*student[:2], *teacher[:2], labels, student_bias=student[2], teacher_bias=teacher[2], **options)
        return value.detach(), *torch.autograd.grad(value.sum(), student)

    def assert_match(self, **options):
        ours = self.run(linear_kd_loss, **options)
        eager, oracle = (
            self.run(reference.linear_kd_loss, dtype, **options) for dtype in (torch.float32, torch.float64)
        )
        for results in zip(ours, eager, oracle, strict=True):
            assert_close(*results)
        return ours


@pytest.mark.parametrize(
    ("alpha", "temperature", "reduction"), [(0.0, 1.0, "sum"), (0.5, 3.0, "none"), (1.0, 2.0, "sum")]
)
def test_masked_tokens_of_a_head(device, alpha, temperature, reduction):
    heads = Heads(device)
    heads.bias[10:20] = heads.teacher_bias[10:30] = -torch.inf
    heads.labels.fill_(50)
    loss, *gradients = heads.assert_match(reduction=reduction, alpha=alpha, temperature=temperature)
    assert all(tensor.isfinite().all() for tensor in (loss, *gradients))
    assert not gradients[2][10:20].any()
    heads.teacher_bias[15] = 0.0  # mass where the student has none
    loss, *gradients = heads.assert_match(reduction=reduction, alpha=alpha, temperature=temperature)
    assert loss.isposinf().all() if alpha > 0 else loss.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in gradients)


@pytest.mark.parametrize("temperature", [0.05, 1000.0])
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_extreme_temperatures_of_heads(device, temperature, scale):
    loss, *gradients = Heads(device, scale=scale).assert_match(temperature=temperature, reduction="none")
    assert all(tensor.isfinite().all() for tensor in (loss, *gradients))


@pytest.mark.parametrize(("rows", "vocabulary"), [(0, V), (1, 1), (1, 2), (1, V), (N, 1), (N, 2)])
def test_the_smallest_sizes_of_a_head(device, rows, vocabulary):
    loss, *gradients = Heads(device, rows, vocabulary).assert_match(temperature=2.0, reduction="sum")
    if rows == 0 or vocabulary == 1:
        assert not any(tensor.any() for tensor in (loss, *gradients))


def test_token_weights_of_extreme_sizes_and_a_head(device):
    heads = Heads(device)
    for weights in WEIGHTS.values():
        heads.assert_match(token_weights=weights.to(device))


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_a_head_equal_to_its_teachers(device, temperature):
    heads = Heads(device)
    heads.teacher_hidden, heads.teacher_weight = heads.hidden.detach(), heads.weight.detach()
    loss, hidden, *_ = heads.run(linear_kd_loss, alpha=1.0, temperature=temperature, reduction="none")
    assert (loss.abs() <= 1e-6 * temperature**2).all()
    assert hidden.norm() <= 4 * EPSILON * temperature * heads.weight.norm()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("alpha", "infinite"), [(0.0, "KL"), (1.0, "CE")])
def test_an_infinite_term_of_weight_zero_adds_nothing_to_a_head(device, as_tensor, alpha, infinite):
    heads = Heads(device)
    heads.labels.fill_(50)
    heads.bias[50 if infinite == "CE" else 5] = -torch.inf
    heads.teacher_bias[50] = -torch.inf
    oracle = heads.run(reference.linear_kd_loss, torch.float64, alpha=alpha)
    ours = heads.run(linear_kd_loss, alpha=torch.full((N,), alpha, device=device) if as_tensor else alpha)
    for result, exact in zip(ours, oracle, strict=True):
        assert relative_error(result, exact) < 1e-6
