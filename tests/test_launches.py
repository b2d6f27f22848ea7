"""The launches of a training step on a GPU: few, whatever the options.  They are counted on fake tensors.

An upstream gradient is given to backward, so that the ones of PyTorch's engine are not counted.
"""

import itertools

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.launching import ONE, TWO
from fused_kd.testing import launching
from fused_kd.testing.launches import fake_gpu
from fused_kd.testing.plans import in_chunks

MOST = 8  # per step
MOST_PER_CHUNK = 6  # products included
B, L, V = 4, 64, 32_000
ROWS = B, L

# Of the rows: each combination of a choice per line is a case.
DIVISORS = {
    "mean": {},
    "mean, a number": {"num_items": 10},
    "mean, a tensor": {"num_items": torch.tensor},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
}
ALPHAS = {"a number": (), "a scalar tensor": (), "per row": ROWS}
OF_ROWS = list(itertools.product(DIVISORS, ALPHAS, (False, True), (False, True), (False, True)))


def options_of(divisor, alpha, weighted, shift, parts):
    """The options of one combination; tensors are made under the current mode."""
    options = {"shift": shift, "return_parts": parts, "temperature": 2.0, **DIVISORS[divisor]}
    if options.get("num_items") is torch.tensor:
        options["num_items"] = torch.randint(9, ())
    if alpha != "a number":
        options["alpha"] = torch.rand(ALPHAS[alpha])
    if weighted:
        options["token_weights"] = torch.rand(ROWS)
    return options


def launched(launches):
    """The number of launches since the last call."""
    count = sum(launches.kernels.values()) + sum(launches.operators.values())
    names = dict(launches.kernels + launches.operators)
    launches.kernels.clear()
    launches.operators.clear()
    return count, names


def take_step(launches, loss, leaves):
    with launches:
        result = loss()
        value = result.loss if isinstance(result, tuple) else result
        upstream = torch.empty_like(value)  # an allocation, which is not counted
        torch.autograd.grad(value, leaves, upstream)
    return launched(launches)


def worst(counts):
    """The largest count; it is printed with its launches, for a test that fails."""
    case = max(counts, key=lambda case: counts[case][0])
    print(case, *counts[case])
    return counts[case][0]


@pytest.mark.parametrize("launch", [ONE, TWO])
@pytest.mark.parametrize(("inplace", "teacher_grad"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("vocab_size", [V, V - 3])
def test_a_step_from_logits(launch, inplace, teacher_grad, vocab_size):
    counts = {}
    with launching(launch), fake_gpu() as launches:
        student, teacher = (torch.randn(*ROWS, V, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        logits = student.clone()
        teacher.requires_grad_(teacher_grad)
        leaves, labels = [logits, teacher][: 1 + teacher_grad], torch.randint(V, ROWS)
        fixed = {"inplace_backward": inplace, "teacher_grad": teacher_grad, "vocab_size": vocab_size}
        for case in OF_ROWS:
            options = options_of(*case)
            counts[case] = take_step(launches, lambda o=options: kd_loss(logits, teacher, labels, **fixed, **o), leaves)
    assert worst(counts) <= MOST


@pytest.mark.parametrize("launch", [ONE, TWO])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("parts", [False, True])
def test_a_step_of_one_term(launch, alpha, parts):
    with launching(launch), fake_gpu() as launches:
        logits = torch.randn(*ROWS, V, requires_grad=True).clone()
        teacher, labels = torch.randn(*ROWS, V), torch.randint(V, ROWS)
        for given in ((teacher, labels), (teacher, None) if alpha else (None, labels)):
            count, names = take_step(
                launches, lambda g=given: kd_loss(logits, *g, alpha=alpha, return_parts=parts), [logits]
            )
            assert count <= MOST, names


H_S, H_T, CHUNK = 64, 128, 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needed", ["trained head", "trained head alone", "frozen head"])
@pytest.mark.parametrize("in_16_bits", [False, True])
def test_a_step_from_hidden_states(dtype, needed, in_16_bits):
    counts = {}
    with fake_gpu() as launches:
        student, teacher = (torch.randn(*ROWS, H, dtype=dtype) for H in (H_S, H_T))
        weight, teacher_weight = (torch.randn(V, H, dtype=dtype) for H in (H_S, H_T))
        leaves = {"trained head": [student, weight], "trained head alone": [weight], "frozen head": [student]}[needed]
        for leaf in leaves:
            leaf.requires_grad_()
        labels = torch.randint(V, ROWS)
        reduced = [case for case in OF_ROWS if case[0] != "none"]  # with "none" backward projects each chunk once more
        for case, chunks in itertools.product(reduced[::7], (1, 4)):
            options = options_of(*case) | {"logits_dtype": dtype if in_16_bits else None}
            with in_chunks(B * L // chunks):
                count, names = take_step(
                    launches,
                    lambda o=options: linear_kd_loss(student, weight, teacher, teacher_weight, labels, **o), leaves,
                )  # fmt: skip
            counts[(*case, chunks)] = count - chunks * MOST_PER_CHUNK, count, names
    assert worst(counts) <= MOST
