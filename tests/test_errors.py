"""Invalid calls: the exception of each, its message, which names the argument, and that nothing is modified."""

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss, plan_chunks

from .unread import unread

S = torch.randn(2, 3, 10)
L = torch.zeros(2, 3, dtype=torch.int64)

CASES = [
    ((S.long(), S, L), {}, TypeError, "student_logits: expected dtype float32, .* got torch.int64"),
    (("x", S, L), {}, TypeError, r"student_logits: expected a tensor, got 'x' \(str\)"),
    ((S, S.int(), L), {}, TypeError, "teacher_logits: expected dtype"),
    (
        (S, S[:1], L),
        {},
        ValueError,
        r"teacher_logits: expected the student's leading dimensions \(2, 3\), got \(1, 3\)",
    ),
    (
        (S, S[..., :8], L),
        {},
        ValueError,
        "teacher_logits: expected the student's vocabulary of 10, got 8; .*vocab_size",
    ),
    ((S[..., :0], S[..., :0], L), {}, ValueError, r"student_logits: expected shape \[..., V\] with V >= 1"),
    ((torch.tensor(1.0), S, L), {}, ValueError, r"student_logits: expected shape \[..., V\]"),
    ((S, S.to("meta"), L), {}, ValueError, "teacher_logits: expected a tensor on"),
    ((S.to("meta"), S.to("meta"), L), {}, ValueError, "student_logits: expected a tensor on the CPU or a CUDA device"),
    ((S, S, L.to("meta")), {}, ValueError, "labels: expected a tensor on the student's device cpu, got meta"),
    ((S, S, L), {"vocab_size": 11}, ValueError, "vocab_size: expected an integer from 1 to 10, got 11"),
    ((S, S, L), {"vocab_size": True}, TypeError, "vocab_size: expected an integer from 1 to 10, got True"),
    ((S.to_sparse(), S, L), {}, TypeError, "student_logits: expected a dense tensor, got .*sparse"),
    ((S, S, L), {"vocab_size": 2.0}, TypeError, "vocab_size: expected an integer"),
    ((S, S, L[:1]), {}, ValueError, r"labels: expected one value a row, shape \(2, 3\), got \(1, 3\)"),
    ((S, S, L.float()), {}, TypeError, "labels: expected class ids of dtype int64 or int32, got torch.float32"),
    ((S, S, L + 10), {}, IndexError, "labels: expected class ids from 0 to 9 or ignore_index=-100, got 10"),
    ((S, S, L - 1), {}, IndexError, "labels: .* got -1"),
    ((S, S, L + 8), {"vocab_size": 8}, IndexError, "labels: expected class ids from 0 to 7"),
    ((S, S), {}, ValueError, "labels: expected a tensor, got None with alpha=0.5 .*pass alpha=1"),
    ((S, None, L), {}, ValueError, "teacher_logits: expected a tensor, got None with alpha=0.5 .*pass alpha=0"),
    ((S, S, L), {"alpha": 1.5}, ValueError, r"alpha: expected a number in \[0, 1\], got 1.5"),
    ((S, S, L), {"alpha": float("nan")}, ValueError, r"alpha: expected a number in \[0, 1\], got nan"),
    ((S, S, L), {"alpha": "half"}, TypeError, "alpha: expected a number or a floating-point tensor, got 'half'"),
    ((S, S, L), {"alpha": torch.full((2, 3), 2.0)}, ValueError, r"alpha: expected values in \[0, 1\], got 2.0"),
    ((S, S, L), {"alpha": torch.zeros(2)}, ValueError, "alpha: expected one value a row"),
    ((S, S, L), {"alpha": L}, TypeError, "alpha: expected a number or a floating-point tensor"),
    ((S, S, L), {"temperature": 0}, ValueError, "temperature: expected a finite number above 0, got 0"),
    ((S, S, L), {"temperature": -1.0}, ValueError, "temperature: expected a finite number above 0, got -1.0"),
    ((S, S, L), {"temperature": float("inf")}, ValueError, "temperature: expected a finite number above 0, got inf"),
    (
        (S, S, L),
        {"temperature": 1e200},
        ValueError,
        "temperature: expected a number from 1e-18 to 1e[+]?18, got 1e[+]?200",
    ),
    ((S, S, L), {"temperature": torch.tensor(2.0)}, TypeError, "temperature: expected a finite .*pass a Python number"),
    ((S, S, L), {"reduction": "avg"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
    (
        (S, S, L),
        {"divergence": "kl"},
        ValueError,
        "divergence: expected 'forward_kl', 'reverse_kl', .*'tvd'.*, or an object of .*, got 'kl'",
    ),
    ((S, S, L), {"shift": 1}, TypeError, "shift: expected True or False, got 1"),
    (
        (S, S),
        {"shift": True, "alpha": 1.0},
        ValueError,
        "labels: expected a tensor with shift=True, .*got None; pass token",
    ),
    (
        (S[0, 0], S[0, 0], L[0, 0]),
        {"shift": True},
        ValueError,
        r"shift: expected False without a sequence dimension, .* shape \(\)",
    ),
    (
        (S, S, L + 10),
        {"shift": True},
        IndexError,
        "labels: expected class ids from 0 to 9 or ignore_index=-100, got 10",
    ),
    ((S, S, L), {"ignore_index": None}, TypeError, "ignore_index: expected an integer"),
    (
        (S, S, L.int()),
        {"ignore_index": 2**40},
        ValueError,
        "ignore_index: expected an integer that labels of torch.int32",
    ),
    ((S, S, L), {"num_items": torch.tensor(-1)}, ValueError, "num_items: expected a finite number, at least 0, got -1"),
    ((S, S, L), {"num_items": 0}, ValueError, "num_items: expected a finite number above 0 .*got 0"),
    (
        (S, S, L),
        {"num_items": "4"},
        TypeError,
        "num_items: expected a finite number above 0 or a tensor of one element",
    ),
    ((S, S, L), {"num_items": torch.ones(2)}, ValueError, "num_items: .* a tensor of one element"),
    ((S, S, L), {"num_items": 4, "reduction": "sum"}, ValueError, "num_items: expected reduction='mean'"),
    ((S, S, L), {"token_weights": torch.ones(3)}, ValueError, "token_weights: expected one value a row"),
    ((S, S, L), {"token_weights": [1.0]}, TypeError, "token_weights: expected a tensor"),
    ((S, S, L), {"token_weights": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "token_weights: expected real"),
    (
        (S, S, L),
        {"logit_softcap": 0.0},
        ValueError,
        "logit_softcap: expected None or a finite number above 0.* got 0.0",
    ),
    ((S, S, L), {"logit_softcap": (30.0, -1.0)}, ValueError, "logit_softcap: .* got -1.0"),
    ((S, S, L), {"logit_softcap": "30"}, TypeError, r"logit_softcap: .* got '30' \(str\)"),
    ((S, S, L), {"logit_scale": None}, TypeError, "logit_scale: expected a finite number above 0"),
    ((S, S, L), {"logit_scale": (1.0, float("inf"))}, ValueError, "logit_scale: .* got inf"),
    ((S, S, L), {"logit_scale": (1.0, 1.0, 1.0)}, ValueError, r"logit_scale: expected one value or a pair .* 3 values"),
    ((S.clone().requires_grad_(), S, L), {"inplace_backward": True}, ValueError, "inplace_backward: .* got a leaf"),
    (
        (S[:, :1].expand(2, 3, 10), S, L),
        {"inplace_backward": True},
        ValueError,
        "inplace_backward: .*memory of their own",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), CASES, ids=[case[3][:50] for case in CASES])
def test_invalid_call(arguments, options, error, message):
    before = S.clone()
    with pytest.raises(error, match=message):
        kd_loss(*arguments, **options)
    assert torch.equal(S, before)


H = torch.randn(2, 3, 4)  # hidden states of the student; the teacher's are wider
W = torch.randn(10, 4)
TH = torch.randn(2, 3, 6)
TW = torch.randn(10, 6)
HEADS = (H, W, TH, TW)
HALVES = H.half(), W.half()
OUT = torch.zeros(10, 4)  # the caller's sum of the weight's gradient

LINEAR_CASES = [
    ((H.long(), W, TH, TW, L), {}, TypeError, "student_hidden: expected dtype float32, .* got torch.int64"),
    ((None, W, TH, TW, L), {}, TypeError, "student_hidden: expected a tensor, got None"),
    (
        (torch.tensor(1.0), W, TH, TW, L),
        {},
        ValueError,
        r"student_hidden: expected shape \[..., H\] with H >= 1, got \(\)",
    ),
    ((H, W[:, :3], TH, TW, L), {}, ValueError, r"student_weight: expected shape \[V, 4\] .*, got \(10, 3\)"),
    ((H, TW, TH, TW, L), {}, ValueError, r"student_weight: expected shape \[V, 4\] .*, got \(10, 6\)"),
    ((H, W, TH, W, L), {}, ValueError, r"teacher_weight: expected shape \[V, 6\] .*, got \(10, 4\)"),
    ((H, W[0], TH, TW, L), {}, ValueError, r"student_weight: expected shape \[V, H\] .*, got \(4,\)"),
    ((H, W[:0], TH, TW, L), {}, ValueError, r"student_weight: expected shape \[V, H\] with V >= 1"),
    (
        (H, W, TH, TW[:8], L),
        {},
        ValueError,
        "teacher_weight: expected the student's vocabulary of 10, got 8; .*vocab_size",
    ),
    ((H, W, TH[:1], TW, L), {}, ValueError, r"teacher_hidden: expected the student's leading dimensions \(2, 3\)"),
    ((H, W, None, TW, L), {}, ValueError, "teacher_hidden: expected a tensor beside teacher_weight, got None"),
    ((H, W, TH, None, L), {}, ValueError, "teacher_weight: expected a tensor beside teacher_hidden, got None"),
    ((H, W, None, None, L), {}, ValueError, "teacher_hidden: expected a tensor, got None with alpha=0.5"),
    ((*HEADS, L), {"student_bias": torch.randn(9)}, ValueError, r"student_bias: expected shape \(10,\), got \(9,\)"),
    ((*HEADS, L), {"teacher_bias": torch.randn(10, 1)}, ValueError, r"teacher_bias: expected shape \(10,\), got"),
    ((*HEADS, L), {"teacher_bias": [0.0]}, TypeError, "teacher_bias: expected a tensor"),
    ((H, W, None, None, L), {"alpha": 0.0, "teacher_bias": torch.randn(10)}, ValueError, "teacher_bias: expected None"),
    (
        (H, W.bfloat16(), TH, TW, L),
        {},
        ValueError,
        "student_weight: expected the dtype of student_hidden, .*torch.autocast",
    ),
    (
        (*HEADS, L),
        {"teacher_bias": torch.randn(10).half()},
        ValueError,
        "teacher_bias: expected the dtype of teacher_hidden",
    ),
    (
        (H, W.to("meta"), TH, TW, L),
        {},
        ValueError,
        "student_weight: expected a tensor on the device of student_hidden, cpu",
    ),
    ((H, W, TH.to("meta"), TW.to("meta"), L), {}, ValueError, "teacher_hidden: expected a tensor on the CPU or a CUDA"),
    ((*HEADS, L[:1]), {}, ValueError, r"labels: expected one value a row, shape \(2, 3\), got \(1, 3\)"),
    ((*HEADS, L + 10), {}, IndexError, "labels: expected class ids from 0 to 9"),
    ((*HEADS,), {}, ValueError, "labels: expected a tensor, got None with alpha=0.5"),
    ((*HEADS, L), {"vocab_size": 11}, ValueError, "vocab_size: expected an integer from 1 to 10, got 11"),
    ((*HEADS, L), {"logit_softcap": -30.0}, ValueError, "logit_softcap: .* got -30.0"),
    ((*HEADS, L), {"logit_scale": (0.0, 1.0)}, ValueError, "logit_scale: .* got 0.0"),
    ((*HEADS, L), {"logits_dtype": torch.bfloat16}, ValueError, "logits_dtype: .* torch.float32, got torch.bfloat16"),
    ((*HEADS, L), {"workspace_bytes": 0}, ValueError, "workspace_bytes: expected at least 1, got 0"),
    ((*HEADS, L), {"workspace_bytes": 1e9}, TypeError, "workspace_bytes: expected a number of bytes"),
    ((*HEADS, L), {"workspace_bytes": 100}, ValueError, "workspace_bytes: expected at least 512, .* got 100"),
    (
        (*HEADS, L),
        {"divergence": 1},
        ValueError,
        "divergence: expected 'forward_kl', 'reverse_kl', .*'tvd'.*, or an object of .*, got 1",
    ),
    ((*HEADS,), {"shift": True, "alpha": 1.0}, ValueError, "labels: expected a tensor with shift=True"),
    ((*HEADS, L), {"temperature": 0}, ValueError, "temperature: expected a finite number above 0"),
    ((*HEADS, L), {"token_weights": torch.ones(3)}, ValueError, "token_weights: expected one value a row"),
    ((*HEADS, L), {"compact": 1}, TypeError, "compact: expected None, True or False, got 1"),
    ((*HEADS, L), {"compact": torch.tensor(True)}, TypeError, "compact: expected None, True or False, got"),
    ((*HEADS, L), {"counted_rows": 2.0}, TypeError, "counted_rows: expected a number of rows, got 2.0"),
    ((*HEADS, L), {"counted_rows": True}, TypeError, "counted_rows: expected a number of rows, got True"),
    ((*HEADS, L), {"counted_rows": torch.tensor(6)}, TypeError, "counted_rows: .* from a tensor would wait"),
    ((*HEADS, L), {"counted_rows": -1}, ValueError, "counted_rows: expected at least 0, got -1"),
    ((*HEADS, L), {"counted_rows": 5}, ValueError, "counted_rows: expected at least 6, .* got 5"),
    (
        (*HEADS, L),
        {"weight_grad_scale": 2.0},
        ValueError,
        "weight_grad_scale: expected 1 without weight_grad_out, got 2",
    ),
    (
        (*HEADS, L),
        {"weight_grad_scale": torch.ones(())},
        ValueError,
        "weight_grad_scale: expected 1 without weight_grad_out",
    ),
    ((*HEADS, L), {"weight_grad_out": OUT, "weight_grad_scale": 0.0}, ValueError, "weight_grad_scale: .* got 0.0"),
    (
        (*HEADS, L),
        {"weight_grad_out": OUT, "weight_grad_scale": torch.nan},
        ValueError,
        "weight_grad_scale: .* got nan",
    ),
    ((*HEADS, L), {"weight_grad_out": OUT, "weight_grad_scale": "1"}, TypeError, "weight_grad_scale: .* got '1'"),
    (
        (*HEADS, L),
        {"weight_grad_out": OUT, "weight_grad_scale": torch.ones(2)},
        ValueError,
        "weight_grad_scale: expected one number, got",
    ),
    (
        (*HEADS, L),
        {"weight_grad_out": OUT, "weight_grad_scale": 2.0, "reduction": "none"},
        ValueError,
        "weight_grad_scale: expected 1 with reduction='none', got 2.0",
    ),
    ((*HEADS, L), {"weight_grad_out": [0.0]}, TypeError, "weight_grad_out: expected a tensor"),
    (
        (*HEADS, L),
        {"weight_grad_out": OUT[:9]},
        ValueError,
        r"weight_grad_out: expected a contiguous tensor of shape \(10, 4\) and torch.float32 on cpu, got",
    ),
    ((*HEADS, L), {"weight_grad_out": OUT.bfloat16()}, ValueError, "weight_grad_out: expected .* torch.float32 on cpu"),
    ((*HEADS, L), {"weight_grad_out": torch.zeros(4, 10).T}, ValueError, "weight_grad_out: expected a contiguous"),
    (
        (*HEADS, L),
        {"weight_grad_out": OUT.to("meta")},
        ValueError,
        "weight_grad_out: expected .* on cpu, got .* on meta",
    ),
    (
        (*HEADS, L),
        {"weight_grad_out": torch.zeros(10, 4, requires_grad=True)},
        ValueError,
        "weight_grad_out: expected a tensor that does not require grad",
    ),
    (
        (*HALVES, TH, TW, L),
        {"weight_grad_out": OUT},
        ValueError,
        "weight_grad_out: expected None with float16 products",
    ),
    (
        (H, W, TH.half(), TW.half(), L),  # the unit of float16 gradients is that of all of them
        {"weight_grad_out": OUT},
        ValueError,
        "weight_grad_out: expected None with float16 products",
    ),
    (
        (H, None, TH, TW, L),
        {"weight_grad_out": OUT, "student_head": W.T.__rmatmul__},
        ValueError,
        "weight_grad_out: expected None with student_head",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), LINEAR_CASES, ids=[case[3][:50] for case in LINEAR_CASES]
)
def test_invalid_call_of_the_linear_loss(arguments, options, error, message):
    before = [tensor.clone() for tensor in HEADS]
    with pytest.raises(error, match=message):
        linear_kd_loss(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(HEADS, before, strict=True))
    assert not OUT.any()


def test_what_cannot_be_raised_gives_nan():
    """A wrong value makes its row NaN where values are not to be read (a GPU, torch.compile)."""
    labels = unread(L.clone())
    labels[0, 1] = 10
    student = S.clone().requires_grad_()
    alpha = unread(torch.full((2, 3), 0.5))
    alpha[1, 2] = 2.0
    for given, where in (({"labels": labels}, (0, 1)), ({"labels": L, "alpha": alpha}, (1, 2))):
        loss = kd_loss(student, S, reduction="none", **given)
        assert loss.isnan().sum() == 1
        assert loss[where].isnan()
    for num_items in (-1.0, torch.nan, torch.inf):
        assert kd_loss(student, S, L, num_items=unread(torch.tensor(num_items))).isnan()


@pytest.mark.parametrize(
    ("missing", "message"), [("triton", "pip install triton"), ("triton.language", "triton.language")]
)
def test_cuda_tensors_without_triton_name_the_package(missing, message, monkeypatch):
    import sys

    from fused_kd import sweep

    for name in [name for name in sys.modules if name.startswith("fused_kd.backends.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("fused_kd.backends.triton")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=message) as raised:
        sweep._kernels()
    assert ("pip install" in str(raised.value)) == (missing == "triton")  # a broken Triton is not a missing one


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_workspace_that_is_too_small_for_the_gradients_is_refused_before_anything_runs(reduction, compiled):
    """Float32 logits of bfloat16 heads: their gradient is rounded in a buffer of its own, which the loss alone lacks."""
    heads = [tensor.detach().bfloat16().requires_grad_() for tensor in HEADS[:2]]
    teacher = [tensor.detach().bfloat16() for tensor in HEADS[2:]]

    def loss(workspace_bytes):
        return linear_kd_loss(
            *heads, *teacher, L, reduction=reduction, logits_dtype=torch.float32, workspace_bytes=workspace_bytes
        ).sum()

    enough = plan_chunks(1, 10, 4, 4, logits_dtype=torch.float32).workspace_bytes  # of one token
    if compiled:
        loss = torch.compile(loss, backend="aot_eager")
        with pytest.raises(Exception, match=f"workspace_bytes: expected at least {enough}"):
            loss(enough - 1).backward()
    else:
        with pytest.raises(ValueError, match=f"workspace_bytes: expected at least {enough}"):
            loss(enough - 1)
    loss(enough).backward()
    assert all(head.grad.isfinite().all() for head in heads)


def test_importing_the_package_does_not_import_triton():
    """Which decides as it is imported whether kernels are interpreted: `fused-kd check --backend interpreter`."""
    import subprocess
    import sys

    code = "import sys, fused_kd; sys.exit(any(name.split('.')[0] == 'triton' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_importing_the_package_needs_no_triton():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fused_kd\n"
        "z = torch.randn(2, 5); print(float(fused_kd.kd_loss(z, z, alpha=1.0)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert abs(float(result.stdout)) < 1e-6


def test_importing_the_package_needs_no_numpy():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"  # PyTorch's, which misses it
        "import torch, fused_kd\n"
        "x = torch.randn(2, 5, requires_grad=True); z = 2 * x\n"
        "fused_kd.kd_loss(z, z.detach()[:, :], alpha=1.0, inplace_backward=True).backward()\n"
        "print(float(x.grad.norm()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1e-6
