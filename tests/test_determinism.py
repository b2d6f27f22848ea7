"""Determinism: equal bits from run to run, for every number of threads, order of rows and position of a row.

If a product with a head, or another split of a row, changes the order of a sum, the norm-relative error is bounded
instead.  Figures in comments are the largest errors measured (two cores with AVX-512, MKL), in float32 epsilons.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss
from fused_kd import statistics as stats
from fused_kd.backends import triton as kernels
from fused_kd.divergences import Objective, divergence_of
from fused_kd.launch import Launch
from fused_kd.testing.plans import in_chunks

from .divergences import each_name, each_object
from .oracle import EPSILON, relative_error

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same_bits(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# From logits: everything is the same bits.


def make(device, dtype, shape):
    rows, vocabulary = shape
    student, teacher = (3 * torch.randn(2, rows, vocabulary)).to(dtype).to(device)
    return student, teacher, torch.randint(vocabulary, (rows,), device=device)


def run(student, teacher, labels, temperature=3.0, **options):
    """The row losses and their gradients; row by row upstream gradients of 1."""
    student = student.detach().clone().requires_grad_()
    loss = kd_loss(student, teacher, labels, temperature=temperature, reduction="none", **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), student)


@pytest.mark.parametrize("dtype", DTYPES)
@each_name
def test_runs(device, dtype, divergence):
    arguments = make(device, dtype, (4, 1237))
    assert_same_bits(*(run(*arguments, divergence=divergence) for _ in range(2)))


@each_object
def test_threads_and_places_of_rows_of_any_divergence(divergence):
    """On a CPU the elements of a block are shared in whole vectors, and PyTorch has other code for what is left of one."""
    student, teacher, labels = make("cpu", torch.float32, (7, 5003))
    options = {"divergence": divergence}
    loss, gradient = run(student, teacher, labels, **options)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(run(student, teacher, labels, **options), (loss, gradient))
        for part in (slice(0, 1), slice(3, 7)):
            found = run(student[part], teacher[part], labels[part], **options)
            assert_same_bits(found, (loss[part], gradient[part]))


# Rows of which each thread gets some, rows that are blocks of their own, a row alone; no size is a multiple of a vector.
SHAPES = [(37, 50_257), (3, 700_001), (1, 100_003), (5, 31)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_threads(shape, temperature):
    arguments = make("cpu", torch.float32, shape)
    options = {"temperature": temperature, "logit_softcap": 5.0 if temperature == 2 else None}
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(run(*arguments, **options))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 50_257), (3001, 101)])  # gathered two at a time, and a thousand
def test_threads_of_scattered_rows(shape, dtype):
    student, teacher, labels = make("cpu", dtype, shape)
    fewer = labels.clone()
    fewer[1::2] = -100
    expected = run(student[::2], teacher[::2], labels[::2])
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert_same_bits([result[::2] for result in run(student, teacher, fewer)], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_orders_and_places_of_rows(device, dtype):
    student, teacher, labels = given = make(device, dtype, (8, 5003))
    loss, gradient = run(*given)
    order = torch.randperm(8, device=device)
    assert_same_bits(run(*(tensor[order] for tensor in given)), (loss[order], gradient[order]))
    for part in (slice(0, 1), slice(3, 8)):
        assert_same_bits(run(*(tensor[part] for tensor in given)), (loss[part], gradient[part]))
    fewer = labels.clone()
    fewer[1::2] = -100  # every row that counts is a run of its own
    assert_same_bits([result[::2] for result in run(student, teacher, fewer)], (loss[::2], gradient[::2]))


# Over how many programs the kernels split a row depends on the number of rows and on the chip.


@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_splits_of_a_row(kernel_device, temperature):
    """1.8 epsilons."""
    lanes, columns, vocabulary = 32, 8, 2000
    student, teacher = 3 * torch.randn(2, 1, 4, vocabulary, device=kernel_device)
    weights = torch.full((3, 4), 0.5, dtype=torch.float64, device=kernel_device)
    labels = torch.randint(vocabulary, (4,), device=kernel_device)
    results, objective = [], Objective(temperature=temperature)
    for splits in (1, 2, 7):
        columns_per_split = -(-vocabulary // (splits * lanes * columns)) * lanes * columns
        launch = Launch(lanes, columns, 1, splits, columns_per_split)
        statistics, gradient = torch.empty(stats.COUNT, 4, device=kernel_device), torch.empty_like(student)
        kernels.row_statistics(student, teacher, labels, weights, statistics, None, objective, launch)
        kernels.logit_gradient(student, teacher, labels, statistics, weights, None, gradient, None, objective, launch)
        results.append((divergence_of(objective).value(statistics, temperature), statistics[stats.D_1], gradient))
    for result in results[1:]:
        assert all(relative_error(a, b.double()) <= 4 * EPSILON for a, b in zip(result, results[0], strict=True))


# From hidden states the products come from a BLAS: the same bits from run to run, and bounds for all else.


class Heads:
    def __init__(self, device, dtype, rows, vocabulary=1237, widths=(24, 40)):
        self.student, self.teacher = (
            (
                (torch.randn(rows, width)).to(dtype).to(device),
                (3 * torch.randn(vocabulary, width) / width**0.5).to(dtype).to(device),
            )
            for width in widths
        )
        self.labels = torch.randint(vocabulary, (rows,), device=device)

    def run(self, rows=slice(None), reduction="none", chunk=None):
        """Row losses or their mean, the gradients of hidden states and weight."""
        hidden, weight = (
            tensor.detach().clone().requires_grad_() for tensor in (self.student[0][rows], self.student[1])
        )
        with nullcontext() if chunk is None else in_chunks(chunk):
            loss = linear_kd_loss(
                hidden, weight, self.teacher[0][rows], self.teacher[1], self.labels[rows], temperature=2.0,
                reduction=reduction,
            )  # fmt: skip
            return loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))


def errors(results, exact):
    """In epsilons of float32."""
    return [relative_error(a, b.double()) / EPSILON for a, b in zip(results, exact, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_runs_of_a_head(device, dtype, reduction):
    heads = Heads(device, dtype, rows=6)
    assert_same_bits(*(heads.run(reduction=reduction, chunk=4) for _ in range(2)))


# The rounding of a 16-bit result is larger than that of any sum in it: half a unit in its last place where one differs.
BOUNDS = {torch.float32: 16, torch.bfloat16: 0.5 * torch.finfo(torch.bfloat16).eps / EPSILON}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_threads_of_a_head(dtype, reduction):
    """float32: value 0, hidden states 3.2, weight 0.2 epsilons, of 40 to 1 000 rows; bfloat16: the same bits."""
    heads = Heads("cpu", dtype, 300, 5003, (64, 80))
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(heads.run(reduction=reduction))
    assert max(max(errors(result, results[0])) for result in results[1:]) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_of_a_head(device, dtype, reduction):
    """float32: value 0.7, hidden states 4.8, weight 2.3 epsilons; bfloat16: weight 270, 0.003%, of 1 000 rows."""
    heads = Heads(device, dtype, rows=8)
    whole = heads.run(reduction=reduction)
    for chunk in (1, 5):
        assert max(errors(heads.run(reduction=reduction, chunk=chunk), whole)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_orders_and_places_of_rows_of_a_head(device, dtype):
    """float32: value 0.6, hidden states 7.2, weight 2.8 epsilons; bfloat16: weight 340, 0.004%, of 1 000 rows."""
    heads = Heads(device, dtype, rows=8)
    loss, hidden, weight = heads.run()
    order = torch.randperm(8, device=device)
    assert max(errors(heads.run(order), (loss[order], hidden[order], weight))) <= BOUNDS[dtype]
    assert max(errors(heads.run(slice(3, 8))[:2], (loss[3:8], hidden[3:8]))) <= BOUNDS[dtype]
