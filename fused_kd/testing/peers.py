"""The peers: losses that a user could take instead of `kd_loss` and `linear_kd_loss`.

A peer computes the whole loss or a part of it; `problems.PARTS` has the formulas.  The extra "bench" installs the packages
of the peers, and each package is imported when its peer is built.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kd_loss, linear_kd_loss
from .problems import ALPHA, WORDS, Inputs, logits_of
from .replacing import replaced_in
from .shapes import Shape

Loss = Callable[[Inputs, float], Tensor]  # a function of inputs and T


@dataclass(frozen=True)
class Peer:
    """A loss to compare with."""

    name: str
    inputs: str  # one of shapes.INPUTS
    build: Callable[[], Loss]
    part: str = "CE + KL"  # one of problems.PARTS
    divergence: str = "forward_kl"  # the name of the one in the part, or of the one that it is shown with
    package: str | None = None  # the name to import
    distribution: str | None = None  # the name to install, if it differs
    needs_gpu: bool = False
    temperature: float | None = None  # the only T that it has; None: any
    overwrites: bool = False  # whether it overwrites its inputs

    @property
    def computes(self) -> str:
        return self.part if self.temperature is None else f"{self.part}, T = {self.temperature:g}"

    def missing(self, device: torch.device) -> str | None:
        """Return the reason why the peer cannot run here; None if it can."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.distribution or self.package} is not installed"
        if self.needs_gpu and device.type != "cuda":
            return "its Triton kernels need a GPU"
        return None


def _kl(log_from: Tensor, log_to: Tensor) -> Tensor:
    return F.kl_div(log_to, log_from, reduction="batchmean", log_target=True)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return torch.logsumexp(torch.stack((log_p + math.log(1 - share), log_q + math.log(share))), dim=0)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = _mixture(log_p, log_q, 0.5)
    return 0.5 * _kl(log_q, log_m) + 0.5 * _kl(log_p, log_m)


# The divergences of log-probabilities of student and teacher, at the defaults, as training code usually computes them.
EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda log_p, log_q: _kl(log_q, log_p),
    "reverse_kl": _kl,
    "mixed_kl": lambda log_p, log_q: 0.5 * _kl(log_q, log_p) + 0.5 * _kl(log_p, log_q),
    "jsd": _jsd,
    "skew_kl": lambda log_p, log_q: _kl(log_q, _mixture(log_p, log_q, 0.1)),
    "skew_reverse_kl": lambda log_p, log_q: _kl(log_p, _mixture(log_p, log_q, 0.9)),
    "tvd": lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean(),
}


def eager(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, divergence: str = "forward_kl"
) -> Tensor:
    """Return the loss as training code usually computes it."""
    log_p = F.log_softmax(student.float() / temperature, dim=-1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=-1)
    soft = EAGER[divergence](log_p, log_q)
    return (1 - ALPHA) * F.cross_entropy(student.float(), labels) + ALPHA * temperature**2 * soft


def eager_loss(inputs: Inputs, temperature: float, divergence: str = "forward_kl") -> Tensor:
    with torch.no_grad():
        teacher = logits_of(inputs.teacher)
    return eager(logits_of(inputs.student), teacher, inputs.labels, temperature, divergence)


def _eager(divergence: str) -> Loss:
    return functools.partial(eager_loss, divergence=divergence)


def _compiled(divergence: str) -> Loss:
    compiled = torch.compile(eager_of_tensors, dynamic=False)
    return lambda inputs, temperature: compiled(inputs.student, inputs.teacher, inputs.labels, temperature, divergence)


def eager_of_tensors(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    temperature: float,
    divergence: str = "forward_kl",
) -> Tensor:
    return eager_loss(Inputs(student, teacher, labels), temperature, divergence)


def ours_with(**options: Any) -> Loss:
    """Return our loss with these options."""

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        function: Any = kd_loss if len(inputs.student) == 1 else linear_kd_loss
        value = function(
            *inputs.student, *inputs.teacher, inputs.labels, alpha=ALPHA, temperature=temperature, **options
        )
        return value  # type: ignore[no-any-return]

    return loss


def into_main_grad() -> Loss:
    """Return our loss from hidden states, which adds the weight's gradient to a float32 buffer: its `main_grad`."""

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        weight: Any = inputs.student[1]
        if not hasattr(weight, "main_grad"):
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        return ours_with(weight_grad_out=weight.main_grad)(inputs, temperature)

    return loss


def _torchtune(direction: str = "Forward", chunks: int = 8) -> Loss:
    """Return the loss of torchtune's recipes, whose heads take chunks of a sequence and keep all logits for backward."""
    losses = import_module("torchtune.modules.loss")
    divergence = getattr(losses, f"{direction}KLWithChunkedOutputLoss")(chunks)
    cross_entropy = losses.CEWithChunkedOutputLoss(chunks)

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        def pieces(stream: tuple[Tensor, ...]) -> list[Tensor]:  # [1, N / chunks, V]
            return [logits_of((chunk[None], *stream[1:])) for chunk in stream[0].chunk(chunks)]

        with torch.no_grad():
            teacher = pieces(inputs.teacher)
        student, labels = pieces(inputs.student), inputs.labels[None]
        value = (1 - ALPHA) * cross_entropy(student, labels) + ALPHA * divergence(student, teacher, labels)
        return value  # type: ignore[no-any-return]

    return loss


def _liger_chunked(beta: float = 0.0) -> Loss:
    jsd = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss

    @functools.cache
    def at(temperature: float) -> Any:
        soft = ALPHA * temperature**2
        return jsd(weight_hard_loss=1 - ALPHA, weight_soft_loss=soft, beta=beta, temperature=temperature)

    return lambda inputs, temperature: at(temperature)(*inputs.student, *inputs.teacher, inputs.labels)


def _liger(function: str, call: Callable[[Any, Inputs, float], Tensor]) -> Callable[[], Loss]:
    def build() -> Loss:
        return functools.partial(call, getattr(import_module("liger_kernel.transformers.functional"), function))

    return build


def _liger_jsd(beta: float) -> Callable[[], Loss]:
    def call(function: Any, inputs: Inputs, temperature: float) -> Tensor:
        log_p, log_q = (F.log_softmax(s[0].float() / temperature, -1) for s in (inputs.student, inputs.teacher))
        return function(log_p, log_q, jsd_beta=beta)  # type: ignore[no-any-return]

    return _liger("liger_jsd", call)


def _liger_fused_jsd(beta: float) -> Callable[[], Loss]:
    def call(function: Any, inputs: Inputs, temperature: float) -> Tensor:
        value = function(*inputs.student, *inputs.teacher, jsd_beta=beta, temperature=temperature)
        return value  # type: ignore[no-any-return]

    return _liger("liger_fused_linear_jsd", call)


def _liger_ce_and_tvd() -> Loss:
    module = import_module("liger_kernel.transformers.fused_ce_tvd").LigerFusedCETVDLoss()

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        ce, distance = module(*inputs.student, *inputs.teacher, inputs.labels)
        return ce.mean() + distance.mean()  # type: ignore[no-any-return]

    return loss


def _liger_kl_of_probabilities(function: Any, inputs: Inputs, temperature: float) -> Tensor:
    with torch.no_grad():  # the function takes the teacher's probabilities as one array
        target = F.softmax(logits_of(inputs.teacher).float() / temperature, -1).to(inputs.student[0].dtype)
    return function(*inputs.student, target, temperature=temperature)  # type: ignore[no-any-return]


class _OverLogits(torch.autograd.Function):
    """The autograd function of a kernel that overwrites the logits with their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, launch: Callable[[Tensor], Tensor]) -> Tensor:
        logits = logits.detach()
        value = launch(logits)
        ctx.save_for_backward(logits)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None  # right for an upstream gradient of 1, as in a training step


def _fla_kernel() -> Loss:
    """Return the kernel of fla's fused KL, applied to given logits as fla launches it for a chunk."""
    ops = import_module("fla.modules.fused_kl_div.ops")

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        def launch(logits: Tensor) -> Tensor:
            (N, V), value = logits.shape, torch.zeros(logits.shape[0], device=logits.device)
            block = min(ops.MAX_FUSED_SIZE, 1 << (V - 1).bit_length())
            ops.kl_div_kernel[(N,)](
                logits=logits, target_logits=inputs.teacher[0], loss=value, s_logits=logits.stride(-2),
                s_loss=value.stride(-1), reduction="batchmean", N=N, V=V, BV=block, num_warps=ops.STATIC_WARPS,
            )  # fmt: skip
            return value.sum()

        return _OverLogits.apply(inputs.student[0], launch)  # type: ignore[no-any-return]

    return loss


def _trl(beta: float = 0.0) -> Loss:
    function = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        (hidden, weight), (teacher_hidden, teacher_weight) = inputs.student, inputs.teacher
        divergence, _ = function.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, beta, temperature
        )  # fmt: skip
        return divergence.mean()  # type: ignore[no-any-return]

    return loss


def _orda(variant: str = "forward", beta: float | None = None) -> Loss:
    orda = import_module("orda_kernel")

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        (hidden, weight), (teacher_hidden, teacher_weight) = inputs.student, inputs.teacher
        found = orda.distillation_loss(
            hidden, weight, inputs.labels, orda.SeparateTeacher(hidden=teacher_hidden, weight=teacher_weight),
            student_ce_weight=1 - ALPHA, kl_weight=ALPHA, kl_temperature=temperature, kl_divergence=variant, kl_beta=beta,
        )  # fmt: skip
        return found.loss  # type: ignore[no-any-return]

    return loss


def _speculators(divergence: str) -> Loss:
    function = getattr(import_module("speculators.losses.fused"), f"fused_{divergence}_loss")
    return lambda inputs, temperature: function(inputs.student[0][None], inputs.teacher[0][None]).mean()


def _fla_kl() -> Loss:
    module = import_module("fla.modules.fused_kl_div").FusedKLDivLoss()

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        (hidden, weight), (teacher_hidden, teacher_weight) = inputs.student, inputs.teacher
        return module(hidden, teacher_hidden, weight, teacher_weight)  # type: ignore[no-any-return]

    return loss


def _cce(implementation: str) -> Callable[[], Loss]:
    def build() -> Loss:
        function = import_module("cut_cross_entropy").linear_cross_entropy
        return lambda inputs, temperature: function(*inputs.student, inputs.labels, impl=implementation)

    return build


OURS = "fused_kd"
liger = functools.partial(Peer, package="liger_kernel", distribution="liger-kernel")
liger_kernels = functools.partial(liger, needs_gpu=True)
torchtune = functools.partial(Peer, part="CE + soft CE", package="torchtune", temperature=1.0)
cce = functools.partial(Peer, part="CE", package="cut_cross_entropy", distribution="cut-cross-entropy")
fla = functools.partial(Peer, package="fla", distribution="fla-core", needs_gpu=True)
trl = functools.partial(Peer, package="trl")
orda = functools.partial(Peer, package="orda_kernel", distribution="orda-kernel", needs_gpu=True)
speculators = functools.partial(Peer, package="speculators", needs_gpu=True, temperature=1.0)


def _plain(inputs: str) -> list[Peer]:
    """Return ours and what needs no package, for every divergence."""
    return [
        Peer(name, inputs, functools.partial(build, divergence=divergence), f"CE + {word}", divergence)
        for divergence, word in WORDS.items()
        for name, build in ((OURS, ours_with), ("eager PyTorch", _eager), ("torch.compile", _compiled))
    ]


def _with_divergences() -> list[Peer]:
    """Return the other packages' reverse KL and JSD."""
    found = []
    for divergence, beta, of_orda, of_speculators in (
        ("reverse_kl", 1.0, ("reverse", None), "reverse_kl_div"), ("jsd", 0.5, ("skew_js", 0.5), "js_div"),
    ):  # fmt: skip
        word, build = WORDS[divergence], functools.partial
        only: dict[str, Any] = {"part": word, "divergence": divergence}
        both: dict[str, Any] = {"part": f"CE + {word}", "divergence": divergence}
        found += [
            liger_kernels(f"Liger JSD, beta = {beta:g}", "logits", _liger_jsd(beta), **only),
            speculators("speculators", "logits", build(_speculators, of_speculators), **only),
            liger(f"Liger chunked JSD, beta = {beta:g}", "hidden", build(_liger_chunked, beta), **both),
            liger_kernels(f"Liger fused linear JSD, beta = {beta:g}", "hidden", _liger_fused_jsd(beta), **only),
            trl(f"TRL chunked divergence, beta = {beta:g}", "hidden", build(_trl, beta), **only),
            orda("orda-kernel", "hidden", build(_orda, *of_orda), **both),
        ]
    reverse = functools.partial(torchtune, part="CE + reverse KL", divergence="reverse_kl")
    chunked = functools.partial(_torchtune, "Reverse")
    return [*found, *(reverse("torchtune, chunked", inputs, chunked) for inputs in ("logits", "hidden"))]


PEERS = (
    *_plain("logits"),
    torchtune("torchtune, chunked", "logits", _torchtune),
    liger_kernels("Liger CE + TVD", "logits", _liger_ce_and_tvd, part="CE + TVD"),
    liger_kernels(
        "Liger CE", "logits",
        _liger("liger_cross_entropy", lambda f, i, T: f(*i.student, i.labels)), part="CE", overwrites=True,
    ),
    fla("fla KL kernel", "logits", _fla_kernel, part="KL", temperature=1.0, overwrites=True),
    *_plain("hidden"),
    liger("Liger chunked JSD, beta = 0", "hidden", _liger_chunked),
    torchtune("torchtune, chunked", "hidden", _torchtune),
    trl("TRL chunked divergence", "hidden", _trl, part="KL"),
    orda("orda-kernel", "hidden", _orda),
    liger_kernels("Liger fused linear JSD, beta = 0", "hidden", _liger_fused_jsd(0.0), part="KL"),
    liger_kernels(
        "Liger fused linear KL", "hidden", _liger("liger_fused_linear_kl_div", _liger_kl_of_probabilities), part="KL",
    ),
    fla("fla fused KL", "hidden", _fla_kl, part="KL", temperature=1.0),
    cce("Cut Cross-Entropy", "hidden", _cce("cce"), needs_gpu=True),
    cce("Cut Cross-Entropy, torch.compile", "hidden", _cce("torch_compile")),
    liger_kernels(
        "Liger fused linear CE", "hidden",
        _liger("liger_fused_linear_cross_entropy", lambda f, i, T: f(*i.student, i.labels)), part="CE",
    ),
    *_with_divergences(),
)  # fmt: skip


def of(shape: Shape, divergence: str = "forward_kl") -> list[Peer]:
    return [peer for peer in PEERS if (peer.inputs, peer.divergence) == (shape.inputs, divergence)]


def offering(*peers: Peer) -> AbstractContextManager[None]:
    """Measure these peers instead of `PEERS`, while the context lasts."""
    return replaced_in(__name__, PEERS=peers)
