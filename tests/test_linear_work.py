"""The gradients that linear_kd_loss computes, and the products that they cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import linear_kd_loss, reference
from fused_kd.divergences import DIVERGENCES, Objective
from fused_kd.heads import operator
from fused_kd.heads import sweep as linear
from fused_kd.heads.operator import linear_losses
from fused_kd.operators import packed
from fused_kd.sweep import KDOptions

from .heads import CHUNKED, F_S, F_T, N, V, make, run
from .oracle import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("asked", "flops"),
    [
        (("hidden", "weight", "bias"), 3 * F_S + F_T),
        (("hidden", "weight"), 3 * F_S + F_T),
        (("hidden",), 2 * F_S + F_T),  # a frozen head, LoRA
        (("weight",), 2 * F_S + F_T),
        (("bias",), F_S + F_T),
        ((), F_S + F_T),  # the loss only
    ],
)
@pytest.mark.parametrize("chunked", [None, CHUNKED])
def test_only_what_is_asked_for_is_computed(asked, flops, chunked):
    given = make("cpu")
    for name in {"hidden", "weight", "bias"} - set(asked):
        getattr(given, name).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        loss = linear_kd_loss(*given[:5], student_bias=given.bias, workspace_bytes=chunked)
        if asked:
            loss.backward()
    assert counter.get_total_flops() == flops
    whole = run(reference.linear_kd_loss, given.to(torch.float64))
    for name in ("hidden", "weight", "bias"):
        gradient = getattr(given, name).grad
        assert (gradient is not None) == (name in asked)
        assert gradient is None or relative_error(gradient, whole[name]) < 1e-6


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("chunked", [None, CHUNKED])
def test_every_divergence_takes_the_same_products(divergence, chunked):
    given = make("cpu")
    with FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5], divergence=divergence, workspace_bytes=chunked).backward()
    assert counter.get_total_flops() == 3 * F_S + F_T


def test_no_gradient_work_without_gradients():
    given = make("cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5])
    assert counter.get_total_flops() == F_S + F_T
    with FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5], alpha=0.0)  # the teacher is not needed
    assert counter.get_total_flops() == 3 * F_S


OF_LORA = False, False


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((True,) * 3, (True,) * 3), ((True, True, False),) * 2, ((False, True, False), (False,) * 3), ((False,) * 3,) * 2],
)
def test_flops_are_counted_as_they_are_spent(student, teacher):
    """The operator is counted by its formula, and here is what the products inside it come to."""
    given = make("cpu")
    kd = KDOptions(V, True, True, torch.float32)
    options = linear.LinearOptions(kd, (*student, *OF_LORA, *teacher), torch.float32, torch.float32, None, CHUNKED)
    weights = torch.ones(3, N, dtype=torch.float64)
    heads = [t.detach() for t in (given.hidden, given.weight, given.bias)] + [None] * 2
    heads += [t.detach() for t in (*given[2:4], given.bias)]
    with FlopCounterMode(display=False) as formula:
        linear_losses(*heads, given.labels, weights, torch.ones(N), options=options)
    with FlopCounterMode(display=False) as spent:
        operator._linear_losses(*heads, given.labels, weights, torch.ones(N), *packed(kd), *options[1:])
    assert formula.get_total_flops() == spent.get_total_flops()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])  # of one sweep of statistics, and of two
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("divergence_in_loss", [True, False])
@pytest.mark.parametrize("needed", [True, False])
def test_flops_of_lean_mode_are_counted_as_they_are_spent(divergence, teacher, divergence_in_loss, needed):
    given = make("cpu")
    kd = KDOptions(V, True, divergence_in_loss, torch.float32, parts=True, objective=Objective(divergence=divergence))
    gradients = (needed, needed, False, *OF_LORA, *(False,) * 3)
    options = linear.LinearOptions(kd, gradients, torch.float32, torch.float32, None, None, "lean")
    weights = torch.ones(3, N, dtype=torch.float64)
    heads = [given.hidden.detach(), given.weight.detach(), *[None] * 3]
    heads += [*(given[2:4] if teacher else (None, None)), None]
    with FlopCounterMode(display=False) as formula:
        linear_losses(*heads, given.labels, weights, None, options=options)
    with FlopCounterMode(display=False) as spent:
        operator._linear_losses(*heads, given.labels, weights, None, *packed(kd), *options[1:])
    assert formula.get_total_flops() == spent.get_total_flops()


def test_row_losses_project_again_in_backward():
    given = make("cpu")
    with FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5], reduction="none").sum().backward()
    assert counter.get_total_flops() == (F_S + F_T) + (3 * F_S + F_T)
