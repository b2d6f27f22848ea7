"""DistilBERT's loss: the recipe of docs/examples.md computes what the published code does, to rounding."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kd import linear_kd_loss

from .oracle import EPSILON, relative_error

PAGE = Path(__file__).parents[1] / "docs" / "examples.md"
V, ALPHA_CE, ALPHA_MLM, T = 30_522, 5.0, 2.0, 2.0


def recipe(loss: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """Return the page's function, with this loss instead of kd_loss, if one is given, and weights of this dtype."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "def distilbert_loss" in b)
    names: dict[str, Any] = {"torch": torch}
    exec(block[: block.index("\n\n\nattention_mask =")].replace("torch.float32", str(dtype)), names)
    if loss is not None:
        names["kd_loss"] = loss
    return names["distilbert_loss"]


def published(
    student: Tensor, teacher: Tensor, attention_mask: Tensor, lm_labels: Tensor, restricted: bool = False
) -> Tensor:
    """Return alpha_ce T^2 KLDivLoss("batchmean") of the selected rows plus alpha_mlm CE, as Sanh et al. train with."""
    selected = lm_labels > -1 if restricted else attention_mask.bool()
    log_p = F.log_softmax(student[selected] / T, dim=-1)
    q = F.softmax(teacher[selected] / T, dim=-1)
    divergence = torch.nn.KLDivLoss(reduction="batchmean")(log_p, q) * T**2
    return ALPHA_CE * divergence + ALPHA_MLM * F.cross_entropy(student.flatten(0, 1), lm_labels.flatten())


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Masks of three texts of 12, 9 and 5 tokens, and labels of the masked ones, about a sixth."""
    attention_mask = (torch.arange(12) < torch.tensor([[12], [9], [5]])).long()
    labels = torch.full((3, 12), -100)
    masked = torch.tensor([1, 7, 12, 20, 26]), torch.tensor([0, 30_521, 17, 4000, 29_999])
    labels.view(-1)[masked[0]] = masked[1]
    assert bool((attention_mask[labels > -1] == 1).all())
    return attention_mask, labels


def gradients(loss: Any, leaves: tuple[Tensor, ...], *arguments: Tensor) -> list[Tensor]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    value = loss(*leaves, *arguments)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("restricted", [False, True])
def test_recipe_is_the_published_loss(rows, dtype, restricted):
    student, teacher = (3 * torch.randn(3, 12, V, dtype=dtype) for _ in range(2))
    exact = gradients(lambda s, t: published(s, t, *rows, restricted), (student.double(),), teacher.double())
    eager = gradients(lambda s, t: published(s, t, *rows, restricted), (student,), teacher)
    mask, labels = ((rows[1] > -1).long(), rows[1]) if restricted else rows
    ours = gradients(lambda s, t: recipe(dtype=dtype)(s, t, mask, labels), (student,), teacher)
    for found, theirs, right in zip(ours, eager, exact, strict=True):
        rounding = 1e-14 if dtype == torch.float64 else 4 * EPSILON
        assert relative_error(found, right) <= max(2 * relative_error(theirs, right), rounding)


def test_from_hidden_states_with_the_biases_of_the_heads(rows):
    sizes = {"student": 24, "teacher": 40}
    heads = {who: (torch.randn(V, H) * 3 / H**0.5, torch.randn(V)) for who, H in sizes.items()}
    hidden = {who: torch.randn(3, 12, H) for who, H in sizes.items()}

    def ours(state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def loss(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
            biases = {"student_bias": bias, "teacher_bias": heads["teacher"][1]}
            return linear_kd_loss(student, weight, teacher, heads["teacher"][0], labels, **biases, **options)

        return recipe(loss)(state, hidden["teacher"], *rows)

    def theirs(state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        teacher = F.linear(hidden["teacher"], *heads["teacher"]).to(state.dtype)
        return published(F.linear(state, weight, bias), teacher, *rows)

    leaves = hidden["student"], *heads["student"]
    exact = gradients(theirs, tuple(leaf.double() for leaf in leaves))
    for found, eager, right in zip(gradients(ours, leaves), gradients(theirs, leaves), exact, strict=True):
        assert relative_error(found, right) <= max(2 * relative_error(eager, right), 4 * EPSILON)


def test_padding_may_hold_anything(rows):
    student, teacher = (torch.randn(3, 12, V) for _ in range(2))
    spoiled = [logits.masked_fill(rows[0][..., None] == 0, torch.nan) for logits in (student, teacher)]
    value, gradient = gradients(lambda s, t: recipe()(s, t, *rows), (student,), teacher)
    found, spoiled_gradient = gradients(lambda s, t: recipe()(s, t, *rows), spoiled[:1], spoiled[1])
    assert found == value
    assert torch.equal(spoiled_gradient, gradient)
