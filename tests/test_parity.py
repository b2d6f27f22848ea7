"""Parity: the packages that others distil with, run beside `kd_loss` and `linear_kd_loss` on the same numbers.

Each package is skipped where it is not installed.  The parameters say what a user of it passes here to get its loss.
"""

import importlib
import math
import sys
from contextlib import nullcontext
from importlib.machinery import PathFinder
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.divergences import JSD, MixedKL, SkewKL, SkewReverseKL

pytestmark = pytest.mark.usefixtures("one_thread")

N, V, H_S, H_T = 24, 307, 16, 20
T = 2.0
SPREAD = 3.0
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-13}  # norm-relative


def relative_error(found, expected):
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


def assert_parity(ours, theirs, leaves, bound):
    """Compare two values, scalars or per row, and their gradients in the leaves."""
    assert relative_error(ours.detach(), theirs.detach()) <= bound
    upstream = torch.linspace(0.5, 1.5, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream.to(theirs.dtype)),
        strict=True,
    ):
        assert relative_error(mine, other) <= bound


def hidden(dtype=torch.float32):
    """Return hidden states and heads that give logits of standard deviation SPREAD; the student's are leaves."""
    streams = [
        (torch.randn(N, width, dtype=dtype), torch.randn(V, width, dtype=dtype) * (SPREAD / math.sqrt(width)))
        for width in (H_S, H_T)
    ]
    student = tuple(tensor.requires_grad_() for tensor in streams[0])
    return student, streams[1], torch.randint(V, (N,))


def logits(dtype=torch.float32):
    student, teacher = (SPREAD * torch.randn(2, N, V, dtype=dtype)).unbind()
    return student.clone().requires_grad_(), teacher, torch.randint(V, (N,))


@pytest.fixture
def alone(monkeypatch):
    """Returns a function that imports a module of a package without the package's own imports, or skips the test.

    TRL's kernels and speculators' losses need nothing of what their packages import.
    """

    def module(name, **stubs):
        package = name.partition(".")[0]
        found = PathFinder.find_spec(package)
        if found is None:
            pytest.skip(f"{package} is not installed")
        for known in [known for known in sys.modules if known.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, known)
        names = name.split(".")
        parents = [".".join(names[:end]) for end in range(1, len(names))]
        for parent in (*parents, *stubs):
            empty = ModuleType(parent)
            empty.__path__ = ["/".join((found.submodule_search_locations[0], *parent.split(".")[1:]))]
            empty.__dict__.update(stubs.get(parent, {}))
            monkeypatch.setitem(sys.modules, parent, empty)
        imported = importlib.import_module(name)
        for own in [own for own in sys.modules if own.partition(".")[0] == package]:
            monkeypatch.setitem(sys.modules, own, sys.modules[own])
        return imported

    return module


@pytest.fixture
def trl_kernels(alone):
    pytest.importorskip("transformers", reason="transformers is not installed")
    utils = {"maybe_gather_lm_head_ctx": lambda *parameters: nullcontext()}
    return alone("trl.kernels.chunked_divergence", **{"trl.trainer": {}, "trl.trainer.utils": utils})


OF_TRL = {0.0: "forward_kl", 0.3: JSD(0.3), 0.5: "jsd", 1.0: "reverse_kl"}  # by its beta


@pytest.mark.parametrize("beta", OF_TRL)
@pytest.mark.parametrize("temperature", [1.0, T])
def test_trl(trl_kernels, monkeypatch, beta, temperature):
    """TRL: the divergence of each row at T, without T^2 and without CE, and the entropy of the student at T."""
    monkeypatch.setattr(trl_kernels, "VOCAB_CHUNK_SIZE", 128)  # several tiles, as in use
    student, teacher, _ = hidden()
    theirs, entropy = trl_kernels.ChunkedDivergenceFunction.apply(
        *student, None, *teacher, None, beta, temperature
    )  # fmt: skip
    ours = linear_kd_loss(
        *student, *teacher, alpha=1.0, temperature=temperature, divergence=OF_TRL[beta], reduction="none",
        return_parts=True,
    )  # fmt: skip
    assert_parity(ours.loss / temperature**2, theirs, student, CLOSE[torch.float32])
    assert relative_error(ours.divergence.detach(), theirs.detach()) <= CLOSE[torch.float32]
    assert relative_error(ours.entropy.detach(), entropy) <= CLOSE[torch.float32]


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_trl_with_soft_caps_scales_and_biases(trl_kernels, beta):
    student, teacher, _ = hidden()
    biases = torch.randn(V, requires_grad=True), torch.randn(V)
    theirs, entropy = trl_kernels.ChunkedDivergenceFunction.apply(
        *student, biases[0], *teacher, biases[1], beta, T, 0.7, 5.0, 1.3, 8.0
    )  # fmt: skip
    ours = linear_kd_loss(
        *student, *teacher, alpha=1.0, temperature=T, divergence=OF_TRL[beta], reduction="none", return_parts=True,
        student_bias=biases[0], teacher_bias=biases[1], logit_scale=(0.7, 1.3), logit_softcap=(5.0, 8.0),
    )  # fmt: skip
    assert_parity(ours.loss / T**2, theirs, (*student, biases[0]), CLOSE[torch.float32])
    assert relative_error(ours.entropy.detach(), entropy) <= CLOSE[torch.float32]


def test_trl_with_num_items(trl_kernels):
    """TRL's trainer divides by the number of tokens: `num_items = count T^2` takes T^2 away."""
    student, teacher, _ = hidden()
    theirs, _ = trl_kernels.ChunkedDivergenceFunction.apply(*student, None, *teacher, None, 1.0, T)
    ours = linear_kd_loss(
        *student, *teacher, alpha=1.0, temperature=T, divergence="reverse_kl", num_items=2 * N * T**2
    )  # fmt: skip
    assert_parity(ours, theirs.sum() / (2 * N), student, CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0])
def test_liger_chunked(beta, dtype):
    """Liger: hard and soft loss with weights of their own, no T^2; rows of ignored labels count in neither."""
    module = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    student, teacher, labels = hidden(dtype)
    labels[::3] = -100
    alpha = 0.6
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - alpha,
        weight_soft_loss=alpha * T**2,
        beta=beta,
        temperature=T,
        compiled=False,
        chunk_size=10,
    )
    theirs = loss(*student, *teacher, labels)
    ours = linear_kd_loss(*student, *teacher, labels, alpha=alpha, temperature=T, divergence=OF_TRL[beta])
    bound = CLOSE[torch.float32]  # its CE is in float32
    assert_parity(ours, theirs, student, bound)


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore")  # of NumPy, in columns that the kernel masks
def test_ligers_kernel(monkeypatch, beta):
    """Liger's `LigerJSD` takes log-probabilities at T.  Its Triton kernel is interpreted here."""
    if PathFinder.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for known in [known for known in sys.modules if known.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, known)
    student, teacher, labels = logits()
    labels[::3] = -100
    log_p, log_q = (F.log_softmax(z / T, -1) for z in (student, teacher))
    theirs = importlib.import_module("liger_kernel.transformers").LigerJSD(beta=beta)(log_p, log_q, labels)
    monkeypatch.delenv("TRITON_INTERPRET")
    ours = kd_loss(student, teacher, labels, alpha=1.0, temperature=T, divergence=OF_TRL[beta])
    assert_parity(ours / T**2, theirs, (student,), CLOSE[torch.float32])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", MixedKL(0.3)])
def test_torchtune(divergence):
    """torchtune: T is 1, and no CE.  Its forward KL has the value of the soft CE: the teacher's entropy is left in."""
    losses = pytest.importorskip("torchtune.modules.loss", reason="torchtune is not installed")
    student, teacher, labels = logits()
    labels[::3] = -100
    if divergence == "forward_kl":
        module = losses.ForwardKLLoss()
    elif divergence == "reverse_kl":
        module = losses.ReverseKLLoss()
    else:
        module = losses.SymmetricKLLoss(sym_kd_ratio=1 - divergence.reverse)
    share_of_forward = {"forward_kl": 1.0, "reverse_kl": 0.0}.get(divergence, 0.7)
    log_q = F.log_softmax(teacher[labels != -100], -1)
    entropy = -(log_q.exp() * log_q).sum(-1).mean()
    theirs = module(student, teacher, labels) - share_of_forward * entropy
    ours = kd_loss(student, teacher, labels, alpha=1.0, temperature=1.0, divergence=divergence)
    assert_parity(ours, theirs, (student,), CLOSE[torch.float32])


def test_torchtune_in_chunks():
    losses = pytest.importorskip("torchtune.modules.loss", reason="torchtune is not installed")
    student, teacher, labels = logits()
    labels[::3] = -100
    chunks = [[part[None] for part in tensor.chunk(4)] for tensor in (student, teacher)]
    theirs = losses.ReverseKLWithChunkedOutputLoss(4)(*chunks, labels[None])
    ours = kd_loss(student, teacher, labels, alpha=1.0, temperature=1.0, divergence="reverse_kl")
    assert_parity(ours, theirs, (student,), CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skew", [0.1, 0.4])
@pytest.mark.parametrize("reverse", [False, True])
def test_distillms_formulas(reverse, skew, dtype):
    """Equations 3 and 4 of arXiv:2402.03898: KL(q || a q + (1 - a) p) and KL(p || (1 - a) q + a p), q the teacher."""
    student, teacher, _ = logits(dtype)
    p, q = (torch.softmax(z.double() / T, -1) for z in (student, teacher))
    if reverse:
        theirs = (p * (p / ((1 - skew) * q + skew * p)).log()).sum(-1)
    else:
        theirs = (q * (q / (skew * q + (1 - skew) * p)).log()).sum(-1)
    divergence = SkewReverseKL(skew) if reverse else SkewKL(skew)
    ours = kd_loss(student, teacher, alpha=1.0, temperature=T, divergence=divergence, reduction="none")
    assert_parity(ours / T**2, theirs, (student,), CLOSE[dtype])


OF_ORDA = [  # its variant and its beta, the share of the student in the mixture
    ("forward_kl", "forward", None),
    ("reverse_kl", "reverse", None),
    (JSD(0.3), "skew_js", 0.7),
    (SkewKL(0.3), "skew_forward", 0.7),
    (SkewReverseKL(0.3), "skew_reverse", 0.3),
]


@pytest.mark.parametrize(("divergence", "variant", "beta"), OF_ORDA)
@pytest.mark.filterwarnings("ignore:ORDA")
def test_orda(divergence, variant, beta):
    """orda-kernel: weights of CE and KL of their own; its KL has the T^2."""
    orda = pytest.importorskip("orda_kernel", reason="orda-kernel is not installed")
    student, teacher, labels = hidden()
    parameter = {} if beta is None else {"kl_beta": beta}
    found = orda.distillation_loss(
        *student, labels, orda.SeparateTeacher(hidden=teacher[0], weight=teacher[1]), student_ce_weight=0.4,
        kl_weight=0.6, kl_temperature=T, kl_divergence=variant, **parameter,
    )  # fmt: skip
    ours = linear_kd_loss(*student, *teacher, labels, alpha=0.6, temperature=T, divergence=divergence)
    assert_parity(ours, found.loss, student, CLOSE[torch.float32])


OF_SPECULATORS = {
    "forward_kl": "kl_div_loss",
    "reverse_kl": "reverse_kl_div_loss",
    "jsd": "js_div_loss",
    "tvd": "tv_loss",
}


@pytest.mark.parametrize("divergence", OF_SPECULATORS)
def test_speculators(alone, divergence):
    """speculators: the divergence of each position at T = 1."""
    losses = alone("speculators.losses.eager")
    student, teacher, _ = logits()
    theirs = getattr(losses, OF_SPECULATORS[divergence])(student[None], teacher[None])[0]
    ours = kd_loss(student, teacher, alpha=1.0, temperature=1.0, divergence=divergence, reduction="none")
    assert_parity(ours, theirs, (student,), CLOSE[torch.float32])
