"""The option `inplace_backward`: the memory that it overwrites, when it does so, and other uses of the logits."""

import pytest
import torch

from fused_kd import kd_loss, reference
from fused_kd.launching import TWO, requested

from .oracle import relative_error

N, V = 5, 1237


def inputs(device, dtype=torch.float32):
    leaf, teacher = ((3 * torch.randn(N, V)).to(dtype).to(device) for _ in range(2))
    return leaf.requires_grad_(), teacher, torch.randint(V, (N,), device=device)


def gradient_of(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


IN_BACKWARD = {  # what has to wait for the upstream gradient
    "view": (torch.float32, {}),
    "reduction none": (torch.float32, {"reduction": "none"}),
    "float16": (torch.float16, {}),
    "logged only": (torch.float32, {"alpha": 0.0, "return_parts": True}),
}


@pytest.mark.parametrize("case", ["plain", *IN_BACKWARD])
def test_when_the_logits_are_written_over_does_not_depend_on_the_device(device, case):
    dtype, options = IN_BACKWARD.get(case, (torch.float32, {}))
    leaf, teacher, labels = inputs(device, dtype)
    logits = leaf * 1
    given = logits.view(1, N, V)[0] if case == "view" else logits
    before = logits.detach().clone()
    loss = kd_loss(given, teacher, labels, inplace_backward=True, **options)
    loss = loss.loss if "return_parts" in options else loss
    waits = case != "plain" or requested() == TWO
    assert torch.equal(logits, before) == waits
    of_oracle = {name: value for name, value in options.items() if name != "return_parts"}
    expected = gradient_of(reference.kd_loss(leaf.double(), teacher.double(), labels, **of_oracle).sum(), leaf)
    found = gradient_of(loss.sum(), leaf)
    assert relative_error(found, expected.double()) < (2e-3 if dtype == torch.float16 else 1e-6)
    assert torch.equal(logits, found)


LATER = {
    "z-loss": lambda logits: logits.logsumexp(-1).square().mean(),
    "what saves nothing": lambda logits: logits.mean(),
    "a view": lambda logits: logits[:, 3:].sum(),
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("keep", [False, True])
def test_a_later_use_of_logits_that_were_written_over_raises(device, later, added, keep):
    leaf, teacher, labels = inputs(device)
    logits = leaf * 1
    loss = kd_loss(logits, teacher, labels, inplace_backward=True)
    other = LATER[later](logits)
    total = loss + other if added else other
    if requested() == TWO:  # they are there until backward
        expected = reference.kd_loss(leaf, teacher, labels) * added + LATER[later](leaf * 1)
        assert relative_error(gradient_of(total, leaf), gradient_of(expected, leaf).double()) < 1e-5
        return
    with pytest.raises(RuntimeError, match="nothing uses after kd_loss"):
        total.backward(retain_graph=keep)


def test_a_later_use_of_logits_that_are_a_view_is_right(device):
    leaf, teacher, labels = inputs(device)
    logits = leaf * 1
    loss = kd_loss(logits.view(1, N, V), teacher[None], labels[None], inplace_backward=True)
    found = gradient_of(loss + LATER["z-loss"](logits), leaf)
    expected = gradient_of(reference.kd_loss(leaf, teacher, labels) + LATER["z-loss"](leaf), leaf)
    assert relative_error(found, expected.double()) < 1e-5


def test_an_earlier_use_that_saves_nothing_is_right(device):
    leaf, teacher, labels = inputs(device)
    logits = leaf * 1
    mean = logits.mean()
    found = gradient_of(kd_loss(logits, teacher, labels, inplace_backward=True) + mean, leaf)
    expected = gradient_of(reference.kd_loss(leaf, teacher, labels) + leaf.mean(), leaf)
    assert relative_error(found, expected.double()) < 1e-5


def test_two_losses_over_the_same_logits_raise(device):
    leaf, teacher, labels = inputs(device)
    logits = leaf * 1
    losses = [kd_loss(logits, teacher, labels, temperature=T, inplace_backward=True) for T in (1.0, 2.0)]
    with pytest.raises(RuntimeError, match=r"nothing uses after kd_loss|modified by an inplace operation"):
        sum(losses).backward()


def test_a_second_backward_pass_and_the_gradient_of_the_logits_themselves(device):
    leaf, teacher, labels = inputs(device)
    logits = leaf * 1
    logits.retain_grad()
    loss = kd_loss(logits, teacher, labels, inplace_backward=True)
    if requested() == TWO:
        loss.backward()
    else:
        for factor in (1.0, 0.3):
            leaf.grad = logits.grad = None
            (factor * loss).backward(retain_graph=factor == 1)
    factor = 1.0 if requested() == TWO else 0.3
    expected = factor * gradient_of(reference.kd_loss(leaf, teacher, labels), leaf)
    assert relative_error(leaf.grad, expected.double()) < 1e-6
    assert torch.equal(logits.grad, leaf.grad)


# --- memory that others hold


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize(
    "overlapping",
    {
        "the position before": lambda z: (z[1:], z[:-1]),
        "the position after": lambda z: (z[:-1], z[1:]),
        "other columns": lambda z: (z[:, : V - 1], z[:, 1:]),
        "rows in another order": lambda z: (z, torch.as_strided(z, z.shape, (0, 1))),
        "another dtype": lambda z: (z, z.detach().view(torch.bfloat16)[:, :V]),
        "transposed": lambda z: (z[:, :N], z[:, :N].T),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_teacher_in_memory_that_is_written_over_is_refused(device, overlapping, options):
    leaf, _, _ = inputs(device)
    logits = leaf * 1
    before = logits.detach().clone()
    student, teacher = overlapping[1](logits)
    labels = torch.zeros(student.shape[0], dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="inplace_backward: expected teacher_logits with memory of their own"):
        kd_loss(student, teacher.detach(), labels, inplace_backward=True, **options)
    assert torch.equal(logits, before)
    kd_loss(student, teacher.detach(), labels, **options)  # may overlap otherwise


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"temperature": 3.0, "alpha": 1.0}])
@pytest.mark.parametrize(
    "apart",
    {
        "halves of every row": lambda z: (z[:, :600], z[:, 600:1200]),
        "every other row": lambda z: (z[0:4:2], z[1:4:2]),
        "rows apart": lambda z: (z[:2], z[2:4]),
        "the same": lambda z: (z, z),
        "the same, padded": lambda z: (z, z[:, : V - 7]),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_teacher_elsewhere_in_the_same_memory_or_in_the_students_own_place(device, apart, options):
    leaf, _, _ = inputs(device)
    student, teacher = apart[1](leaf * 1)
    labels = torch.arange(student.shape[0], device=device)
    vocab_size = teacher.shape[-1]
    found = gradient_of(
        kd_loss(student, teacher.detach(), labels, vocab_size=vocab_size, inplace_backward=True, **options).sum(), leaf
    )
    student, teacher = apart[1](leaf.double())
    expected = gradient_of(
        reference.kd_loss(student, teacher.detach(), labels, vocab_size=vocab_size, **options).sum(), leaf
    )
    assert float((found - expected).norm()) <= 1e-6 * max(1.0, float(expected.norm()))


@pytest.mark.parametrize(
    "view", [lambda p: p.view(N, V), lambda p: p.view(N, V)[:3], lambda p: p.view(1, N, V).transpose(0, 1)[:, 0]]
)
def test_a_view_of_a_parameter_is_refused(device, view):
    parameter = torch.nn.Parameter(torch.randn(N * V, device=device))
    before, student = parameter.detach().clone(), view(parameter)
    with pytest.raises(ValueError, match=r"inplace_backward: .* a view of a leaf that requires grad"):
        kd_loss(student, student.detach(), None, alpha=1.0, inplace_backward=True)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("given", ["computed in the graph", "an input"])
def test_a_compiled_loss_reads_an_overlapping_teacher_before_it_is_written_over(given):
    leaf, _, labels = inputs("cpu")

    def loss(z):
        z = z * 1 if given == "computed in the graph" else z
        return kd_loss(z[1:], z[:-1].detach(), labels[1:], inplace_backward=True)

    found = gradient_of(torch.compile(loss, backend="aot_eager")(leaf if given[0] == "c" else leaf * 1), leaf)
    expected = gradient_of(reference.kd_loss(leaf[1:], leaf[:-1].detach(), labels[1:]), leaf)
    assert relative_error(found, expected.double()) < 1e-6
