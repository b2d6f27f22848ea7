"""The option `teacher_grad`: the teacher's gradient, alpha T (log-ratio - KL) q_T, from the same sweep as the student's."""

import warnings

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss, plan_chunks, reference
from fused_kd.testing.memory import peak_bytes

from .oracle import relative_error

N, V, H_S, H_T = 12, 201, 8, 6
CHUNKED = 5 * 2 * 256 * 4  # bytes: 5 tokens of both logits


def run(loss, leaves, *rest, upstream=None, **options):
    """Gradients of the leaves, all of which the loss takes first."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves, *rest, teacher_grad=True, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    return [leaf.grad for leaf in leaves]


def assert_matches_oracle(loss, oracle, leaves, *rest, **options):
    """Within twice eager float32's error, or the rounding of the result."""
    ours = run(loss, leaves, *rest, **options)
    eager, exact = (
        run(oracle, [leaf.to(dtype) for leaf in leaves], *rest, **options) for dtype in (torch.float32, torch.float64)
    )
    for leaf, found, by_eager, expected in zip(leaves, ours, eager, exact, strict=True):
        assert found.dtype == leaf.dtype
        assert expected.norm() > 0
        rounding = torch.finfo(leaf.dtype).eps * (1 if leaf.dtype.itemsize == 2 else 4)
        assert relative_error(found, expected) <= max(2 * relative_error(by_eager, expected), rounding)


def logits(device, dtype=torch.float32, teacher_dtype=None, scale=3.0):
    student, teacher = (scale * torch.randn(N, V, device=device) for _ in range(2))
    labels = torch.randint(V - 1, (N,), device=device)
    labels[4] = -100
    return student.to(dtype), teacher.to(teacher_dtype or dtype), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_matches_the_oracle(device, temperature, alpha):
    student, teacher, labels = logits(device)
    assert_matches_oracle(kd_loss, reference.kd_loss, [student, teacher], labels, temperature=temperature, alpha=alpha)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_softcap": (None, 4.0), "logit_scale": (1.0, 0.5)},
        {"logit_softcap": (5.0, 3.0)},
        {"vocab_size": V - 1},
        {"alpha": torch.linspace(0, 1, N), "token_weights": torch.linspace(0, 2, N)},
        {"reduction": "none", "upstream": torch.linspace(-1, 2, N)},
        {"num_items": 40, "return_parts": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(device, options):
    student, teacher, labels = logits(device)
    options = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    assert_matches_oracle(kd_loss, reference.kd_loss, [student, teacher], labels, temperature=3.0, **options)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_dtypes(device, dtypes):
    student, teacher, labels = logits(device, *dtypes)
    assert_matches_oracle(kd_loss, reference.kd_loss, [student, teacher], labels, temperature=2.0)


def test_gradcheck():
    student, teacher = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"alpha": 0.6, "temperature": 2.5, "teacher_grad": True, "logit_softcap": (None, 3.0)}
    assert torch.autograd.gradcheck(lambda s, t: kd_loss(s, t, torch.arange(3), **options), (student, teacher))


def test_a_constant_added_to_the_teacher_changes_nothing(device):
    student, teacher, labels = logits(device, scale=1.0)
    _, gradient = run(kd_loss, [student, teacher], labels)
    assert gradient.sum(-1).abs().max() < 1e-6 * gradient.abs().sum(-1).max()
    assert not gradient[4].any()  # an ignored row


def test_ignored_rows_and_masked_tokens(device):
    student, teacher, labels = logits(device)
    teacher[4] = torch.nan
    student[:, 7] = teacher[:, 7] = -torch.inf  # nobody's token
    teacher[:, 9] = -torch.inf  # one that only the student has
    labels[labels == 7] = 8
    _, found = run(kd_loss, [student, teacher], labels, temperature=2.0)
    real = [j for j in range(V) if j not in (7, 9)]
    # By the formula: the reference's backward pass is NaN at columns without teacher mass.
    z, y = student.double() / 2, teacher.double() / 2
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    ratio = (log_q - log_p)[:, real]
    q = log_q.exp()[:, real]
    kl = (q * ratio).sum(-1, keepdim=True)
    counted = torch.arange(N, device=device) != 4
    exact = 0.5 * 2 * q * (ratio - kl) / counted.sum()
    assert relative_error(found[counted][:, real], exact[counted]) < 1e-6
    assert not found[:, [7, 9]].any()
    assert not found[4].any()


@pytest.mark.parametrize("view", ["expanded", "transposed", "sliced"])
def test_strided_teacher(device, view):
    student, labels = torch.randn(2, 3, V, device=device), torch.randint(V, (2, 3), device=device)
    base = {"expanded": (3, V), "transposed": (V, 2, 3), "sliced": (2, 4, V + 5)}[view]

    def loss(function):
        def of(student, base, *rest, **options):
            teacher = {
                "expanded": lambda t: t.expand(2, 3, V), "transposed": lambda t: t.permute(1, 2, 0),
                "sliced": lambda t: t[:, 1:, 2 : V + 2],
            }[view](base)  # fmt: skip
            return function(student, teacher, *rest, **options)

        return of

    leaves = [student, torch.randn(*base, device=device)]
    assert_matches_oracle(loss(kd_loss), loss(reference.kd_loss), leaves, labels, temperature=2.0)


def test_inplace_backward_takes_the_students_memory_only(device):
    student, teacher, labels = logits(device)
    expected = run(kd_loss, [student, teacher], labels, temperature=2.0)
    leaves = [tensor.clone().requires_grad_() for tensor in (student, teacher)]
    computed, its_teacher = leaves[0] * 1, leaves[1] * 1
    kd_loss(computed, its_teacher, labels, temperature=2.0, teacher_grad=True, inplace_backward=True).backward()
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, expected, strict=True))
    assert torch.equal(its_teacher, teacher)


def test_the_teacher_may_learn_alone(device):
    student, teacher, labels = logits(device)
    expected = run(kd_loss, [student, teacher], labels)[1]
    teacher.requires_grad_()
    kd_loss(student, teacher, labels, teacher_grad=True).backward()
    assert torch.equal(teacher.grad, expected)


def test_off_by_default_with_a_warning():
    student, teacher, labels = logits("cpu")
    student.requires_grad_()
    teacher.requires_grad_()
    with pytest.warns(UserWarning, match="teacher_logits requires grad.*teacher_grad=True") as caught:
        loss = kd_loss(student, teacher, labels)
    assert caught[0].filename == __file__  # it names the caller's line
    loss.backward()
    assert teacher.grad is None
    hidden = [torch.randn(N, H, requires_grad=True) for H in (H_S, H_T)]
    weights = [torch.randn(V, H, requires_grad=True) for H in (H_S, H_T)]
    with pytest.warns(UserWarning, match="teacher_hidden requires grad"):
        linear_kd_loss(hidden[0], weights[0], hidden[1], weights[1], labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd_loss(student, teacher, labels, teacher_grad=True)
        kd_loss(student, teacher, labels, teacher_grad=True, alpha=0.0)
        kd_loss(student, teacher.detach(), labels)
        # As in every training step: hidden states without a graph, and a weight that nobody froze.
        linear_kd_loss(hidden[0], weights[0], hidden[1].detach(), weights[1], labels)
        with torch.no_grad():
            kd_loss(student, teacher, labels)


def test_the_warning_comes_once():
    student, teacher, _ = logits("cpu")
    teacher.requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            kd_loss(student, teacher, alpha=1.0)
    assert len(caught) == 1


# --- from hidden states


def heads(device, dtype=torch.float32):
    shapes = ((N, H_S), (V, H_S), (N, H_T), (V, H_T)), ((V,), (V,))
    tensors, biases = ([torch.randn(*s, device=device).to(dtype) for s in part] for part in shapes)
    labels = torch.randint(V - 1, (N,), device=device)
    labels[4] = -100
    return tensors, biases, labels


def with_biases(function):
    def loss(hidden, weight, teacher_hidden, teacher_weight, student_bias, teacher_bias, labels, **options):
        biases = {"student_bias": student_bias, "teacher_bias": teacher_bias}
        return function(hidden, weight, teacher_hidden, teacher_weight, labels, **biases, **options)

    return loss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"workspace_bytes": CHUNKED},
        {"reduction": "none", "upstream": torch.linspace(-1, 2, N)},
        {"vocab_size": V - 1, "logit_softcap": (None, 4.0), "logit_scale": (1.0, 0.5)},
        {"alpha": 1.0, "reduction": "sum"},
    ],
    ids=lambda options: next(iter(options), "defaults"),
)
def test_linear_matches_the_oracle(device, options):
    tensors, biases, labels = heads(device)
    ours, oracle = with_biases(linear_kd_loss), with_biases(reference.linear_kd_loss)
    assert_matches_oracle(ours, oracle, tensors + biases, labels, temperature=2.0, **options)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_in_half_precision(device, logits_dtype, reduction):
    """Within twice the error of eager heads of the same dtype, or the rounding of the result."""
    for dtype in (torch.bfloat16, torch.float16):
        tensors, biases, labels = heads(device, dtype)
        ours, oracle = with_biases(linear_kd_loss), with_biases(reference.linear_kd_loss)
        options = {"temperature": 2.0, "reduction": reduction, "workspace_bytes": CHUNKED, "logits_dtype": logits_dtype}
        found, eager = (run(loss, tensors + biases, labels, **options) for loss in (ours, oracle))
        del options["logits_dtype"]
        exact = run(oracle, [t.double() for t in tensors + biases], labels, **options)
        for one, other, expected in zip(found, eager, exact, strict=True):
            assert relative_error(one, expected) <= max(2 * relative_error(other, expected), torch.finfo(dtype).eps)


@pytest.mark.parametrize("needed", [(0, 1), (2,), (0, 3), (2, 3), (1, 5)])
def test_linear_computes_only_what_is_asked_for(device, needed):
    tensors, biases, labels = heads(device)
    whole = run(with_biases(linear_kd_loss), tensors + biases, labels)
    leaves = [tensor.requires_grad_(i in needed) for i, tensor in enumerate(tensors + biases)]
    with_biases(linear_kd_loss)(*leaves, labels, teacher_grad=True).backward()
    for i, (leaf, expected) in enumerate(zip(leaves, whole, strict=True)):
        assert (leaf.grad is not None) == (i in needed)
        assert i not in needed or relative_error(leaf.grad, expected.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [16, 128, 256])  # 256: one chunk
@pytest.mark.usefixtures("small_blocks")
def test_memory_is_what_the_plan_says(dtype, chunk):
    shapes = (256, H_S), (8000, H_S), (256, H_T), (8000, H_T)
    leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    labels, bound = torch.randint(8000, (256,)), chunk * 2 * 8000 * dtype.itemsize

    def step():
        for leaf in leaves:
            leaf.grad = None
        linear_kd_loss(*leaves, labels, teacher_grad=True, workspace_bytes=bound).backward()

    plan = plan_chunks(
        256, 8000, H_S, H_T, dtype=dtype, teacher_hidden_grad=True, teacher_weight_grad=True, workspace_bytes=bound
    )
    measured = peak_bytes(step, torch.device("cpu"))
    assert 0.95 * plan.peak_bytes <= measured <= 1.1 * plan.peak_bytes + 831_000  # 5 blocks of 128 KB, 256 rows' values


def test_the_plan_of_one_chunk_keeps_the_logits_that_become_gradients():
    """Without a teacher that learns its logits make room for the weight gradient; here they are needed to the end."""
    options = {"hidden_grad": False, "dtype": torch.float32, "workspace_bytes": 10**9}
    alone, both = (plan_chunks(16, 8192, 64, 32, teacher_hidden_grad=learns, **options) for learns in (False, True))
    weight, teacher_logits = 8192 * 64 * 4, alone.buffers["teacher logits"]
    copy = 16 * 64 * 4  # the student's hidden states that count; the teacher's lie in the memory of their gradient
    assert alone.peak_bytes == alone.workspace_bytes + weight + copy - teacher_logits
    assert both.peak_bytes == both.workspace_bytes + weight + copy + 16 * 32 * 4


def test_mutual_distillation_is_two_losses_at_once():
    """Two students that teach each other: one loss's gradient for both is that of the reference."""
    a, b, labels = logits("cpu")
    ours = [x + y for x, y in zip(run(kd_loss, [a, b], labels), reversed(run(kd_loss, [b, a], labels)), strict=True)]

    def both(first, second, labels, **options):
        return reference.kd_loss(first, second, labels, **options) + reference.kd_loss(second, first, labels, **options)

    for found, exact in zip(ours, run(both, [a.double(), b.double()], labels), strict=True):
        assert relative_error(found, exact) < 1e-6
