"""kd_loss against the float64 oracle, on the CPU operators and on the kernels."""

import pytest
import torch

from fused_kd import KDLoss, KDLossOutput, kd_loss, reference
from fused_kd.launching import TWO, requested
from fused_kd.testing.blocks import blocks_of

from .oracle import EPSILON, assert_matches_oracle, relative_error, value_and_gradient

N, V = 6, 1237  # a prime: below one tile of the interpreter, above one of the compiled kernels


def make(device, dtype=torch.float32, teacher_dtype=None, shape=(N,), vocabulary=V):
    student = (3 * torch.randn(*shape, vocabulary)).to(dtype).to(device)
    teacher = (3 * torch.randn(*shape, vocabulary)).to(teacher_dtype or dtype).to(device)
    return student, teacher, torch.randint(vocabulary, shape, device=device)


@pytest.mark.parametrize("temperature", [0.5, 1, 2.0, 3.0, 4.0, 10.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_matches_the_oracle(device, temperature, alpha):
    assert_matches_oracle(kd_loss, *make(device), temperature=temperature, alpha=alpha, upstream=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_dtypes(device, dtype, teacher_dtype, label_dtype):
    student, teacher, labels = make(device, dtype, teacher_dtype)
    assert_matches_oracle(kd_loss, student, teacher, labels.to(label_dtype), temperature=2.0)
    loss, gradient = value_and_gradient(kd_loss, student, teacher, labels)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_weights_and_ignored_rows(device, reduction, weighted):
    student, teacher, labels = make(device, shape=(2, 5))
    labels[0, 1] = labels[1, 4] = -100
    weights = torch.rand(2, 5, device=device) if weighted else None
    assert_matches_oracle(
        kd_loss, student, teacher, labels, temperature=3.0, reduction=reduction, token_weights=weights
    )


def test_an_ignored_row_may_hold_anything(device):
    student, teacher, labels = make(device)
    labels[2] = 7
    clean = value_and_gradient(kd_loss, student, teacher, labels, ignore_index=7)
    student[2], teacher[2] = torch.nan, torch.inf
    dirty = value_and_gradient(kd_loss, student, teacher, labels, ignore_index=7)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert not dirty[1][2].any()


def test_a_row_of_weight_zero_counts_as_ignored(device):
    student, teacher, labels = make(device)
    weights = torch.ones(N, device=device)
    weights[1] = 0
    student[1] = torch.nan
    ignored = labels.clone()
    ignored[1] = -100
    by_weight = value_and_gradient(kd_loss, student, teacher, labels, token_weights=weights)
    by_label = value_and_gradient(kd_loss, student, teacher, ignored)
    assert all(torch.equal(a, b) for a, b in zip(by_weight, by_label, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(device, reduction):
    student, teacher, labels = make(device)
    loss, gradient = value_and_gradient(kd_loss, student, teacher, torch.full_like(labels, -100), reduction=reduction)
    assert not loss.any()
    assert not gradient.any()
    assert not gradient.isnan().any()


def test_without_labels_all_rows_count(device):
    student, teacher, _ = make(device)
    assert_matches_oracle(kd_loss, student, teacher, None, alpha=1.0, temperature=2.0)


def test_without_a_teacher_it_is_cross_entropy(device):
    student, _, labels = make(device)
    loss = kd_loss(student, None, labels, alpha=0.0)
    assert relative_error(loss, torch.nn.functional.cross_entropy(student.double(), labels)) < 1e-7


def test_alpha_for_each_row(device):
    student, teacher, labels = make(device)
    alpha = torch.tensor([0.0, 0.2, 1.0, 0.5, 1.0, 0.0], device=device)
    assert_matches_oracle(kd_loss, student, teacher, labels, alpha=alpha, temperature=2.0)


def test_alpha_and_token_weights_get_gradients(device):
    student, teacher, labels = make(device)
    labels[3] = -100
    found = []
    for loss in (kd_loss, reference.kd_loss):
        alpha = torch.full((N,), 0.3, device=device, dtype=torch.float64, requires_grad=True)
        weights = torch.linspace(0.5, 1, N, device=device, dtype=torch.float64).requires_grad_()
        loss(student.double() if loss is reference.kd_loss else student, teacher, labels, alpha=alpha, temperature=2.0,
             token_weights=weights).backward()  # fmt: skip
        found.append((alpha.grad, weights.grad))
    for ours, oracle in zip(*found, strict=True):
        assert relative_error(ours, oracle) < 1e-6


def test_num_items_makes_parts_add_up_to_the_whole(device):
    student, teacher, labels = make(device)
    labels[0] = -100
    whole = kd_loss(student, teacher, labels)
    for num_items in (N - 1, torch.tensor(N - 1, device=device)):
        parts = [
            kd_loss(student[rows], teacher[rows], labels[rows], num_items=num_items)
            for rows in (slice(0, 2), slice(2, None))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


def test_num_items_of_any_one_element(device):
    student, teacher, labels = make(device)
    labels[0] = -100
    expected = value_and_gradient(kd_loss, student, teacher, labels, num_items=3)
    for num_items in (torch.tensor(3), torch.tensor([3.0]), torch.tensor([[3]], dtype=torch.int32)):
        found = value_and_gradient(kd_loss, student, teacher, labels, num_items=num_items.to(device))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_mean_of_a_divisor_of_zero(device):
    """0 where no row counts; where rows count it is no number that could be taken for a mean."""
    student, teacher, labels = make(device)
    zero, weights = torch.zeros((), device=device), torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0], device=device)
    for options in ({"num_items": zero}, {"token_weights": weights}):
        assert not kd_loss(student, teacher, labels, **options).isfinite()
        assert kd_loss(student, teacher, torch.full_like(labels, -100), **options) == 0


@pytest.mark.parametrize("parts_alpha", [0.0, 0.4, 1.0])
def test_parts(device, parts_alpha):
    student, teacher, labels = make(device)
    student.requires_grad_()
    output = kd_loss(student, teacher, labels, alpha=parts_alpha, temperature=2.0, return_parts=True)
    assert isinstance(output, KDLossOutput)
    assert not output.divergence.requires_grad
    assert not output.ce.requires_grad
    torch.testing.assert_close(output.loss, (1 - parts_alpha) * output.ce + parts_alpha * 4 * output.divergence)
    torch.testing.assert_close(output.ce, torch.nn.functional.cross_entropy(student, labels))
    output.loss.backward()
    _, gradient = value_and_gradient(kd_loss, student, teacher, labels, alpha=parts_alpha, temperature=2.0)
    torch.testing.assert_close(student.grad, gradient)


def test_a_teacher_that_is_only_logged_adds_nothing_to_the_gradient(device):
    student, teacher, labels = make(device)
    teacher[:, 3] = torch.nan
    student.requires_grad_()
    kd_loss(student, teacher, labels, alpha=0.0, return_parts=True).loss.backward()
    assert not student.grad.isnan().any()


def test_vocab_size_leaves_out_the_padding(device):
    student, teacher, labels = make(device)
    labels %= 1000
    padded_student = torch.cat([student[:, :1000], torch.full((N, 24), 50.0, device=device)], 1)
    padded_teacher = torch.cat([teacher[:, :1000], torch.full((N, 8), torch.nan, device=device)], 1)
    loss, gradient = value_and_gradient(kd_loss, padded_student, padded_teacher, labels, vocab_size=1000)
    expected, expected_gradient = value_and_gradient(kd_loss, student[:, :1000], teacher[:, :1000], labels)
    assert relative_error(loss, expected) < 1e-6  # other strides, another order of summation
    assert relative_error(gradient[:, :1000], expected_gradient) < 1e-6
    assert not gradient[:, 1000:].any()


@pytest.mark.parametrize(
    "view",
    [
        lambda z: z[:, :-1],  # next-token prediction
        lambda z: z[:, ::2],
        lambda z: z.transpose(0, 1),
        lambda z: z[..., 3:1003],
        lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),  # the vocabulary is not the innermost dimension
        lambda z: z[:, :1],
        lambda z: z.view(2, 2, 2, -1)[:, :1],
    ],
)
def test_strided_logits(device, view):
    student, teacher, labels = make(device, shape=(2, 4))
    strided_labels = labels.expand(1, 2, 4).permute(1, 2, 0)  # goes through the same views
    student, teacher, labels = view(student), view(teacher), view(strided_labels.expand(2, 4, V))[..., 0] % 1000
    assert_matches_oracle(kd_loss, student, teacher, labels, temperature=2.0)


def test_a_view_of_logits_is_not_copied():
    from fused_kd.rows import as_rows

    logits = torch.randn(3, 5, 7)
    for view in (logits[:, :-1], logits[:, 1:], logits.transpose(0, 1), logits[0], logits[0, 0], logits[:, ::2, :4]):
        assert as_rows(view).data_ptr() == view.data_ptr()
        assert torch.equal(as_rows(view).reshape(view.shape), view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"logit_softcap": 30.0},  # Gemma 2
        {"logit_softcap": (5.0, None)},
        {"logit_softcap": (None, 2.0)},
        {"logit_scale": 0.0625},  # Cohere
        {"logit_scale": (1.0, 0.5)},
        {"logit_softcap": (3.0, 4.0), "logit_scale": (2.0, 0.5)},
    ],
)
def test_softcap_and_scale(device, options, dtype):
    student, teacher, labels = make(device, dtype)
    for temperature in (1.0, 3.0):
        assert_matches_oracle(kd_loss, student, teacher, labels, temperature=temperature, **options)
    assert_matches_oracle(kd_loss, student, teacher, labels, alpha=0.0, **options)


@pytest.mark.parametrize(
    "scale", [1e-4, 1e-2, 1.0, 30.0]
)  # far below the cap, where 1 - 2 / (e^2x + 1) cancels, to above
def test_softcap_at_every_size_of_logits(device, scale):
    student, teacher, labels = make(device)
    student, teacher, options = scale * student, scale * teacher, {"alpha": 1.0, "logit_softcap": 30.0}
    _, gradient = value_and_gradient(kd_loss, student, teacher, labels, **options)
    (_, eager), (_, oracle) = (
        value_and_gradient(reference.kd_loss, student.to(dtype), teacher.to(dtype), labels, **options)
        for dtype in (torch.float32, torch.float64)
    )
    assert relative_error(gradient, oracle) <= max(2 * relative_error(eager, oracle), 4 * EPSILON)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocab_size", [None, 1000])
def test_inplace_backward(device, inplace, vocab_size):
    student, teacher, labels = make(device, shape=(2, 3))
    labels %= 1000
    labels[1, 1] = -100
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    loss = kd_loss(logits, teacher, labels, temperature=2.0, inplace_backward=inplace, vocab_size=vocab_size)
    before = logits.detach().clone()
    loss.backward()
    _, expected = value_and_gradient(kd_loss, student, teacher, labels, temperature=2.0, vocab_size=vocab_size)
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(logits, expected if inplace else before)


def test_logits_used_after_inplace_backward_raise(device):
    student, teacher, labels = make(device)
    logits = student.requires_grad_() * 1
    square = (logits**2).sum()
    loss = kd_loss(logits, teacher, labels, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
    if requested() == TWO:  # otherwise the gradient is there still
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_second_backward_gives_the_same_gradient(device):
    student, teacher, labels = make(device)
    student.requires_grad_()
    loss = kd_loss(student, teacher, labels, temperature=2.0)
    (first,) = torch.autograd.grad(loss, student, torch.tensor(5.0, device=device), retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, torch.tensor(5.0, device=device))
    assert torch.equal(first, second)


def test_double_backward_is_refused(device):
    student, teacher, labels = make(device)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, labels), student, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one backward pass"):
        gradient.sum().backward()


def test_inputs_are_not_modified(device):
    student, teacher, labels = make(device)
    before = [t.clone() for t in (student, teacher, labels)]
    value_and_gradient(kd_loss, student, teacher, labels)
    assert all(torch.equal(a, b) for a, b in zip((student, teacher, labels), before, strict=True))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("maps", [{}, {"logit_softcap": (4.0, 3.0), "logit_scale": (1.5, 1.0)}])
def test_gradcheck(alpha, temperature, maps):
    student, teacher, labels = make("cpu", torch.float64, shape=(4,), vocabulary=11)
    labels[1] = -100
    torch.autograd.gradcheck(
        lambda z: kd_loss(z, teacher, labels, alpha=alpha, temperature=temperature, **maps), student.requires_grad_()
    )


def test_finite_differences_in_float32(device):
    student, teacher, labels = make(device, shape=(2,), vocabulary=50)
    _, gradient = value_and_gradient(kd_loss, student, teacher, labels, temperature=2.0)
    direction, step = torch.randn_like(student), 1e-2
    ahead, behind = (kd_loss(student + s * direction, teacher, labels, temperature=2.0) for s in (step, -step))
    torch.testing.assert_close((ahead - behind) / (2 * step), (gradient * direction).sum(), rtol=1e-2, atol=1e-3)


def test_float64_is_computed_in_float64():
    student, teacher, labels = make("cpu", torch.float64)
    loss, gradient = value_and_gradient(kd_loss, student, teacher, labels, temperature=3.0)
    oracle, oracle_gradient = value_and_gradient(reference.kd_loss, student, teacher, labels, temperature=3.0)
    assert loss.dtype == torch.float64
    assert relative_error(loss, oracle) < 1e-14
    assert relative_error(gradient, oracle_gradient) < 1e-14


def test_module_passes_its_options_on(device):
    student, teacher, labels = make(device)
    options = {"alpha": 0.2, "temperature": 3.0, "ignore_index": 5, "reduction": "sum", "vocab_size": 1200, "shift": True,
               "logit_softcap": 9.0, "logit_scale": (1.0, 0.5)}  # fmt: skip
    labels %= 1200
    labels[0] = 5
    assert torch.equal(KDLoss(**options)(student, teacher, labels), kd_loss(student, teacher, labels, **options))
    assert torch.equal(KDLoss()(student, teacher, labels), kd_loss(student, teacher, labels))


@pytest.mark.parametrize("ignored", [slice(0, 0), slice(1, None, 2)])
def test_memory_beyond_inputs_and_gradient_is_small(ignored):
    """On the CPU the buffers are all there is: an [N, V] temporary would be 8 times as much as the bound."""
    rows = 256
    student, teacher, labels = make("cpu", shape=(rows,))
    labels[ignored] = -100
    student.requires_grad_()
    with blocks_of(4 * V), torch.profiler.profile(profile_memory=True) as profiler:
        kd_loss(student, teacher, labels, temperature=3.0).backward()
    allocated = sum(event.self_cpu_memory_usage for event in profiler.events() if event.self_cpu_memory_usage > 0)
    assert allocated - student.numel() * 4 < student.numel() * 4 / 4
